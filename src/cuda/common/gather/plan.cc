// Host side of the selections that rank single keys. See plan.h.
#include "cuda/common/gather/plan.h"

#include "core/key_list.h"
#include "core/segment.h"
#include "cuda/common/energies/pool.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int64_t kCodeBytes = int64_t{576} << 20; // of a round, unless one slot needs more
constexpr int64_t kWantedCtas = 6336; // of sums: 16 for each place of 132 multiprocessors with room for three
constexpr int64_t kLeastChunk = 512, kMostChunk = 8192, kMostChunks = 128; // keys; of a sequence
constexpr int64_t kMostCodeChunk = 2048;                                   // of codes, of which a round has few slots

RankShape ShapeOf(const Problem& p, const Policy& policy, int64_t segment) {
  const Geometry g = Geometry::Of(p, policy);
  RankShape a{};
  a.d = DeviceProblem::Of(p);
  a.rules = TileRules::Of(p, policy);
  a.heads = g.heads_per_tile;
  for (a.columns = 1; a.columns < std::min(a.heads, kRankColumns);) a.columns *= 2, ++a.log2_columns;
  while ((a.columns << a.log2_lists) < kRankColumns) ++a.log2_lists;
  a.segment_tiles = static_cast<int>(SegmentTiles(segment, g));
  const int64_t tokens = std::max<int64_t>(1, int64_t{a.segment_tiles} * g.tile_tokens);
  a.segment_rows = static_cast<int>(p.total_q / tokens + p.batch);
  a.slots = static_cast<int>((int64_t{a.segment_rows} * a.rules.units_per_kv >> a.log2_lists) + p.batch);
  const int64_t spread = int64_t{p.kv_heads} * a.slots * p.max_seqlen_k / kWantedCtas;
  const int64_t least = std::max(kLeastChunk, p.max_seqlen_k / kMostChunks);
  a.chunk =
      static_cast<int>(DivUp(std::clamp(spread, least, std::max(least, kMostChunk)), int64_t{kRankStep}) * kRankStep);
  a.chunks = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, a.chunk));
  a.exponent_scale = ExponentScale(p);
  a.by_segment_tokens = Divider::Of(tokens);
  a.by_chunks = Divider::Of(a.chunk);
  a.by_slots = Divider::Of(std::max(1, a.slots));
  a.by_page = Divider::Of(std::max(1, p.page_size));
  return a;
}

} // namespace

RankPlan RankPlan::Of(const Problem& p, const Policy& policy, int64_t segment, const Gpu& gpu) {
  RankPlan plan;
  plan.portable_ = gpu.portable;
  plan.corrects_ = policy.mean_correction != 0;
  plan.shape_ = ShapeOf(p, policy, segment);
  return plan;
}

const char* RankPlan::Unsupported() const {
  const Problem& p = shape_.d.p;
  if (corrects_) return "no mean correction in masks with key lists on CUDA";
  if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
  if (shape_.rules.tile_tokens < 1) return "a shared mask takes groups of at most 128 query heads";
  if (!FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
  if (!IsAligned(p.q)) return kUnalignedQ;
  if (!IsAligned(p.k)) return kUnalignedK;
  return nullptr;
}

int64_t RankPlan::Pitch() const { return MeanPitch(shape_.d.p); }

// Rounds are alike: a short last one would leave multiprocessors without work as long as a whole one does.
int64_t RankPlan::RoundSlots() const {
  const int64_t slot_bytes = std::max<int64_t>(1, (CodeStride() << shape_.log2_lists) * 2);
  const int64_t most = std::max<int64_t>(1, kCodeBytes / slot_bytes), slots = std::max<int64_t>(1, Slots());
  return DivUp(slots, DivUp(slots, most));
}

void RankPlan::Take(Workspace& workspace) {
  const int64_t slots = Slots();
  rows_ = workspace.Take<uint16_t>((slots << shape_.log2_lists) * shape_.columns * Pitch());
  lse_ = workspace.Take<float>(slots * shape_.chunks * kRankColumns);
  codes_ = workspace.Take<uint16_t>((RoundSlots() << shape_.log2_lists) * CodeStride());
}

RankShape RankPlan::ShapeFor(const SelectTarget& target) const {
  RankShape shape = shape_;
  shape.rules.dense_up_to_keys = target.follow.dense_up_to_keys;
  return shape;
}

// A segment's rows of a head are one pooled row: to the pooling pass, segments are tiles.
cudaError_t RankPlan::LaunchMeanQueries(cudaStream_t stream) const {
  TileRules rules = shape_.rules;
  rules.tile_tokens *= shape_.segment_tiles;
  rules.by_tile = shape_.by_segment_tokens;
  rules.tile_rows = shape_.segment_rows;
  rules.tail_tiles = 0;
  PoolArgs pool = PoolArgs::Of(shape_.d, rules);
  pool.q_rows = rows_;
  pool.query_pool = rules.tile_tokens;
  pool.unit_rows = shape_.columns;
  return LaunchPool(pool, stream);
}

// *rank becomes the arguments of the rounds of codes.
cudaError_t RankPlan::LaunchSums(const RankShape& shape, cudaStream_t stream, RankArgs* rank) const {
  if (cudaError_t error = LaunchMeanQueries(stream)) return error;
  rank->shape = shape;
  rank->rows = rows_;
  rank->pitch = static_cast<int>(Pitch());
  rank->lse = lse_;
  rank->end_slot = static_cast<int>(Slots());
  rank->chunk = shape.chunk;
  const auto sums = portable_ ? LaunchRankSumsPortable : LaunchRankSumsSm90;
  if (cudaError_t error = sums(*rank, stream)) return error;
  rank->codes = codes_;
  rank->code_stride = CodeStride();
  rank->chunk = static_cast<int>(std::min<int64_t>(shape.chunk, kMostCodeChunk));
  return cudaSuccess;
}

KeyChoiceArgs RankPlan::ChoiceOf(const RankShape& shape, const BlockMask& mask) const {
  KeyChoiceArgs choice{};
  choice.shape = shape;
  choice.codes = codes_;
  choice.code_stride = CodeStride();
  choice.lists = mask.key_lists;
  choice.stride = KeyListStride(mask);
  choice.room = mask.max_keys;
  return choice;
}

cudaError_t RankPlan::LaunchMask(const RankShape& shape, const SelectTarget& target) {
  ListMaskArgs args{};
  args.shape = shape;
  args.bits = target.mask.bits;
  args.words = target.mask.words;
  args.counts = target.mask.counts;
  args.fallback = target.mask.fallback;
  args.lists = target.mask.key_lists;
  args.stride = KeyListStride(target.mask);
  args.mask_heads = shape.d.p.kv_heads * shape.rules.units_per_kv;
  args.attend_counter = target.follow.attend_counter;
  return LaunchListMask(args, target.stream);
}

} // namespace flashprefill::cuda
