// Select, host side: what a policy asks of the pooling pass and of the score kernel, and where its scratch memory lies.
// Two launches for a policy that scores, one for the others; nothing is read back.
#include "cuda/select.h"

#include <cmath>

#include "cuda/attend.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/mask.h"
#include "cuda/sm90/pool.h"
#include "cuda/sm90/score.h"
#include "cuda/strided.h"

namespace flashprefill::cuda {
namespace {

constexpr int kPitch = 8;        // elements: rows of scratch begin at multiples of 16 bytes
constexpr int kMaxHeadDim = 256; // four panels of 64 columns
// Sequences of at most so many keys are attended to densely: on an H200, with 32 heads of 128, the operator takes .030
// ms more than attend over the same density, and at 3072 keys dense attention takes .121 and the density of real text,
// about .8, saves no more than that.
constexpr int kShortKeys = 3072;

// What is scored, and how.
struct Scoring {
  bool scored = false; // else only forced blocks
  bool sketch = false;
  float alpha = std::numeric_limits<float>::quiet_NaN(), mass = std::numeric_limits<float>::quiet_NaN();
  float gain = std::numeric_limits<float>::quiet_NaN();
  int query_pool = 1, min_blocks = 0, outliers = 0;
  bool query_metric = false;
  int rows_per_head = 0, unit_rows = 0;
  bool rows_in_q = false;    // the score kernel multiplies rows of q as they lie there
  bool rows_pooled = false;  // the pooling pass makes its rows; else the score kernel makes them itself
  bool rows_aligned = false; // rows of q can be read 16 bytes at a time
};

bool CopyEngineReads(const Tensor& t, int64_t (&size)[4]) {
  bool can = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[3] == 1;
  for (int axis = 0; axis < 3; ++axis) {
    can &=
        size[2 - axis + 1] <= 1 || (t.stride[axis] > 0 && t.stride[axis] % 8 == 0 && t.stride[axis] < int64_t{1} << 38);
  }
  return can;
}

// Sizes of q as the copy engine sees it: columns, heads, tokens, sequences.
void SizesOfQ(const Problem& p, int64_t (&size)[4]) {
  size[0] = p.head_dim;
  size[1] = p.q_heads;
  size[2] = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  size[3] = p.cu_seqlens_q ? 1 : p.batch;
}

// Whether the forced blocks are everything, whatever the lengths on the device are: the last tile before the dense tail
// begins at most at position max_seqlen_k - 1 - (rows of the tail).
bool NothingToScore(const Problem& p, const Policy& policy) {
  const Geometry g = Geometry::Of(p, policy);
  bool tail_everywhere = p.final_chunk != 0;
  for (int b = 0; p.final_chunks && b < p.batch; ++b)
    tail_everywhere = (b == 0 || tail_everywhere) && p.final_chunks[b];
  const int64_t tail =
      tail_everywhere ? DivUp<int64_t>(int64_t{policy.dense_tail_blocks} * policy.block_size, g.tile_tokens) : 0;
  const int64_t begin = p.max_seqlen_k - 1 - tail * g.tile_tokens;
  return p.total_q == 0 || begin < 0 ||
         policy.sink_blocks >= begin / policy.block_size - std::max(0, policy.window_blocks - 1);
}

bool ScoresStrided(const Problem& p, const Policy& policy) { return IsStrided(policy) && !NothingToScore(p, policy); }

Scoring ScoringOf(const Problem& p, const Policy& policy) {
  Scoring s;
  if (policy.kind == FP_FLASHPREFILL) {
    const auto& f = reinterpret_cast<const fp_flashprefill&>(policy);
    s.scored = true;
    s.alpha = f.alpha;
    s.query_pool = f.query_pool;
    s.min_blocks = f.min_blocks;
  } else if (policy.kind == FP_SKETCH) {
    const auto& f = reinterpret_cast<const fp_sketch&>(policy);
    s.scored = s.sketch = true;
    s.alpha = f.alpha;
    s.mass = f.mass;
    s.gain = f.gain;
    s.query_pool = f.query_pool;
    s.min_blocks = f.min_blocks;
    s.outliers = f.outliers;
    s.query_metric = f.query_metric != 0;
  }
  if (!s.scored || NothingToScore(p, policy)) {
    s.scored = false;
    return s;
  }
  const Geometry g = Geometry::Of(p, policy);
  s.query_pool = std::min(s.query_pool, g.tile_tokens);
  s.rows_per_head = DivUp(g.tile_tokens, s.query_pool);
  const int rows = s.rows_per_head * g.heads_per_tile;
  s.unit_rows = rows <= 8 ? 8 : rows <= 32 ? 32 : 128;
  int64_t size[4];
  SizesOfQ(p, size);
  const bool readable = CopyEngineReads(p.q, size);
  s.rows_in_q = s.query_pool == 1 && s.unit_rows == 128 && !s.sketch && readable;
  s.rows_pooled = s.unit_rows == 128 && !s.rows_in_q;
  s.rows_aligned = readable && p.head_dim % kPitch == 0;
  return s;
}

int Pitch(const Problem& p) { return DivUp(p.head_dim, kPitch) * kPitch; }

int64_t UnitCount(const Problem& p, const Policy& policy) {
  const Geometry g = Geometry::Of(p, policy);
  return g.mask_heads * g.tile_rows;
}

PoolArgs PoolOf(const Problem& p, const TileRules& rules) {
  PoolArgs a{};
  a.d = DeviceProblem::Of(p);
  a.rules = rules;
  a.mean_rows = MeanRows(p, rules.block_size);
  a.pitch = Pitch(p);
  a.query_pool = 1;
  return a;
}

cudaError_t LaunchScores(const Problem& p, const TileRules& rules, const Scoring& s, const BlockMask& mask,
                         const SelectScratch& scratch, cudaStream_t stream) {
  ScoreArgs a{};
  a.d = DeviceProblem::Of(p);
  a.rules = rules;
  a.keep.by_mass = !std::isnan(s.mass);
  a.keep.mass = s.mass;
  a.keep.alpha_log2 = std::log2(s.alpha);
  a.keep.gain = std::isnan(s.gain) ? 0 : s.gain;
  a.keep.min_blocks = s.min_blocks;
  a.scale_log2 = p.softmax_scale * 1.44269504f;
  a.query_pool = s.query_pool;
  a.rows_per_head = s.rows_per_head;
  a.unit_rows = s.unit_rows;
  a.rows_in_q = s.rows_in_q;
  a.rows_aligned = s.rows_aligned;
  a.square_scale = p.softmax_scale / 2;
  a.sketch = s.sketch;
  a.outliers = s.outliers;
  a.mean_rows = MeanRows(p, rules.block_size);
  a.unit_count = int64_t{p.kv_heads} * rules.units_per_kv * rules.tile_rows;
  a.bits = mask.bits;
  a.counts = mask.counts;
  a.words = mask.words;

  const int64_t pitch = Pitch(p), planes = s.sketch ? 2 + s.outliers : 1;
  const TensorMapShape keys{{p.head_dim, planes * p.kv_heads * a.mean_rows, 1, 1}, {pitch, 0, 0}, kStepBlocks, 1};
  if (cudaError_t error = MakeTensorMap(&a.k_map, s.sketch ? scratch.sketch : scratch.k_means, p.k.dtype, keys)) {
    return error;
  }
  TensorMapShape rows{
      {p.head_dim, (s.sketch ? 2 : 1) * a.unit_count * s.unit_rows, 1, 1}, {pitch, 0, 0}, ScoreColumns(s.unit_rows), 1};
  if (s.rows_in_q) {
    SizesOfQ(p, rows.size);
    rows.stride[0] = p.q.stride[2];
    rows.stride[1] = p.q.stride[1];
    rows.stride[2] = p.q.stride[0];
    rows.box_heads = a.rules.heads_per_tile;
    rows.box_tokens = a.rules.tile_tokens;
  }
  if (s.rows_in_q || s.rows_pooled) {
    if (cudaError_t error = MakeTensorMap(&a.q_map, s.rows_in_q ? p.q.data : scratch.q_rows, p.q.dtype, rows)) {
      return error;
    }
  }
  return LaunchScore(a, stream);
}

} // namespace

void* TakeMeans(Workspace& workspace, const Problem& p, int block_size, int planes) {
  return workspace.Take<uint16_t>(planes * p.kv_heads * MeanRows(p, block_size) * Pitch(p));
}

SelectScratch SelectScratch::Take(Workspace& workspace, const Problem& p, const Policy& policy, bool correction) {
  const Scoring s = ScoringOf(p, policy);
  SelectScratch scratch{};
  const bool for_lines = ChoosesByHead(policy) && VerticalSlashNeedsMeans(policy);
  if (correction || for_lines || (s.scored && !s.sketch)) scratch.k_means = TakeMeans(workspace, p, policy.block_size);
  if (correction) scratch.v_means = TakeMeans(workspace, p, policy.block_size);
  if (ScoresStrided(p, policy)) scratch.grid = StridedScratch::Take(workspace, p, policy);
  if (s.scored && s.sketch) scratch.sketch = TakeMeans(workspace, p, policy.block_size, 2 + s.outliers);
  if (s.scored && s.query_metric) {
    scratch.metric = workspace.Take<float>(int64_t{p.batch} * p.kv_heads * kMetricParts * Pitch(p));
  }
  if (s.rows_pooled) {
    scratch.q_rows = workspace.Take<uint16_t>((s.sketch ? 2 : 1) * UnitCount(p, policy) * s.unit_rows * Pitch(p));
  }
  scratch.vertical_slash = VerticalSlashScratch::Take(workspace, p, policy);
  return scratch;
}

const char* SelectUnsupported(const Problem& p, const Policy& policy) {
  if (policy.kind > FP_SKETCH && !IsStrided(policy) && !ChoosesByHead(policy))
    return "this policy selects on the CPU only";
  const Scoring s = ScoringOf(p, policy);
  if (p.final_chunks && p.batch > kMaxFinalChunks) return "final_chunks is given for more than 4096 sequences";
  if (ScoresStrided(p, policy)) return StridedUnsupported(p, policy);
  if (ChoosesByHead(policy)) return SelectVerticalSlashUnsupported(p, policy);
  if (!s.scored && !policy.mean_correction) return nullptr;
  if (p.head_dim > kMaxHeadDim) return "head_dim is above 256, the most that the CUDA kernels do";
  if (!s.scored) return nullptr;
  if (s.query_metric && p.batch > 65535) return "query_metric is given for more than 65535 sequences";
  return ScoreUnsupported(p.head_dim, DivUp<int64_t>(p.max_seqlen_k, policy.block_size), s.unit_rows, s.sketch);
}

cudaError_t LaunchSelect(const Problem& p, const Policy& policy, const BlockMask& mask, const SelectScratch& scratch,
                         bool correction, int* zeroed, cudaStream_t stream) {
  const Scoring s = ScoringOf(p, policy);
  TileRules rules = TileRules::Of(p, policy);
  if (s.scored && zeroed) rules.short_keys = kShortKeys;
  PoolArgs pool = PoolOf(p, rules);
  pool.k_means = scratch.k_means;
  pool.v_means = correction ? scratch.v_means : nullptr;
  pool.skip_forced = true; // in such a sequence no bit is zero, so attend does not correct either
  if (ScoresStrided(p, policy)) {
    if (cudaError_t error = correction ? LaunchPool(pool, stream) : cudaSuccess) return error;
    return LaunchStrided(p, policy, mask, scratch.grid, zeroed, stream);
  }
  if (ChoosesByHead(policy)) {
    const bool wants_means = pool.k_means || pool.v_means;
    if (cudaError_t error = wants_means ? LaunchPool(pool, stream) : cudaSuccess) return error;
    return LaunchSelectVerticalSlash(p, policy, mask, scratch.k_means, scratch.vertical_slash, zeroed, stream);
  }
  const bool all_short = p.max_seqlen_k <= rules.short_keys;
  if (!s.scored || all_short) {
    const Geometry g = Geometry::Of(p, policy);
    const MaskArgs args{pool.d, pool.rules, mask.bits, mask.counts, mask.fallback, g.mask_heads, mask.words, zeroed};
    if (cudaError_t error = LaunchMask(args, stream)) return error;
    return correction && policy.kind != FP_DENSE && !all_short ? LaunchPool(pool, stream) : cudaSuccess;
  }
  pool.sketch = scratch.sketch;
  pool.outliers = s.outliers;
  pool.metric = scratch.metric;
  pool.q_rows = scratch.q_rows;
  pool.query_pool = s.query_pool;
  pool.unit_rows = s.unit_rows;
  pool.squares = s.sketch;
  pool.square_scale = p.softmax_scale / 2;
  pool.fallback = mask.fallback;
  pool.zeroed = zeroed;
  if (s.query_metric) {
    if (cudaError_t error = LaunchMetric(pool, s.rows_aligned, stream)) return error;
  }
  if (cudaError_t error = LaunchPool(pool, stream)) return error;
  return LaunchScores(p, rules, s, mask, scratch, stream);
}

cudaError_t LaunchMeans(const Problem& p, const BlockMask& mask, void* k_means, void* v_means, cudaStream_t stream) {
  Policy policy{};
  policy.kind = FP_STREAMING;
  policy.block_size = mask.block_size;
  policy.share_heads = mask.share_heads;
  PoolArgs pool = PoolOf(p, TileRules::Of(p, policy));
  pool.k_means = k_means;
  pool.v_means = v_means;
  return LaunchPool(pool, stream);
}

} // namespace flashprefill::cuda
