// The pass that writes tile images (images.h), in two launches: a center for each sequence and KV head, from 64 of its
// keys, then the images, those of K and of V by different CTAs.
//
// It is bound by memory: 512 bytes read and 256 written per key (d128), once, where attention reads each of them tens
// of times. A thread has 8 rows of 16 bytes, all in flight before the first is used: page numbers are looked up for all
// of them first, and nothing branches in between. They stay in registers, as they came, between the search for the
// image's scale and their rounding, some 8 instructions per value. Values that are not finite are found by the largest
// magnitude, and only then looked for. V turns in shared memory, in rows of 33 words, so that neither its columns nor
// its rows meet in a bank more than twice.
#include <algorithm>
#include <limits>

#include "cuda/common/attend/images.h"
#include "cuda/common/attend/tiles.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/sequence.cuh"
#include "cuda/sm90/attend_8bit/rows16.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 8;                              // of a thread: 16 bytes
constexpr int kHeld = kImageBytes / kThreads / kColumns; // rows per thread
constexpr int kSamples = 64;                             // keys of which a center is made
constexpr int kSampleGroups = kSamples / kHeld, kCenterThreads = kSampleGroups * kImageColumns;
constexpr int kTurnPitch = kImageKeys / 4 + 1; // words
constexpr float kLeastK = 1e-15f;              // of a scale's largest value: products of two stay normal
constexpr float kLeastV = 1e-30f;
constexpr float kMostE4M3 = 460;                        // of a scaled value: from 464 on 448 would not be the nearest
constexpr float kLeastBase = 1e-20f, kMostBase = 1e20f; // of a cache's scale, else it is not looked at
constexpr float kMost = 0x1p125f; // what is as large counts as infinite: the fast division knows no divisors from
                                  // 2^126 on, and a key less a center is at most twice as large

__device__ inline bool Counts(float x) { return fabsf(x) < kMost; }

struct ImageJobs {
  AttendArgs a;
  Images images;
  const float* v_scale; // of the FP8 cache that V comes from: [batch, kv_heads], or null
  int64_t v_scale_stride[2];
  int key_units, mean_units;           // CTAs for K (and as many for V): images of keys, and of means
  int keys_each, means_each;           // images of a sequence, unless K is packed
  Divider by_heads;                    // kv_heads
  Divider by_keys_each, by_means_each; // those
  Divider by_image_keys, by_mean_keys; // keys that an image stands for
};

__device__ inline bool PackedKeys(const AttendArgs& p) { return p.cu_seqlens_k && !p.page_size; }

// Rows that lie at one distance.
template <typename T>
struct LinearRows {
  const T* data;
  int64_t stride;

  // Calls load(i, address) for this thread's rows t[i] that exist.
  template <class Load>
  __device__ void Each(const int (&t)[kHeld], int count, Load&& load) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (t[i] < count) load(i, data + t[i] * stride);
    }
  }
};

// Rows in pages, from row `first` of a sequence on.
template <typename T>
struct PagedRows {
  const AttendArgs& p;
  const T* data;
  const int64_t* stride;
  const int32_t* pages; // of the sequence
  int first;

  template <class Load>
  __device__ void Each(const int (&t)[kHeld], int count, Load&& load) const {
    int page[kHeld], row[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = p.by_page(first + t[i]);
      row[i] = first + t[i] - column * p.page_size;
      page[i] = t[i] < count ? __ldg(pages + min(column, p.pages_per_seq - 1)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (t[i] < count) load(i, data + ClampTo(page[i], p.page_count - 1) * stride[0] + row[i] * stride[1]);
    }
  }
};

// K or V of a head, rows of a sequence from `first` on.
template <typename T>
__device__ PagedRows<T> PagedRowsOf(const AttendArgs& p, bool of_v, int sequence, int head, int first) {
  const int64_t* const stride = of_v ? p.v_stride : p.k_stride;
  const T* const data = static_cast<const T*>(of_v ? p.v_data : p.k_data) + head * stride[2];
  return {p, data, stride, p.block_table + sequence * p.block_table_stride, first};
}
template <typename T>
__device__ LinearRows<T> LinearRowsOf(const AttendArgs& p, bool of_v, int sequence, int head, int first) {
  const int64_t* const stride = of_v ? p.v_stride : p.k_stride;
  const T* const data = static_cast<const T*>(of_v ? p.v_data : p.k_data) + head * stride[2];
  const int64_t before = KeyBegin(p, sequence) + first;
  return {data + (PackedKeys(p) ? 0 : sequence * stride[0]) + before * stride[1], stride[1]};
}

// ---------------------------------------------------------------- centers

// A column per thread of a warp's 32, and 8 samples: the mean of evenly spaced keys without the largest and the
// smallest, so that one wild key does not move it, and without those that are not finite. Any vector would do; this one
// makes the scales small.
template <typename T>
__global__ void __launch_bounds__(kCenterThreads) CenterKernel(const __grid_constant__ ImageJobs jobs) {
  __shared__ float sums[kSampleGroups][kImageColumns], mosts[kSampleGroups][kImageColumns],
      leasts[kSampleGroups][kImageColumns];
  __shared__ int counts[kSampleGroups][kImageColumns];
  GridRelease();
  const AttendArgs& p = jobs.a;
  const int sequence = jobs.by_heads(blockIdx.x), head = blockIdx.x - sequence * p.kv_heads;
  const int k_len = KeyLength(p, sequence, KeyBegin(p, sequence)), samples = min(k_len, kSamples);
  const int each = samples ? k_len / samples : 0, rest = k_len - each * samples;
  const int column = threadIdx.x % kImageColumns, group = threadIdx.x / kImageColumns;
  int t[kHeld];
  T x[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int sample = group * kHeld + i; // key sample * k_len / samples
    t[i] = sample < samples && column < p.head_dim ? sample * each + sample * rest / samples : k_len;
    x[i] = FromFloat<T>(INFINITY);
  }
  const auto load = [&](int i, const T* row) { x[i] = row[column]; };
  if (p.page_size) {
    PagedRowsOf<T>(p, false, sequence, head, 0).Each(t, k_len, load);
  } else {
    LinearRowsOf<T>(p, false, sequence, head, 0).Each(t, k_len, load);
  }
  float sum = 0, most = -INFINITY, least = INFINITY;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float value = ToFloat(x[i]);
    if (!Counts(value)) continue;
    sum += value;
    most = fmaxf(most, value);
    least = fminf(least, value);
    ++count;
  }
  sums[group][column] = sum;
  mosts[group][column] = most;
  leasts[group][column] = least;
  counts[group][column] = count;
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int g = 1; g < kSampleGroups; ++g) {
    sum += sums[g][column];
    most = fmaxf(most, mosts[g][column]);
    least = fminf(least, leasts[g][column]);
    count += counts[g][column];
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

// The largest of all threads' values, which are not negative, in every thread. Such floats order as their bits do.
__device__ inline float LargestOf(float x, ImageShared& shared) {
  x = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) x = fmaxf(x, shared.largest[i]);
  return x;
}

// Keys t[i] of those bits of `rows` are not finite.
__device__ inline void MarkKeys(uint32_t rows, const int (&t)[kHeld], ImageShared& shared) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (rows >> i & 1) atomicOr(&shared.not_finite[t[i] % 8 / 2], 1u << (t[i] / 8 * 2 + t[i] % 2));
  }
}

__device__ inline void StoreScale(ImageScale* to, float scale, const ImageShared& shared) {
  const uint32_t* const not_finite = shared.not_finite;
  if (threadIdx.x == 0) to->scale = scale;
  if (threadIdx.x == 0) to->any_not_finite = (not_finite[0] | not_finite[1] | not_finite[2] | not_finite[3]) != 0;
  if (threadIdx.x < kImageKeys / 32) to->not_finite[threadIdx.x] = not_finite[threadIdx.x];
}

// A thread's rows, as they came.
template <typename T>
struct Held {
  static constexpr uint32_t kInfinite = std::is_same_v<T, __half> ? 0x7c00 : 0x7e00; // kMost, or infinity
  uint4 raw[kHeld];

  // Starts all loads. Rows that don't exist, and columns, are zeros.
  template <class Rows>
  __device__ void Load(const Rows& rows, const int (&t)[kHeld], int count, int column, bool active) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) raw[i] = uint4{0, 0, 0, 0};
    rows.Each(t, active ? count : 0,
              [&](int i, const T* row) { raw[i] = __ldg(reinterpret_cast<const uint4*>(row + column)); });
  }

  // The largest magnitude's bits.
  __device__ uint32_t Largest() const {
    uint32_t two = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      two = __vmaxu2(__vmaxu2(two, raw[i].x & 0x7fff7fffu), raw[i].y & 0x7fff7fffu);
      two = __vmaxu2(__vmaxu2(two, raw[i].z & 0x7fff7fffu), raw[i].w & 0x7fff7fffu);
    }
    return max(two & 0xffff, two >> 16);
  }

  // Of those that are finite.
  __device__ uint32_t LargestFinite() const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kHeld * kColumns / 2; ++i) {
      const uint32_t two = reinterpret_cast<const uint32_t*>(raw)[i] & 0x7fff7fffu;
      if ((two & 0xffff) < kInfinite) largest = max(largest, two & 0xffff);
      if (two >> 16 < kInfinite) largest = max(largest, two >> 16);
    }
    return largest;
  }

  // Puts instead(c) in the place of each value of column c that is not finite; a bit for each row that had one.
  template <class Instead>
  __device__ uint32_t Replace(Instead&& instead) {
    uint32_t rows = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      uint32_t* const words = reinterpret_cast<uint32_t*>(&raw[i]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int shift = c % 2 * 16;
        if ((words[c / 2] >> shift & 0x7fff) < kInfinite) continue;
        words[c / 2] = (words[c / 2] & ~(0xffffu << shift)) | instead(c) << shift;
        rows |= 1u << i;
      }
    }
    return rows;
  }
};

template <typename T>
__device__ uint32_t BitsOf(float x) {
  const T value = FromFloat<T>(x);
  return *reinterpret_cast<const uint16_t*>(&value);
}

// Sixteen threads per row, which write its 128 bytes together.
template <typename T, class Rows>
__device__ void WriteK(const Rows& rows, int count, int head_dim, const float* centers, ImageShared& shared,
                       uint8_t* image, ImageScale* scale) {
  const int column = threadIdx.x % 16 * kColumns;
  int t[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) t[i] = threadIdx.x / 16 + 16 * i;
  Held<T> held;
  held.Load(rows, t, count, column, column < head_dim);
  GridWait(); // for the centers
  float center[kColumns];
  *reinterpret_cast<float4*>(center) = *reinterpret_cast<const float4*>(centers + column);
  *reinterpret_cast<float4*>(center + 4) = *reinterpret_cast<const float4*>(centers + column + 4);
  if (held.Largest() >= Held<T>::kInfinite) {
    MarkKeys(held.Replace([&](int c) { return BitsOf<T>(center[c]); }), t, shared);
  }
  float largest = kLeastK;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float x[kColumns];
    Unpack8<T>(held.raw[i], x);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (t[i] < count) largest = fmaxf(largest, fabsf(x[c] - center[c]));
    }
  }
  largest = LargestOf(largest, shared);
  const float inverse = __fdividef(127, largest);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) center[c] *= -inverse;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float x[kColumns];
    Unpack8<T>(held.raw[i], x);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = fmaf(x[c], inverse, center[c]);
    const uint2 packed{PackInt8(x[0], x[1], x[2], x[3]), PackInt8(x[4], x[5], x[6], x[7])};
    *reinterpret_cast<uint2*>(image + ImageOffset(t[i], column)) = t[i] < count ? packed : uint2{0, 0};
  }
  StoreScale(scale, largest * (1.0f / 127), shared);
}

// By what the largest value becomes one of e4m3's. base: the scale of the FP8 cache that the values come from, of which
// it is then the least power of two times that will do; 0: they don't.
__device__ inline float ScaleOfV(float largest, float base) {
  if (!(base > kLeastBase && base < kMostBase)) return largest * (1.0f / 448);
  const uint32_t ratio = __float_as_uint(__fdividef(largest, kMostE4M3 * base));
  return base * __uint_as_float((ratio + 0x7fffffu) & 0x7f800000u);
}

// Eight threads per half of a row. A thread's eight keys are two times four that stand together in V's rows. base: of
// ScaleOfV.
template <typename T, class Rows>
__device__ void WriteV(const Rows& rows, int count, int head_dim, bool means, float base, ImageShared& shared,
                       uint8_t* image, ImageScale* scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = warp % 2 * 64 + lane % 8 * kColumns, four = warp / 2 * 4 + lane / 8;
  int t[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) { // SlotOfKey of it is 4 (four + 16 (i / 4)) + i % 4
    t[i] = four / 4 * 16 + i / 4 * 64 + four % 4 * 2 + i % 4 / 2 * 8 + i % 2;
  }
  Held<T> held;
  held.Load(rows, t, count, column, column < head_dim);
  uint32_t most = held.Largest();
  if (most >= Held<T>::kInfinite) { // a mean that is not wanted must not reach a product; a value is to be no number
    most = held.LargestFinite();
    const uint32_t rows = held.Replace([&](int) { return means ? 0u : 0x7fffu; });
    if (means) MarkKeys(rows, t, shared);
  }
  float first[kColumns];
  Unpack8<T>(uint4{most, 0, 0, 0}, first);
  const float worth = ScaleOfV(LargestOf(fmaxf(first[0], kLeastV), shared), base), inverse = __fdividef(1, worth);
#pragma unroll
  for (int k = 0; k < kHeld / 4; ++k) {
    float x[4][kColumns];
#pragma unroll
    for (int i = 0; i < 4; ++i) Unpack8<T>(held.raw[4 * k + i], x[i]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shared.turned[(column + c) * kTurnPitch + four + 16 * k] =
          PackE4M3(x[0][c] * inverse, x[1][c] * inverse, x[2][c] * inverse, x[3][c] * inverse);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kImageBytes / 16 / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads, row = at / 8, piece = at % 8;
    const uint32_t* const from = shared.turned + row * kTurnPitch + piece * 4;
    *reinterpret_cast<uint4*>(image + ImageOffset(row, piece * 16)) = uint4{from[0], from[1], from[2], from[3]};
  }
  StoreScale(scale, worth, shared);
}

// The image of zeros, for tiles that see nothing.
__device__ void WriteZeros(const ImageSet& set, int64_t at) {
  for (int i = threadIdx.x; i < kImageBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(set.k + at * kImageBytes)[i] = uint4{0, 0, 0, 0};
    reinterpret_cast<uint4*>(set.v + at * kImageBytes)[i] = uint4{0, 0, 0, 0};
  }
  if (threadIdx.x == 0) set.k_scale[at] = set.v_scale[at] = ImageScale{1, 0, {}};
}

// Three CTAs per multiprocessor, at the price of some spilled registers: two without any took 6 % longer.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) ImageKernel(const __grid_constant__ ImageJobs jobs) {
  __shared__ ImageShared shared;
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
  const auto write = [&](const auto& rows) {
    if (of_v) {
      const float base =
          jobs.v_scale && !means ? jobs.v_scale[b * jobs.v_scale_stride[0] + head * jobs.v_scale_stride[1]] : 0;
      WriteV<T>(rows, count, p.head_dim, means, base, shared, set.v + at * kImageBytes, set.v_scale + at);
    } else {
      WriteK<T>(rows, count, p.head_dim, centers, shared, set.k + at * kImageBytes, set.k_scale + at);
    }
  };
  if (means) {
    const int64_t row = packed ? p.by_block(KeyBegin(p, b)) + b : int64_t{b} * p.mean_rows_each;
    const T* const from = static_cast<const T*>(of_v ? p.v_mean_data : p.k_mean_data) + head * p.mean_stride[2] +
                          (row + first) * p.mean_stride[1];
    write(LinearRows<T>{from, p.mean_stride[1]});
  } else if (p.page_size) {
    write(PagedRowsOf<T>(p, of_v, b, head, first));
  } else {
    write(LinearRowsOf<T>(p, of_v, b, head, first));
  }
}

template <typename T>
cudaError_t Launch(const ImageJobs& jobs, cudaStream_t stream) {
  CenterKernel<T><<<jobs.a.batch * jobs.a.kv_heads, kCenterThreads, 0, stream>>>(jobs);
  if (cudaError_t e = cudaGetLastError()) return e;
  const int64_t grid = 2 * (int64_t{jobs.key_units} + jobs.mean_units + 1);
  return LaunchOverlapped(ImageKernel<T>, true, grid, kThreads, 0, stream, jobs);
}

} // namespace

cudaError_t LaunchImages(const AttendArgs& args, const Images& images, const Problem& p, cudaStream_t stream) {
  ImageJobs jobs{};
  jobs.a = args;
  jobs.images = images;
  jobs.v_scale = p.v_scale;
  for (int i = 0; i < 2; ++i) jobs.v_scale_stride[i] = p.v_scale_stride[i];
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
  return p.v.dtype == FP_BF16 ? Launch<__nv_bfloat16>(jobs, stream) : Launch<__half>(jobs, stream);
}

} // namespace flashprefill::cuda
