// What the audited rows say: a row's recall from its parts, a head's recall and bounds, a sequence's certificate. A CTA
// per sequence and query head; the last one of a sequence to be done adds up the heads. The arithmetic is
// core/guard_math.h's, in double, every sum in one order.
//
// Nothing here is much work, but where a mask may be repaired all of it is between select and attend: so eight lanes
// share a row, in the walk over its parts and over the other rows, and sums of a head go through one exchange each.
#include "cuda/common/grid_control.cuh"
#include "cuda/common/guard/args.h"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kRowLanes = 8, kRowsAtOnce = kThreads / kRowLanes;
constexpr double kPercentile = 0.05;

struct Add {
  static __device__ double Of(double x, double y) { return x + y; }
};
struct Least {
  static __device__ double Of(double x, double y) { return y < x ? y : x; }
};

// Over the lanes of a row, or of a warp; each of them has the result.
template <class OP, int LANES = 32>
__device__ double OverLanes(double x) {
#pragma unroll
  for (int offset = LANES / 2; offset; offset /= 2) x = OP::Of(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Over the CTA: of COUNT values at a time.
template <class OP, int COUNT>
__device__ void OverAll(double (&x)[COUNT]) {
  __shared__ double of_warp[COUNT][kWarps];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] = OverLanes<OP>(x[i]);
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < COUNT; ++i) of_warp[i][threadIdx.x / 32] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = of_warp[i][0];
    for (int w = 1; w < kWarps; ++w) x[i] = OP::Of(x[i], of_warp[i][w]);
  }
}

// A row's recall, and the heaviest of its missed blocks, from the parts.
struct RowResult {
  float recall, share;
  int block;
};

// By the row's lanes. `parts` are `stride` apart.
__device__ RowResult ResultOf(const RowPart* parts, int count, int64_t stride) {
  const int lane = threadIdx.x % kRowLanes;
  float top = -INFINITY;
  for (int i = lane; i < count; i += kRowLanes) top = fmaxf(top, parts[i * stride].reference);
#pragma unroll
  for (int offset = kRowLanes / 2; offset; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  double total = 0, missed = 0, most = 0;
  int block = -1;
  for (int i = lane; i < count; i += kRowLanes) {
    const RowPart part = parts[i * stride];
    const double scale = part.reference > -INFINITY ? exp2f(part.reference - top) : 0;
    total += part.total * scale;
    missed += part.missed * scale;
    if (part.most * scale > most) {
      most = part.most * scale;
      block = part.block;
    }
  }
  total = OverLanes<Add, kRowLanes>(total);
  missed = OverLanes<Add, kRowLanes>(missed);
#pragma unroll
  for (int offset = kRowLanes / 2; offset; offset /= 2) { // the first block among equals, as in order
    const double other = __shfl_xor_sync(~0u, most, offset);
    const int of_other = __shfl_xor_sync(~0u, block, offset);
    if (other > most || (other == most && static_cast<unsigned>(of_other) < static_cast<unsigned>(block))) {
      most = other;
      block = of_other;
    }
  }
  if (!(total > 0)) return {1, 0, -1};
  return {static_cast<float>(max(0.0, 1 - missed / total)), static_cast<float>(most / total), block};
}

// Of a head's missed blocks the one that weighs most over all rows; the lower index among equals.
struct Heaviest {
  double sum;
  int block;

  __device__ void Join(const Heaviest& other) {
    if (other.block >= 0 && (block < 0 || other.sum > sum || (other.sum == sum && other.block < block))) *this = other;
  }
};
__device__ Heaviest HeaviestOfAll(Heaviest mine) {
  __shared__ Heaviest of_warp[kWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    mine.Join({__shfl_xor_sync(~0u, mine.sum, offset), __shfl_xor_sync(~0u, mine.block, offset)});
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) mine.Join(of_warp[w]);
  return mine;
}

// What a sequence's heads say together; by one warp.
__device__ void ReportSequence(const GuardArgs& a, int b) {
  const int lane = threadIdx.x % 32, heads = a.d.p.q_heads;
  double sums[3] = {};
  for (int h = lane; h < heads; h += 32) {
    const volatile Moments& m = a.head_moments[b * heads + h];
    sums[0] += m.count;
    sums[1] += m.sum;
    sums[2] += m.squares;
  }
#pragma unroll
  for (double& sum : sums) sum = OverLanes<Add>(sum);
  if (lane > 0) return;
  if (a.certificate) a.certificate[b] = static_cast<float>(Certificate({sums[0], sums[1], sums[2]}, a.risk));
  for (int i = 0; i < 3 && a.moments; ++i) a.moments[3 * b + i] = sums[i];
}

__global__ void __launch_bounds__(kThreads, 1) ReportKernel(const __grid_constant__ GuardArgs a) {
  __shared__ double percentile[2]; // the values around it
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  const Problem& p = a.d.p;
  const int at = static_cast<int>(blockIdx.x), b = at / p.q_heads, head = at % p.q_heads, kv = head / a.group;
  const HeadDraw draw = a.heads[at];
  const int count = draw.strata;
  const int64_t base = GuardRowBase(a, b, head);
  const DeviceSequence s = SequenceAt(a.d, b);
  float *const recalls = a.recalls + base, *const shares = a.shares + base;
  int32_t* const missed = a.missed + base;
  const int first = static_cast<int>(threadIdx.x) / kRowLanes, lane = static_cast<int>(threadIdx.x) % kRowLanes;

  // Sums over the rows.
  double sums[5] = {}; // weighted, bad rows; count, recalls, squares
  double worst[1] = {1};
  for (int begin = 0; begin < count; begin += kRowsAtOnce) {
    const int j = min(begin + first, count - 1); // whole warps go on together
    const int u = j * a.group + head - kv * a.group;
    const int64_t unit = (int64_t{b} * p.kv_heads + kv) * a.row_tiles + u / a.tile_rows;
    const int pieces = (GuardKeysSeen(a, s, a.drawn[base + j]) + a.piece_keys - 1) / a.piece_keys;
    const RowResult row = ResultOf(a.parts + unit * a.pieces * a.tile_rows + u % a.tile_rows, pieces, a.tile_rows);
    if (lane > 0 || begin + first >= count) continue;
    recalls[j] = row.recall;
    shares[j] = row.share;
    missed[j] = row.block;
    const double recall = row.recall;
    sums[0] += recall * static_cast<double>(StratumRows(j, draw.sparse, count));
    sums[1] += recall < kBadRecall;
    sums[2] += 1;
    sums[3] += recall;
    sums[4] += recall * recall;
    worst[0] = min(worst[0], recall);
  }
  OverAll<Add>(sums); // and the rows' results are there for all
  OverAll<Least>(worst);

  // Bounds.
  const double recall = count > 0 ? sums[0] / draw.sparse : 1;
  const LowerBound bound = LowerBound::Of(count, recall, worst[0]);
  const PercentilePlace place = PercentilePlace::Of(kPercentile, max(1, count));
  double squares[1] = {};
  Heaviest heaviest{0, -1};
  for (int begin = 0; begin < count; begin += kRowsAtOnce) {
    const int j = min(begin + first, count - 1);
    const float mine = recalls[j];
    const int block = missed[j];
    int rank = 0;
    double sum = 0;
    for (int i = lane; i < count; i += kRowLanes) {
      const float other = recalls[i];
      rank += other < mine || (other == mine && i < j);
      sum += missed[i] == block ? shares[i] : 0;
    }
    sum = OverLanes<Add, kRowLanes>(sum);
#pragma unroll
    for (int offset = kRowLanes / 2; offset; offset /= 2) rank += __shfl_xor_sync(~0u, rank, offset);
    if (lane > 0 || begin + first >= count) continue;
    squares[0] += (mine - bound.mean) * (mine - bound.mean);
    heaviest.Join({sum, block});
    if (rank == place.below) percentile[0] = mine;
    if (rank == place.above(count)) percentile[1] = mine;
  }
  OverAll<Add>(squares);
  heaviest = HeaviestOfAll(heaviest);
  if (threadIdx.x >= 32) return;

  __shared__ int last;
  if (threadIdx.x == 0) {
    double low = recall, p05 = 1; // if all are audited, nothing is left out
    if (count > 0) p05 = percentile[0] + place.share * (percentile[1] - percentile[0]);
    if (count > 0 && count < draw.sparse) low = bound.From(count, squares[0]);
    if (a.recall) a.recall[at] = static_cast<float>(recall);
    if (a.recall_low) a.recall_low[at] = static_cast<float>(low);
    if (a.recall_p05) a.recall_p05[at] = static_cast<float>(p05);
    if (a.rows_audited) a.rows_audited[at] = count;
    if (a.missed_block) a.missed_block[at] = heaviest.block;
    if (a.seed.draw == 0) {
      const bool is_low = count > 0 && KeepsTooLittle(low, a.target, static_cast<int64_t>(sums[1]), count);
      if (a.outcome) a.outcome[at] = count == 0 ? FP_GUARD_WHOLE : is_low ? a.low_outcome : FP_GUARD_HELD;
      if (is_low) {
        a.wanted[b * a.mask_heads + head / a.rules.heads_per_tile] = 1;
        *a.any_wanted = 1;
      }
    }
    a.head_moments[at] = {sums[2], sums[3], sums[4]};
    __threadfence();
    last = atomicAdd(&a.heads_done[b], 1) == p.q_heads - 1;
    if (last) a.heads_done[b] = 0;
    __threadfence();
  }
  __syncwarp();
  if (last) ReportSequence(a, b);
}

} // namespace

cudaError_t LaunchGuardReport(const GuardArgs& args, cudaStream_t stream) {
  const int64_t heads = int64_t{args.d.p.batch} * args.d.p.q_heads;
  return LaunchOverlapped(ReportKernel, true, heads, kThreads, 0, stream, args);
}

} // namespace flashprefill::cuda
