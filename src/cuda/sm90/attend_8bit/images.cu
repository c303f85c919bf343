// The pass that writes tile images (images.h), in two launches: a center for each sequence and KV head, from 64 of its
// keys, then the images, those of K and of V by different CTAs.
//
// It is bound by memory: 512 bytes read and 256 written per key (d128), once, where attention reads each of them tens
// of times. So it is built as the pooling pass is: 16 bytes per thread, eight loads in flight, three CTAs of up to 80
// registers per thread on a multiprocessor. A CTA's image stays in registers between the search for its scale and its
// rounding. V turns in shared memory, in rows of 33 words, so that neither its columns nor its rows meet in a bank more
// than twice.
#include <algorithm>
#include <limits>

#include "cuda/common/attend/images.h"
#include "cuda/common/attend/tiles.cuh"
#include "cuda/common/energies/pool_rows.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = kImageBytes / kThreads / kColumns; // rows per thread, eight columns of each
constexpr int kSamples = 64;                             // keys of which a center is made
constexpr int kTurnPitch = kImageKeys / 4 + 1;           // words
constexpr float kLeastK = 1e-15f;                        // of a scale's largest value: products of two stay normal
constexpr float kLeastV = 1e-30f;
constexpr float kMost = 0x1p126f; // what is as large counts as infinite: the fast division knows no larger divisors

__device__ inline bool Counts(float x) { return fabsf(x) < kMost; }

struct ImageJobs {
  AttendArgs a;
  Images images;
  int key_units, mean_units;           // CTAs for K (and as many for V): images of keys, and of means
  int keys_each, means_each;           // images of a sequence, unless K is packed
  Divider by_heads;                    // kv_heads
  Divider by_keys_each, by_means_each; // those
  Divider by_image_keys, by_mean_keys; // keys that an image stands for
};

__device__ inline bool PackedKeys(const AttendArgs& p) { return p.cu_seqlens_k && !p.page_size; }

// Row t of a sequence's K or V of one head.
template <typename T>
struct KeyRows {
  const AttendArgs& p;
  const T* data;
  const int64_t* stride;
  int sequence, k_begin;

  __device__ const T* operator()(int t) const {
    if (!p.page_size) return data + (PackedKeys(p) ? 0 : sequence * stride[0]) + (int64_t{k_begin} + t) * stride[1];
    const int column = p.by_page(t);
    const int page = __ldg(p.block_table + sequence * p.block_table_stride + min(column, p.pages_per_seq - 1));
    return data + ClampTo(page, p.page_count - 1) * stride[0] + (t - column * p.page_size) * stride[1];
  }
};

template <typename T>
__device__ KeyRows<T> RowsOf(const AttendArgs& p, bool of_v, int sequence, int head) {
  const int64_t* const stride = of_v ? p.v_stride : p.k_stride;
  const T* const data = static_cast<const T*>(of_v ? p.v_data : p.k_data) + head * stride[2];
  return {p, data, stride, sequence, KeyBegin(p, sequence)};
}

// ---------------------------------------------------------------- centers

// A column per thread: the mean of evenly spaced keys without the largest and the smallest, so that one wild key does
// not move it, and without those that are not finite. Any vector would do; this one makes the scales small.
template <typename T>
__global__ void __launch_bounds__(kImageColumns) CenterKernel(const __grid_constant__ ImageJobs jobs) {
  GridRelease();
  const AttendArgs& p = jobs.a;
  const int sequence = jobs.by_heads(blockIdx.x), head = blockIdx.x - sequence * p.kv_heads;
  const int k_len = KeyLength(p, sequence, KeyBegin(p, sequence)), samples = min(k_len, kSamples);
  const int each = samples ? k_len / samples : 0, rest = k_len - each * samples;
  const KeyRows<T> rows = RowsOf<T>(p, false, sequence, head);
  const int column = threadIdx.x;
  float sum = 0, most = -INFINITY, least = INFINITY;
  int count = 0;
  if (column < p.head_dim) {
#pragma unroll 16
    for (int i = 0; i < samples; ++i) {
      const float x = ToFloat(rows(i * each + i * rest / samples)[column]); // key i k_len / samples
      if (!Counts(x)) continue;
      sum += x;
      most = fmaxf(most, x);
      least = fminf(least, x);
      ++count;
    }
  }
  const float center = count > 2 ? __fdividef(sum - most - least, static_cast<float>(count - 2)) : 0;
  jobs.images.centers[static_cast<int64_t>(blockIdx.x) * kImageColumns + column] = Counts(center) ? center : 0;
}

// ---------------------------------------------------------------- images

struct ImageShared {
  float largest[kWarps];
  uint32_t not_finite[kImageKeys / 32];
  uint32_t turned[kImageColumns * kTurnPitch]; // V's rows of slots
};

// The largest of all threads' values, in every thread.
__device__ inline float LargestOf(float x, ImageShared& shared) {
  x = WarpMax(x);
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) x = fmaxf(x, shared.largest[i]);
  return x;
}

// Values of a thread, and which of its rows hold any that is not finite; those count as zero.
template <typename T>
struct Held {
  Chunk<T> chunk[kHeld];
  uint32_t not_finite = 0; // a bit per row

  __device__ float Value(int row, int column, const float (&center)[kColumns]) const {
    const float x = ToFloat(chunk[row].value[column]) - center[column];
    return Counts(x) ? x : 0;
  }

  // Loads this thread's rows, row_of(i) of `count` that exist, and returns the largest magnitude.
  template <class Address, class RowOf>
  __device__ float Load(Address&& address, RowOf&& row_of, int count, int column, bool active,
                        const float (&center)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int t = row_of(i);
      chunk[i].raw = uint4{0, 0, 0, 0};
      if (t < count && active) chunk[i] = LoadChunk<T, true>(address(t), column, 0, 0);
    }
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool there = row_of(i) < count && active;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (there) largest = fmaxf(largest, fabsf(Value(i, c, center)));
        if (!Counts(ToFloat(chunk[i].value[c]) - center[c])) not_finite |= 1u << i;
      }
    }
    return largest;
  }
};

__device__ inline void StoreScale(ImageScale* to, float scale, const ImageShared& shared) {
  if (threadIdx.x == 0) to->scale = scale;
  if (threadIdx.x < kImageKeys / 32) to->not_finite[threadIdx.x] = shared.not_finite[threadIdx.x];
}

// Sixteen threads per row, which write its 128 bytes together.
template <typename T, class Address>
__device__ void WriteK(Address&& address, int count, int head_dim, const float* centers, ImageShared& shared,
                       uint8_t* image, ImageScale* scale) {
  const int chunk = threadIdx.x % 16, column = chunk * kColumns, row = threadIdx.x / 16;
  const auto row_of = [&](int i) { return row + 16 * i; };
  float center[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) center[c] = centers[column + c];
  Held<T> held;
  float largest = held.Load(address, row_of, count, column, column < head_dim, center);
  if (held.not_finite) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held.not_finite >> i & 1) atomicOr(&shared.not_finite[row_of(i) / 32], 1u << row_of(i) % 32);
    }
  }
  largest = fmaxf(LargestOf(largest, shared), kLeastK);
  const float inverse = __fdividef(127, largest);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int t = row_of(i);
    float x[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = t < count ? held.Value(i, c, center) * inverse : 0;
    *reinterpret_cast<uint2*>(image + ImageOffset(t, column)) =
        uint2{PackInt8(x[0], x[1], x[2], x[3]), PackInt8(x[4], x[5], x[6], x[7])};
  }
  StoreScale(scale, largest * (1.0f / 127), shared);
}

// Eight threads per half of a row. A thread's eight keys are two times four that stand together in V's rows.
template <typename T, class Address>
__device__ void WriteV(Address&& address, int count, int head_dim, bool means, ImageShared& shared, uint8_t* image,
                       ImageScale* scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = warp % 2 * 64 + lane % 8 * kColumns, four = warp / 2 * 4 + lane / 8;
  const auto key_of = [&](int i) { // SlotOfKey of it is 4 (four + 16 (i / 4)) + i % 4
    const int slots = four + i / 4 * 16;
    return slots / 4 * 16 + slots % 4 * 2 + i % 4 / 2 * 8 + i % 2;
  };
  const float center[kColumns] = {};
  Held<T> held;
  float largest = held.Load(address, key_of, count, column, column < head_dim, center);
  if (means && held.not_finite) { // a mean that is not wanted must not reach a product
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held.not_finite >> i & 1) atomicOr(&shared.not_finite[key_of(i) / 32], 1u << key_of(i) % 32);
    }
  }
  largest = fmaxf(LargestOf(largest, shared), kLeastV);
  const float inverse = __fdividef(448, largest);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int k = 0; k < kHeld / 4; ++k) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = ToFloat(held.chunk[4 * k + i].value[c]);
        x[i] = Counts(value) ? value * inverse : means ? 0 : NAN;
      }
      shared.turned[(column + c) * kTurnPitch + four + 16 * k] = PackE4M3(x[0], x[1], x[2], x[3]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kImageBytes / 16; i += kThreads) {
    const int row = i / 8, piece = i % 8;
    const uint32_t* const from = shared.turned + row * kTurnPitch + piece * 4;
    *reinterpret_cast<uint4*>(image + ImageOffset(row, piece * 16)) = uint4{from[0], from[1], from[2], from[3]};
  }
  StoreScale(scale, largest * (1.0f / 448), shared);
}

// The image of zeros, for tiles that see nothing.
__device__ void WriteZeros(const ImageSet& set, int64_t at) {
  for (int i = threadIdx.x; i < kImageBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(set.k + at * kImageBytes)[i] = uint4{0, 0, 0, 0};
    reinterpret_cast<uint4*>(set.v + at * kImageBytes)[i] = uint4{0, 0, 0, 0};
  }
  if (threadIdx.x == 0) set.k_scale[at] = set.v_scale[at] = ImageScale{1, {}};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) ImageKernel(const __grid_constant__ ImageJobs jobs) {
  __shared__ ImageShared shared;
  GridWait();    // for the centers, and for the means
  GridRelease(); // attend may take its place as soon as there is room
  const AttendArgs& p = jobs.a;
  const bool of_v = blockIdx.x & 1;
  int unit = static_cast<int>(blockIdx.x / 2);
  const bool means = unit >= jobs.key_units;
  if (means) unit -= jobs.key_units;
  if (means && unit == jobs.mean_units) {
    if (!of_v) WriteZeros(jobs.images.keys, p.kv_heads * jobs.images.keys.rows);
    return;
  }
  // Find the image.
  const ImageSet& set = means ? jobs.images.means : jobs.images.keys;
  const int slot = jobs.by_heads(unit), head = unit - slot * p.kv_heads;
  const bool packed = PackedKeys(p);
  const auto base = [&](int b) { // MeanBase
    const Divider& by_keys = means ? jobs.by_mean_keys : jobs.by_image_keys;
    return packed ? by_keys(KeyBegin(p, b)) + b : b * (means ? jobs.means_each : jobs.keys_each);
  };
  const int b = packed ? SequenceOfSlot(p.batch, slot, base) : (means ? jobs.by_means_each : jobs.by_keys_each)(slot);
  const int first = (slot - base(b)) * kImageKeys, k_len = KeyLength(p, b, KeyBegin(p, b));
  const int count = min(kImageKeys, (means ? p.by_block(k_len + p.block_size - 1) : k_len) - first);
  if (first < 0 || count <= 0) return;
  if (threadIdx.x < kImageKeys / 32) shared.not_finite[threadIdx.x] = 0;
  __syncthreads();
  // Write it.
  const int64_t at = head * set.rows + slot;
  const float* const centers = jobs.images.centers + (int64_t{b} * p.kv_heads + head) * kImageColumns;
  const auto write = [&](auto&& address) {
    if (of_v) {
      WriteV<T>(address, count, p.head_dim, means, shared, set.v + at * kImageBytes, set.v_scale + at);
    } else {
      WriteK<T>(address, count, p.head_dim, centers, shared, set.k + at * kImageBytes, set.k_scale + at);
    }
  };
  if (means) {
    const int64_t row = packed ? p.by_block(KeyBegin(p, b)) + b : int64_t{b} * p.mean_rows_each;
    const T* const from = static_cast<const T*>(of_v ? p.v_mean_data : p.k_mean_data) + head * p.mean_stride[2] +
                          (row + first) * p.mean_stride[1];
    write([&](int t) { return from + t * p.mean_stride[1]; });
  } else {
    const KeyRows<T> rows = RowsOf<T>(p, of_v, b, head);
    write([&](int t) { return rows(first + t); });
  }
}

template <typename T>
cudaError_t Launch(const ImageJobs& jobs, cudaStream_t stream) {
  CenterKernel<T><<<jobs.a.batch * jobs.a.kv_heads, kImageColumns, 0, stream>>>(jobs);
  if (cudaError_t e = cudaGetLastError()) return e;
  const int64_t grid = 2 * (int64_t{jobs.key_units} + jobs.mean_units + 1);
  return LaunchOverlapped(ImageKernel<T>, true, grid, kThreads, 0, stream, jobs);
}

} // namespace

cudaError_t LaunchImages(const AttendArgs& args, const Images& images, int32_t dtype, cudaStream_t stream) {
  ImageJobs jobs{};
  jobs.a = args;
  jobs.images = images;
  const int64_t units = (images.keys.rows + images.means.rows) * args.kv_heads;
  if (2 * (units + 1) > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  jobs.key_units = static_cast<int>(images.keys.rows * args.kv_heads);
  jobs.mean_units = static_cast<int>(images.means.rows * args.kv_heads);
  const int64_t mean_keys = int64_t{kImageKeys} * args.block_size;
  jobs.keys_each = static_cast<int>(DivUp<int64_t>(args.max_k, kImageKeys));
  jobs.means_each = static_cast<int>(DivUp<int64_t>(args.max_k, mean_keys));
  jobs.by_heads = Divider::Of(args.kv_heads);
  jobs.by_keys_each = Divider::Of(std::max(1, jobs.keys_each));
  jobs.by_means_each = Divider::Of(std::max(1, jobs.means_each));
  jobs.by_image_keys = Divider::Of(kImageKeys);
  jobs.by_mean_keys = Divider::Of(mean_keys);
  return dtype == FP_BF16 ? Launch<__nv_bfloat16>(jobs, stream) : Launch<__half>(jobs, stream);
}

} // namespace flashprefill::cuda
