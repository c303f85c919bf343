// What the audited rows say: a row's recall from its parts, a head's recall and bounds, a sequence's certificate. A CTA
// per sequence and query head; the last one of a sequence to be done adds up the heads. The arithmetic is
// core/guard_math.h's, in double, every sum in one order.
#include "cuda/common/grid_control.cuh"
#include "cuda/common/guard/args.h"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr double kPercentile = 0.05;

// Sums of doubles over the CTA, in one order.
__device__ double SumOfAll(double x) {
  __shared__ double of_warp[kWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  __syncthreads(); // the last call's sums have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  return sum;
}

// A row's recall, and the heaviest of its missed blocks, from the parts.
struct RowResult {
  float recall, share;
  int block;
};
__device__ RowResult ResultOf(const RowPart* parts, int pieces, int64_t stride) {
  float top = -INFINITY;
  for (int i = 0; i < pieces; ++i) top = fmaxf(top, parts[i * stride].reference);
  double total = 0, missed = 0, most = 0;
  int block = -1;
  for (int i = 0; i < pieces && top > -INFINITY; ++i) {
    const RowPart part = parts[i * stride];
    const double scale = part.reference > -INFINITY ? exp2f(part.reference - top) : 0;
    total += part.total * scale;
    missed += part.missed * scale;
    if (part.most * scale > most) {
      most = part.most * scale;
      block = part.block;
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
  __shared__ Heaviest of_thread[kThreads];
  of_thread[threadIdx.x] = mine;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) mine.Join(of_thread[i]);
  return mine;
}

__global__ void __launch_bounds__(kThreads) ReportKernel(const __grid_constant__ GuardArgs a) {
  __shared__ double percentile[2]; // the values around it
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  const Problem& p = a.d.p;
  const int at = static_cast<int>(blockIdx.x), b = at / p.q_heads, head = at % p.q_heads, kv = head / a.group;
  const HeadDraw draw = a.heads[at];
  const int count = draw.strata;
  const int64_t base = GuardRowBase(a, b, head);
  float *const recalls = a.recalls + base, *const shares = a.shares + base;
  int32_t* const missed = a.missed + base;

  // Sums over the rows.
  double weighted = 0, worst = 1, bad = 0;
  Moments moments;
  for (int j = threadIdx.x; j < count; j += kThreads) {
    const int u = j * a.group + head - kv * a.group;
    const int64_t unit = (int64_t{b} * p.kv_heads + kv) * a.row_tiles + u / a.tile_rows;
    const RowResult row = ResultOf(a.parts + unit * a.pieces * a.tile_rows + u % a.tile_rows, a.pieces, a.tile_rows);
    recalls[j] = row.recall;
    shares[j] = row.share;
    missed[j] = row.block;
    const double recall = row.recall;
    weighted += recall * static_cast<double>(StratumRows(j, draw.sparse, count));
    worst = min(worst, recall);
    bad += recall < kBadRecall;
    moments.Add({1, recall, recall * recall});
  }
  moments = {SumOfAll(moments.count), SumOfAll(moments.sum), SumOfAll(moments.squares)};
  weighted = SumOfAll(weighted);
  bad = SumOfAll(bad);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) worst = min(worst, __shfl_xor_sync(~0u, worst, offset));
  __shared__ double worst_of_warp[kWarps];
  if (threadIdx.x % 32 == 0) worst_of_warp[threadIdx.x / 32] = worst;
  __syncthreads(); // and the rows' results are there for all
  for (int w = 0; w < kWarps; ++w) worst = min(worst, worst_of_warp[w]);

  // Bounds.
  const double recall = count > 0 ? weighted / draw.sparse : 1;
  const LowerBound bound = LowerBound::Of(count, recall, worst);
  const PercentilePlace place = PercentilePlace::Of(kPercentile, max(1, count));
  double squares = 0;
  Heaviest heaviest{0, -1};
  for (int j = threadIdx.x; j < count; j += kThreads) {
    const double mine = recalls[j];
    squares += (mine - bound.mean) * (mine - bound.mean);
    int rank = 0;
    double sum = 0;
    for (int i = 0; i < count; ++i) {
      rank += recalls[i] < recalls[j] || (recalls[i] == recalls[j] && i < j);
      sum += missed[i] == missed[j] ? shares[i] : 0;
    }
    heaviest.Join({sum, missed[j]});
    if (rank == place.below) percentile[0] = mine;
    if (rank == place.above(count)) percentile[1] = mine;
  }
  squares = SumOfAll(squares);
  heaviest = HeaviestOfAll(heaviest);
  if (threadIdx.x > 0) return;

  double low = recall, p05 = 1; // if all are audited, nothing is left out
  if (count > 0) p05 = percentile[0] + place.share * (percentile[1] - percentile[0]);
  if (count > 0 && count < draw.sparse) low = bound.From(count, squares);
  if (a.recall) a.recall[at] = static_cast<float>(recall);
  if (a.recall_low) a.recall_low[at] = static_cast<float>(low);
  if (a.recall_p05) a.recall_p05[at] = static_cast<float>(p05);
  if (a.rows_audited) a.rows_audited[at] = count;
  if (a.missed_block) a.missed_block[at] = heaviest.block;
  if (a.seed.draw == 0) {
    const bool is_low = count > 0 && KeepsTooLittle(low, a.target, static_cast<int64_t>(bad), count);
    if (a.outcome) a.outcome[at] = count == 0 ? FP_GUARD_WHOLE : is_low ? a.low_outcome : FP_GUARD_HELD;
    if (is_low) {
      a.wanted[b * a.mask_heads + head / a.rules.heads_per_tile] = 1;
      *a.any_wanted = 1;
    }
  }
  // The sequence's certificate, by whoever comes last.
  a.head_moments[at] = moments;
  __threadfence();
  if (atomicAdd(&a.heads_done[b], 1) != p.q_heads - 1) return;
  __threadfence();
  a.heads_done[b] = 0;
  Moments of_all;
  for (int h = 0; h < p.q_heads; ++h) {
    const volatile Moments& m = a.head_moments[b * p.q_heads + h];
    of_all.Add({m.count, m.sum, m.squares});
  }
  if (a.certificate) a.certificate[b] = static_cast<float>(Certificate(of_all, a.risk));
  if (a.moments) {
    a.moments[3 * b] = of_all.count;
    a.moments[3 * b + 1] = of_all.sum;
    a.moments[3 * b + 2] = of_all.squares;
  }
}

} // namespace

cudaError_t LaunchGuardReport(const GuardArgs& args, cudaStream_t stream) {
  const int64_t heads = int64_t{args.d.p.batch} * args.d.p.q_heads;
  return LaunchOverlapped(ReportKernel, true, heads, kThreads, 0, stream, args);
}

} // namespace flashprefill::cuda
