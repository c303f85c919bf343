// Tile images byte by byte, and products over them, against plain loops on the host. What test_eight_bit.py cannot tell
// apart, this does: a wrong byte of an image, a wrong descriptor, a wrong order of weights.
//
//     nvcc -std=c++20 -O2 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I src -I include -o
//     images_check
//         tests/cuda/images_check.cu src/cuda/sm90/attend_8bit/images.cu src/cuda/common/attend/start.cu &&
//         ./images_check
//
// Prints a line per check and returns the number of those that failed.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/common/attend/args.h"
#include "cuda/common/attend/images.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/wgmma.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kHeads = 2;
int failed = 0;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(100);
}

void Say(const std::string& what, int wrong, int of) {
  std::printf("%-64s %s (%d of %d wrong)\n", what.c_str(), wrong ? "FAILED" : "ok", wrong, of);
  failed += wrong != 0;
}

template <class T>
T* Device(const std::vector<T>& host) {
  T* device;
  Check(cudaMalloc(&device, host.size() * sizeof(T)));
  Check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}
template <class T>
std::vector<T> Host(const T* device, size_t count) {
  std::vector<T> host(count);
  Check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

float FromE4M3(uint8_t x) {
  __nv_fp8_e4m3 value;
  value.__x = x;
  return static_cast<float>(value);
}

// Byte of row r, column c with the 128-byte swizzle, written out as the hardware's manual has it: address bits 4 to 6
// are xor'ed with bits 7 to 9.
int Swizzled(int row, int column) {
  const int address = row * 128 + column;
  return address ^ ((address >> 7 & 7) << 4);
}

// The keys of a row of V's image in the order of its slots, from the layouts of a product's registers: lane t of four
// holds of the scores columns 8 g + 2 t and the next, packs those of two groups g together, and A's register h of the
// row is columns 16 h + 4 t to 16 h + 4 t + 3.
std::vector<int> KeysOfSlots() {
  std::vector<int> key(kImageKeys);
  for (int slice = 0; slice < 4; ++slice) {
    for (int h = 0; h < 2; ++h) {
      for (int t = 0; t < 4; ++t) {
        for (int byte = 0; byte < 4; ++byte) {
          const int group = slice * 4 + h * 2 + byte / 2;
          key[slice * 32 + h * 16 + t * 4 + byte] = group * 8 + t * 2 + byte % 2;
        }
      }
    }
  }
  return key;
}

// A problem of one sequence, contiguous or in pages of 5 in reverse order, with a value here and there that is none.
// scale: of the FP8 cache whose numbers the values are then, or 0.
struct Inputs {
  int keys, dim, page;
  std::vector<__nv_bfloat16> k, v; // [keys, kHeads, dim] by position
  AttendArgs args{};
  Images images;

  float At(const std::vector<__nv_bfloat16>& x, int key, int head, int column) const {
    return __bfloat162float(x[(static_cast<size_t>(key) * kHeads + head) * dim + column]);
  }

  float scale;

  Inputs(int keys_, int dim_, int page_, bool wild, float scale_ = 0)
      : keys(keys_), dim(dim_), page(page_), scale(scale_) {
    std::mt19937 random(static_cast<unsigned>(keys * 1000 + dim + page));
    std::normal_distribution<float> normal;
    const size_t count = static_cast<size_t>(keys) * kHeads * dim;
    for (auto* x : {&k, &v}) {
      for (size_t i = 0; i < count; ++i) x->push_back(__float2bfloat16(normal(random) + (x == &k ? 2.0f : 0.0f)));
    }
    for (size_t i = 0; scale != 0 && i < count; ++i) {
      const float number = FromE4M3(static_cast<uint8_t>(random()));
      v[i] = __float2bfloat16((std::isnan(number) ? 1 : number) * scale);
    }
    if (wild) {
      k[(static_cast<size_t>(130) * kHeads + 1) * dim + 3] = __float2bfloat16(NAN);
      k[(static_cast<size_t>(7) * kHeads + 0) * dim + 60] = __float2bfloat16(INFINITY);
      v[(static_cast<size_t>(131) * kHeads + 1) * dim + 4] = __float2bfloat16(NAN);
      for (int t = 0; t < keys; ++t) v[(static_cast<size_t>(t) * kHeads) * dim + 9] = __float2bfloat16(6e4f);
    }
    args.batch = 1;
    args.kv_heads = kHeads;
    args.head_dim = dim;
    args.block_size = 128;
    args.max_k = args.total_k = keys;
    args.by_block = Divider::Of(128);
    args.by_page = Divider::Of(std::max(1, page));
    const int pages = page ? (keys + page - 1) / page : 0;
    std::vector<__nv_bfloat16> laid[2] = {k, v};
    if (page) {
      std::vector<int32_t> table;
      for (int i = 0; i < pages; ++i) table.push_back(pages - 1 - i);
      for (int which = 0; which < 2; ++which) {
        laid[which].assign(static_cast<size_t>(pages) * page * kHeads * dim, __float2bfloat16(NAN));
        for (int t = 0; t < keys; ++t) {
          const size_t to = static_cast<size_t>(table[t / page]) * page + t % page;
          std::memcpy(&laid[which][to * kHeads * dim], &(which ? v : k)[static_cast<size_t>(t) * kHeads * dim],
                      kHeads * dim * 2);
        }
      }
      args.block_table = Device(table);
      args.page_size = page;
      args.page_count = args.pages_per_seq = pages;
      args.block_table_stride = pages;
    }
    args.k_data = Device(laid[0]);
    args.v_data = Device(laid[1]);
    const int64_t stride[3] = {page ? int64_t{page} * kHeads * dim : int64_t{keys} * kHeads * dim, kHeads * dim, dim};
    for (int i = 0; i < 3; ++i) args.k_stride[i] = args.v_stride[i] = stride[i];

    Problem p{};
    p.batch = 1;
    p.kv_heads = kHeads;
    p.head_dim = dim;
    p.max_seqlen_k = keys;
    p.v.dtype = FP_BF16;
    if (scale != 0) p.v_scale = Device(std::vector<float>{scale});
    Workspace size(nullptr);
    Images::Take(size, p, 128, false);
    std::byte* memory;
    Check(cudaMalloc(&memory, size.used()));
    Check(cudaMemset(memory, 0xa5, size.used()));
    Workspace workspace(memory);
    images = Images::Take(workspace, p, 128, false);
    Check(LaunchImages(args, images, p, nullptr));
    Check(cudaDeviceSynchronize());
  }
};

void CheckBytes(const Inputs& in) {
  const std::string name = std::to_string(in.keys) + " keys, head_dim " + std::to_string(in.dim) + ", pages of " +
                           std::to_string(in.page) + ": ";
  const int64_t rows = in.images.keys.rows, count = kHeads * rows + 1;
  const auto k = Host(in.images.keys.k, count * kImageBytes), v = Host(in.images.keys.v, count * kImageBytes);
  const auto k_scale = Host(in.images.keys.k_scale, count), v_scale = Host(in.images.keys.v_scale, count);
  const auto center = Host(in.images.centers, kHeads * kImageColumns);
  const std::vector<int> key_of = KeysOfSlots();
  int wrong_k = 0, wrong_v = 0, wrong_bits = 0, wrong_order = 0, wrong_scale = 0, all = 0;
  for (int slot = 0; slot < kImageKeys; ++slot) wrong_order += SlotOfKey(key_of[slot]) != slot;
  for (int head = 0; head < kHeads; ++head) {
    for (int image = 0; image < (in.keys + 127) / 128; ++image) {
      const int64_t at = head * rows + image;
      float largest_k = 0, largest_v = 0;
      for (int t = 0; t < kImageKeys; ++t) {
        const int key = image * kImageKeys + t;
        bool finite = true;
        for (int d = 0; d < kImageColumns; ++d, ++all) {
          const bool there = key < in.keys && d < in.dim;
          const float x = there ? in.At(in.k, key, head, d) - center[head * kImageColumns + d] : 0;
          const float got =
              static_cast<float>(static_cast<int8_t>(k[at * kImageBytes + Swizzled(t, d)])) * k_scale[at].scale;
          finite &= std::isfinite(x);
          if (std::isfinite(x)) largest_k = std::max(largest_k, std::fabs(x));
          const float want = std::isfinite(x) ? x : 0;
          wrong_k += !(std::fabs(got - want) <= 0.5001f * k_scale[at].scale);
        }
        const bool bit = k_scale[at].not_finite[t % 8 / 2] >> (t / 8 * 2 + t % 2) & 1;
        wrong_bits += bit != !finite || (bit && !k_scale[at].any_not_finite);
      }
      for (int d = 0; d < kImageColumns; ++d) {
        for (int slot = 0; slot < kImageKeys; ++slot) {
          const int key = image * kImageKeys + key_of[slot];
          const float want = key < in.keys && d < in.dim ? in.At(in.v, key, head, d) : 0;
          const float got = FromE4M3(v[at * kImageBytes + Swizzled(d, slot)]) * v_scale[at].scale;
          if (std::isfinite(want)) largest_v = std::max(largest_v, std::fabs(want));
          // The cache's own numbers are kept, but for bf16's rounding of them times their scale.
          const float rounded = std::fabs(want) / (in.scale != 0 ? 250.0f : 15.9f);
          const float allowed = std::max(rounded, in.scale != 0 ? 0 : v_scale[at].scale * 0x1p-10f * 1.001f);
          wrong_v += std::isnan(want) ? !std::isnan(got) : !(std::fabs(got - want) <= allowed);
        }
      }
      wrong_scale += std::fabs(k_scale[at].scale - largest_k / 127) > 1e-5f * k_scale[at].scale;
      if (in.scale == 0) {
        wrong_scale += std::fabs(v_scale[at].scale - largest_v / 448) > 1e-5f * v_scale[at].scale;
      } else {
        const float power = std::log2(v_scale[at].scale / in.scale);
        wrong_scale += std::fabs(power - std::round(power)) > 1e-5f;
        wrong_scale += largest_v > 460.01f * v_scale[at].scale || largest_v < 229.9f * v_scale[at].scale;
      }
    }
  }
  int wrong_zero = 0;
  for (int i = 0; i < kImageBytes; ++i)
    wrong_zero += k[(count - 1) * kImageBytes + i] || v[(count - 1) * kImageBytes + i];
  Say(name + "bytes of K", wrong_k, all);
  Say(name + "bytes of V", wrong_v, all);
  Say(name + "keys that are not finite", wrong_bits, all / kImageColumns);
  Say(name + "scales", wrong_scale, 4 * kHeads);
  Say(name + "the order of slots, the image of zeros", wrong_order + wrong_zero, kImageKeys + kImageBytes);
}

// One warpgroup: S = A K^T over int8 rows that lie as an image, from the beginning that makes them floats; then O = P V
// with weights (row + key) % 8, in the order in which the kernel holds them.
__global__ void Products(const uint8_t* a, const uint8_t* k, const uint8_t* v, int32_t* s_out, float* o_out) {
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = AlignedShared(raw);
  for (int i = static_cast<int>(threadIdx.x); i < kImageBytes / 16; i += 128) {
    if (i < kImageBytes / 32) reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(a)[i];
    reinterpret_cast<uint4*>(shared + kImageBytes)[i] = reinterpret_cast<const uint4*>(k)[i];
    reinterpret_cast<uint4*>(shared + 2 * kImageBytes)[i] = reinterpret_cast<const uint4*>(v)[i];
  }
  FenceAsyncProxy();
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32), row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  int32_t s[64];
  float o[64];
  for (int32_t& x : s) x = 0x4b400000;
  const uint64_t q = DescribeKMajor(SharedAddress(shared)), of_k = DescribeKMajor(SharedAddress(shared + kImageBytes)),
                 of_v = DescribeKMajor(SharedAddress(shared + 2 * kImageBytes));
  WgmmaFence();
#pragma unroll
  for (int i = 0; i < 4; ++i) WgmmaInt8::SS(s, q + 2 * i, of_k + 2 * i, 1);
  WgmmaCommit();
  WgmmaWait<0>();
  KeepInPlace(s);
  uint32_t weights[16];
#pragma unroll
  for (int i = 0; i < 8; ++i) { // 16 keys
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float e[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = i * 16 + c / 2 * 8 + lane % 4 * 2 + c % 2;
        e[c] = static_cast<float>((row + 8 * r + key) % 8);
      }
      weights[2 * i + r] = PackE4M3(e[0], e[1], e[2], e[3]);
    }
  }
  WgmmaFence();
#pragma unroll
  for (int i = 0; i < 4; ++i) WgmmaE4M3::RS(o, weights + 4 * i, of_v + 2 * i, i > 0);
  WgmmaCommit();
  WgmmaWait<0>();
  KeepInPlace(o);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int at = (row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    s_out[at] = s[i];
    o_out[at] = o[i];
  }
}

void CheckProducts(const Inputs& in) {
  std::vector<uint8_t> a(kImageBytes / 2);
  std::mt19937 random(5);
  std::vector<int> integers(64 * 128);
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 128; ++c) {
      const int x = r == 0 ? 127 : r == 1 ? -127 : static_cast<int>(random() % 255) - 127;
      integers[r * 128 + c] = x;
      a[Swizzled(r, c)] = static_cast<uint8_t>(static_cast<int8_t>(x));
    }
  }
  const auto k = Host(in.images.keys.k, kImageBytes), v = Host(in.images.keys.v, kImageBytes);
  int32_t* s;
  float* o;
  Check(cudaMalloc(&s, 64 * 128 * 4));
  Check(cudaMalloc(&o, 64 * 128 * 4));
  const int bytes = 3 * kImageBytes + kOperandAlign;
  Check(cudaFuncSetAttribute(reinterpret_cast<const void*>(Products), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             bytes));
  Products<<<1, 128, bytes>>>(Device(a), in.images.keys.k, in.images.keys.v, s, o);
  Check(cudaGetLastError());
  Check(cudaDeviceSynchronize());
  const auto got_s = Host(s, 64 * 128);
  const auto got_o = Host(o, 64 * 128);
  const std::vector<int> key_of = KeysOfSlots();
  int wrong_s = 0, wrong_o = 0;
  for (int r = 0; r < 64; ++r) {
    for (int n = 0; n < 128; ++n) {
      int sum = 0;
      for (int c = 0; c < 128; ++c) sum += integers[r * 128 + c] * static_cast<int8_t>(k[Swizzled(n, c)]);
      float as_float;
      std::memcpy(&as_float, &got_s[r * 128 + n], 4);
      wrong_s += as_float - 12582912.0f != static_cast<float>(sum);
      double value = 0, size = 0;
      for (int slot = 0; slot < 128; ++slot) {
        const double term = (r + key_of[slot]) % 8 * static_cast<double>(FromE4M3(v[Swizzled(n, slot)]));
        value += term;
        size += std::fabs(term);
      }
      wrong_o += !(std::fabs(got_o[r * 128 + n] - value) <= size * 2e-3 + 1e-6);
    }
  }
  Say("S in int8, read as floats less 1.5 * 2^23", wrong_s, 64 * 128);
  Say("O of e4m3 weights from registers", wrong_o, 64 * 128);
}

int Main() {
  CheckBytes(Inputs(300, 128, 0, false));
  CheckBytes(Inputs(300, 128, 0, true));
  CheckBytes(Inputs(257, 80, 5, true));
  CheckBytes(Inputs(1, 96, 1, false));
  CheckBytes(Inputs(200, 128, 0, false, 0.37f));
  CheckProducts(Inputs(300, 128, 0, false));
  return failed;
}

} // namespace
} // namespace flashprefill::cuda

int main() { return flashprefill::cuda::Main(); }
