// From sums to the choice of verticals and slashes: FlexPrefill's budgets, pattern and best blocks, MInference's best
// tokens. Nothing is sorted (radix_threshold.cuh), and of values that tie the first by index win. The sums of a head by
// token are the work of a cluster of CTAs for verticals and one for slashes, each with a part of the tokens: every one
// of them adds up the bins of all, so they come to the same threshold without telling each other. Sums by block are one
// CTA's.
#include <cooperative_groups.h>

#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/radix_threshold.cuh"
#include "cuda/common/vertical_slash/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRanks = 8; // CTAs of a cluster: at 128K tokens and 32 heads, four for each multiprocessor
constexpr int kSlice = kRadixBins / kRanks; // bins that a CTA of a cluster adds up
constexpr int kColumns = 8;                 // of a lane: 16 bytes
constexpr int kCopies = 2;                  // of bins: neighbouring lanes add to different ones
constexpr int kBudgetTokens = 128; // tokens that FlexPrefill's authors take for a block's, whatever the block size

// A head's sums. Diagonals by their index from the far end.
struct SumsReader {
  const VerticalSlashShape& a;
  const float *column, *diagonal; // of the sequence's first slot and the head's first part
  int64_t part_slots;

  __device__ SumsReader(const VerticalSlashShape& shape, const float* columns, const float* diagonals,
                        const DeviceSequence& s, int head)
      : a(shape), part_slots(shape.slot_count) {
    const int64_t slot = int64_t{head} * a.parts * part_slots + SlotBase(a, s.index);
    column = columns + slot * a.chunk;
    diagonal = diagonals + slot * (a.chunk + a.columns);
  }

  __device__ float Vertical(int t) const {
    float sum = column[t];
    for (int part = 1; part < a.parts; ++part) sum += column[part * part_slots * a.chunk + t];
    return sum;
  }

  __device__ float Slash(int t) const {
    float sum = 0;
    for (int part = 0; part < a.parts && t >= 0; ++part, t -= a.columns) {
      const int chunk = a.by_chunk(t), within = t - chunk * a.chunk;
      const float* const from = diagonal + (part * part_slots + chunk) * (a.chunk + a.columns) + within;
      sum += from[0];
      if (within < a.columns && chunk > 0) sum += from[-a.columns]; // the chunk before this one's share of it
    }
    return sum;
  }
};

struct ChoiceShared {
  RadixBins bins[kCopies];
  RadixScan<kThreads> scan;
  RadixThreshold threshold;
  int ties[kWarps], own_ties;
  double sum[kWarps];
  // Of a cluster: what each of kThreads / kSlice threads a bin has added up, and this CTA's bins of all CTAs.
  uint32_t part_count[kThreads / kSlice][kSlice], slice_count[kSlice];
  uint64_t part_rest[kThreads / kSlice][kSlice], slice_rest[kSlice];
};

// The RANKS CTAs that share a set of values.
// Clusters are Hopper's and later: code for other GPUs is never launched with more than one (ManyTokens).
template <int RANKS>
struct Ranks {
#if __CUDA_ARCH__ >= 900
  static constexpr bool kClusters = RANKS > 1;
#else
  static constexpr bool kClusters = false;
#endif
  static __device__ void Sync() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kClusters) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  static __device__ int Own() { return kClusters ? blockIdx.x % RANKS : 0; }
  static __device__ ChoiceShared& SharedOf(ChoiceShared& own, int rank) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kClusters) return *cooperative_groups::this_cluster().map_shared_rank(&own, rank);
#endif
    return own;
  }
};

// The CTA's slice of the bins of all CTAs, between two barriers of the cluster. Each begins with its own: from one CTA
// at a time they would come a good deal more slowly.
template <int RANKS>
__device__ void AddUpSlice(ChoiceShared& shared) {
  constexpr int kEach = RANKS * kSlice / kThreads; // CTAs that a thread reads a bin of
  const int own = Ranks<RANKS>::Own(), bin = threadIdx.x % kSlice, part = threadIdx.x / kSlice;
  Ranks<RANKS>::Sync();
  uint32_t count = 0;
  uint64_t rest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const RadixBins& bins = Ranks<RANKS>::SharedOf(shared, (own + part * kEach + i) % RANKS).bins[0];
    count += bins.count[own * kSlice + bin];
    rest += (uint64_t{bins.high[own * kSlice + bin]} << 10) + bins.low[own * kSlice + bin];
  }
  shared.part_count[part][bin] = count;
  shared.part_rest[part][bin] = rest;
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int i = 1; i < kThreads / kSlice; ++i) count += shared.part_count[i][bin], rest += shared.part_rest[i][bin];
    shared.slice_count[bin] = count;
    shared.slice_rest[bin] = rest;
  }
  Ranks<RANKS>::Sync();
}

// Of values [first, n), those that sum to at most `limit`, or number as many, largest first. This CTA looks at those in
// [begin, end).
template <int RANKS, typename Value>
__device__ void FindThreshold(ChoiceShared& shared, int begin, int end, bool by_number, double limit, Value&& value) {
  if (threadIdx.x == 0) shared.threshold = RadixThreshold::Start();
  for (int level = 0; level < kRadixLevels; ++level) {
    for (int i = threadIdx.x; i < kRadixBins; i += kThreads) {
#pragma unroll
      for (RadixBins& bins : shared.bins) bins.count[i] = bins.low[i] = bins.high[i] = 0;
    }
    __syncthreads();
    const uint32_t prefix = shared.threshold.prefix;
    RadixBins& mine = shared.bins[threadIdx.x % kCopies];
#pragma unroll 4
    for (int i = begin + threadIdx.x; i < end; i += kThreads) AddToBins(mine, level, prefix, RadixOrder(value(i)));
    __syncthreads();
    RadixBins& bins = shared.bins[0];
    for (int i = threadIdx.x; i < kRadixBins; i += kThreads) {
#pragma unroll
      for (int copy = 1; copy < kCopies; ++copy) {
        bins.count[i] += shared.bins[copy].count[i];
        bins.low[i] += shared.bins[copy].low[i];
        bins.high[i] += shared.bins[copy].high[i];
      }
    }
    if constexpr (RANKS > 1) {
      AddUpSlice<RANKS>(shared);
    } else {
      __syncthreads();
    }
    Descend<kThreads>(shared.threshold, level, limit, shared.scan, [&](int digit, uint32_t& count, double& mass) {
      uint64_t rest;
      if constexpr (RANKS > 1) {
        const ChoiceShared& owner = Ranks<RANKS>::SharedOf(shared, digit / kSlice);
        count = owner.slice_count[digit % kSlice];
        rest = owner.slice_rest[digit % kSlice];
      } else {
        count = bins.count[digit];
        rest = (uint64_t{bins.high[digit]} << 10) + bins.low[digit];
      }
      mass = by_number ? static_cast<double>(count) : MassOfBin(level, prefix, digit, count, rest);
    });
    if (!shared.threshold.passes) break;
  }
  Ranks<RANKS>::Sync(); // others read this CTA's slice
}

// The part of n values that a CTA looks at, in whole words of bits.
struct Part {
  int begin, end;

  __device__ Part(int n, int rank, int ranks) {
    const int each = (n + 32 * ranks - 1) / (32 * ranks) * 32;
    begin = min(rank * each, n);
    end = min(begin + each, n);
  }
};

// Bits of the `count` largest of n values. Those below `forced` come before all others.
template <int RANKS, typename Value>
__device__ void WriteLargest(ChoiceShared& shared, int n, int forced, int count, uint32_t* bits, Value&& value) {
  const int others = max(0, count - forced), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Part part(n, Ranks<RANKS>::Own(), RANKS);
  FindThreshold<RANKS>(shared, max(part.begin, forced), part.end, true, others, value);
  const RadixThreshold threshold = shared.threshold;
  auto is_tie = [&](int i) { return i >= forced && RadixOrder(value(i)) == threshold.prefix; };
  int ties = threshold.passes ? static_cast<int>(threshold.Equal(others, true)) : 0;
  if (RANKS > 1 && ties > 0) { // the CTAs before this one have the first of them
    if (threadIdx.x == 0) shared.own_ties = 0;
    __syncthreads();
    int own = 0;
    for (int i = part.begin + threadIdx.x; i < part.end; i += kThreads) own += is_tie(i);
    atomicAdd(&shared.own_ties, own);
    Ranks<RANKS>::Sync();
    for (int rank = 0; rank < Ranks<RANKS>::Own(); ++rank) ties -= Ranks<RANKS>::SharedOf(shared, rank).own_ties;
    Ranks<RANKS>::Sync();
  }
  for (int begin = part.begin; begin < part.end; begin += kThreads) {
    const int i = begin + threadIdx.x;
    bool in = false, tie = false;
    if (i < part.end) {
      const uint32_t order = i < forced ? 0 : RadixOrder(value(i));
      in = i < forced ? i < count : !threshold.passes || order > threshold.prefix;
      tie = i >= forced && !in && order == threshold.prefix;
    }
    if (ties > 0) {
      const uint32_t equal = __ballot_sync(~0u, tie);
      if (lane == 0) shared.ties[warp] = __popc(equal);
      __syncthreads();
      int before = __popc(equal & ((1u << lane) - 1)), all = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.ties[w];
        all += shared.ties[w];
      }
      in |= tie && before < ties;
      ties -= all;
      __syncthreads();
    }
    const uint32_t word = __ballot_sync(~0u, in);
    if (lane == 0 && begin + 32 * warp < part.end) bits[begin / 32 + warp] = word;
  }
}

// The sum of one value a thread, in the same order every time; all threads get it.
__device__ double SumOfAll(ChoiceShared& shared, double x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared.sum[w];
  __syncthreads();
  return sum;
}

__device__ inline bool Place(const VerticalSlashShape& a, DeviceSequence& s) {
  s = SequenceAt(a.d, blockIdx.y);
  return !KeepsEverything(a, s);
}

// Sums of verticals or slashes by block, and the number of blocks of the tokens that hold gamma.
template <int RANKS>
__global__ void __launch_bounds__(kThreads, 2) BudgetKernel(const __grid_constant__ BlockChoiceArgs args) {
  __shared__ ChoiceShared shared;
  const VerticalSlashShape& a = args.shape;
  DeviceSequence s;
  if (!Place(a, s)) return;
  const int line = blockIdx.x / RANKS, rank = blockIdx.x % RANKS;
  const int head = line / 2, n = s.k_len, blocks = s.Blocks(a.rules), size = a.rules.block_size;
  const bool by_distance = line % 2;
  const int64_t index = s.index * a.d.p.q_heads + head;
  const SumsReader reader(a, args.vertical_sums, args.slash_sums, s, head);
  auto value = [&](int t) { return by_distance ? reader.Slash(t) : reader.Vertical(t); };

  // A distance belongs to the block in which the last row finds it; with both covers, to floor(distance / B).
  float* const by_block = args.by_block + (index * 3 + by_distance) * args.block_room;
  for (int b = rank * kWarps + threadIdx.x / 32; b < blocks; b += RANKS * kWarps) {
    const bool nearest_first = by_distance && args.cover_both;
    const int end = min((b + 1) * size, n);
    float sum = 0;
#pragma unroll 4
    for (int t = b * size + threadIdx.x % 32; t < end; t += 32) sum += value(nearest_first ? n - 1 - t : t);
    sum = WarpSum(sum);
    if (threadIdx.x % 32 == 0) by_block[by_distance && !args.cover_both ? blocks - 1 - b : b] = sum;
  }

  int tokens = n;
  if (args.gamma < 1) {
    const Part part(n, rank, RANKS);
    FindThreshold<RANKS>(shared, part.begin, part.end, false, args.gamma, value);
    const RadixThreshold& threshold = shared.threshold;
    tokens = (threshold.passes ? static_cast<int>(threshold.above + threshold.Equal(args.gamma, false)) : n) + 1;
  }
  if (threadIdx.x == 0 && rank == 0) {
    const int most = args.most_blocks == 0 ? blocks : min(blocks, args.most_blocks);
    args.budget[index * 2 + by_distance] = min(max(tokens / kBudgetTokens + 1, args.least_blocks), most);
  }
}

// Whether pooled keys predict the verticals: the Jensen-Shannon distance of the two is below tau.
template <typename T>
__device__ bool IsQueryAware(const BlockChoiceArgs& args, ChoiceShared& shared, float (&partial)[kThreads / 256][256],
                             const DeviceSequence& s, int head, const float* by_column, float* logits) {
  const VerticalSlashShape& a = args.shape;
  const Problem& p = a.d.p;
  const int rows = min(a.rules.block_size, s.q_len), blocks = s.Blocks(a.rules);
  const int kv = head / (p.q_heads / p.kv_heads), lane = threadIdx.x % 32;
  const int column = threadIdx.x % 256, part = threadIdx.x / 256;
  float sum = 0;
  if (column < p.head_dim) {
    const T* const from = static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, s, s.q_len - rows, head);
#pragma unroll 8
    for (int i = part; i < rows; i += kThreads / 256) sum += ToFloat(from[i * p.q.stride[1] + column]);
  }
  partial[part][column] = sum;
  __syncthreads();
  if (part == 0) {
    sum = partial[0][column] + partial[1][column];
    partial[0][column] = ToFloat(T(__fdiv_rn(sum, static_cast<float>(rows)))); // rounded once
  }
  __syncthreads();

  const int64_t base = kv * args.mean_rows + MeanBase(p, s, a.rules.block_size);
  const T* const means = static_cast<const T*>(args.k_means) + base * args.pitch;
  // Several lanes per row, 16 bytes each; several rows are on their way before the first is used.
  constexpr int kInFlight = 4;
  int lanes = 4;
  while (lanes * kColumns < p.head_dim) lanes *= 2;
  const int part_of_row = lane % lanes * kColumns, rows_per_step = kThreads / lanes;
  const bool active = part_of_row < p.head_dim;
  float query[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) query[k] = active ? partial[0][part_of_row + k] : 0.f;
  float largest = -INFINITY;
  for (int begin = 0; begin < blocks; begin += kInFlight * rows_per_step) {
    uint4 raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int c = begin + i * rows_per_step + threadIdx.x / lanes;
      raw[i] = active && c < blocks ? *reinterpret_cast<const uint4*>(means + int64_t{c} * args.pitch + part_of_row)
                                    : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int c = begin + i * rows_per_step + threadIdx.x / lanes;
      const T* const key = reinterpret_cast<const T*>(&raw[i]);
      float z = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) z += query[k] * ToFloat(key[k]);
      for (int offset = lanes / 2; offset; offset /= 2) z += __shfl_xor_sync(~0u, z, offset);
      z = fabsf(z) < INFINITY ? z * p.softmax_scale : -INFINITY;
      if (c >= blocks) continue;
      if (part_of_row == 0) logits[c] = z;
      largest = fmaxf(largest, z);
    }
  }
  largest = WarpMax(largest);
  __syncthreads();
  if (lane == 0) partial[0][threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, partial[0][w]);
  double total = 0, divergence = 0;
  auto share = [&](int c) { return largest > -INFINITY ? expf(logits[c] - largest) : 0.f; };
  for (int c = threadIdx.x; c < blocks; c += kThreads) total += share(c);
  total = SumOfAll(shared, total);
  for (int c = threadIdx.x; c < blocks; c += kThreads) {
    const float predicted = total > 0 ? static_cast<float>(share(c) / total) : 0.f, found = by_column[c];
    const float middle = (predicted + found) / 2;
    if (predicted > 0) divergence += predicted * logf(predicted / middle) / 2; // 0 ln 0 = 0
    if (found > 0) divergence += found * logf(found / middle) / 2;
  }
  divergence = SumOfAll(shared, divergence);
  return sqrt(fmax(divergence, 0.0)) < args.tau;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) ChooseBlocksKernel(const __grid_constant__ BlockChoiceArgs args) {
  __shared__ ChoiceShared shared;
  __shared__ float partial[kThreads / 256][256];
  const VerticalSlashShape& a = args.shape;
  DeviceSequence s;
  if (!Place(a, s)) return;
  const int head = blockIdx.x, blocks = s.Blocks(a.rules);
  const int64_t index = s.index * a.d.p.q_heads + head;
  float* const by_block = args.by_block + index * 3 * args.block_room;
  const bool aware =
      args.tau > 0 && IsQueryAware<T>(args, shared, partial, s, head, by_block, by_block + 2 * args.block_room);
  if (threadIdx.x == 0) args.aware[index] = aware;
  for (int which = 0; which < 2; ++which) {
    const int budget = aware ? min(args.least_blocks, blocks) : args.budget[index * 2 + which];
    uint32_t* const bits = which == 0 ? args.choice.verticals + index * 2 * args.choice.words
                                      : args.choice.slashes + index * args.choice.slash_words;
    const float* const values = by_block + which * args.block_room;
    WriteLargest<1>(shared, blocks, 1, budget, bits, [&](int i) { return values[i]; });
    __syncthreads();
  }
}

template <int RANKS>
__global__ void __launch_bounds__(kThreads, 2) ChooseTokensKernel(const __grid_constant__ TokenChoiceArgs args) {
  __shared__ ChoiceShared shared;
  const VerticalSlashShape& a = args.shape;
  DeviceSequence s;
  if (!Place(a, s)) return;
  const int line = blockIdx.x / RANKS, rank = blockIdx.x % RANKS;
  const int head = line / 2, n = s.k_len, own = args.table ? head : 0;
  if (TestBit(args.skipped, head % kMaxTableHeads)) return;
  const int64_t index = s.index * a.d.p.q_heads + head;
  const SumsReader reader(a, args.vertical_sums, args.slash_sums, s, head);
  const int size = a.rules.block_size, blocks = s.Blocks(a.rules);
  // The bits of a set of `count` things that body tells of, by all CTAs.
  auto write = [&](int count, uint32_t* to, auto&& body) {
    for (int begin = rank * kThreads; begin < count; begin += RANKS * kThreads) {
      const int i = begin + threadIdx.x;
      const uint32_t word = __ballot_sync(~0u, i < count && body(i));
      if (threadIdx.x % 32 == 0 && i < count) to[i / 32] = word;
    }
  };

  if (line % 2 == 0) {
    uint32_t* const tokens = args.vertical_tokens + index * args.token_words;
    WriteLargest<RANKS>(shared, n, args.first_verticals, args.verticals[own], tokens,
                        [&](int t) { return reader.Vertical(t); });
    Ranks<RANKS>::Sync(); // makes the cluster's words visible to it
    write(blocks, args.choice.verticals + index * 2 * args.choice.words,
          [&](int b) { return AnyBit(tokens, b * size, min((b + 1) * size, n) - 1); });
    return;
  }
  uint32_t* const tokens = args.slash_tokens + index * args.token_words;
  WriteLargest<RANKS>(shared, n, args.near_slashes, args.slashes[own], tokens,
                      [&](int distance) { return reader.Slash(n - 1 - distance); });
  Ranks<RANKS>::Sync();
  // A whole tile whose first position is x crosses a block that begins at y by distances x - y - (B - 1) .. x - y +
  // 127.
  const int step = args.phase_step, rest = s.prefix % step;
  for (int phase = 0; phase < size / step; ++phase) {
    uint32_t* const to = args.choice.slashes + (index * (size / step) + phase) * args.choice.slash_words;
    write(blocks + kCrossingsBefore, to, [&](int i) {
      const int apart = (i - kCrossingsBefore) * size + phase * step + rest;
      return apart > -kTileRows && AnyBit(tokens, max(0, apart - size + 1), min(apart + kTileRows, n) - 1);
    });
  }
}

// Whether a head's tokens are worth a cluster, whose barriers cost some microseconds a level, and there are clusters.
bool ManyTokens(const Problem& p) { return p.max_seqlen_k > 32768 && GridsOverlap(); }

// A launch in clusters of RANKS CTAs along x.
template <int RANKS, typename Args>
cudaError_t LaunchClusters(void (*kernel)(Args), unsigned lines, unsigned batch, cudaStream_t stream,
                           const Args& args) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = RANKS;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(RANKS * lines, batch);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = RANKS > 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

} // namespace

cudaError_t LaunchBlockChoice(const BlockChoiceArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  const unsigned heads = static_cast<unsigned>(p.q_heads), batch = static_cast<unsigned>(p.batch);
  const cudaError_t error = ManyTokens(p) ? LaunchClusters<kRanks>(BudgetKernel<kRanks>, 2 * heads, batch, stream, args)
                                          : LaunchClusters<1>(BudgetKernel<1>, 2 * heads, batch, stream, args);
  if (error) return error;
  if (p.q.dtype == FP_BF16) {
    ChooseBlocksKernel<__nv_bfloat16><<<dim3(heads, batch), kThreads, 0, stream>>>(args);
  } else {
    ChooseBlocksKernel<__half><<<dim3(heads, batch), kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchTokenChoice(const TokenChoiceArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  const unsigned heads = static_cast<unsigned>(p.q_heads), batch = static_cast<unsigned>(p.batch);
  return ManyTokens(p) ? LaunchClusters<kRanks>(ChooseTokensKernel<kRanks>, 2 * heads, batch, stream, args)
                       : LaunchClusters<1>(ChooseTokensKernel<1>, 2 * heads, batch, stream, args);
}

} // namespace flashprefill::cuda
