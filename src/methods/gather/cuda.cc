// Gather on CUDA, on Hopper: mean queries by the pooling pass, sums and codes of energies by two products of all of
// them with all keys (cuda/common/gather/rank.cuh), lists by counting codes (choose.cu). Codes take two bytes per key
// and list, too many at length for all lists at a time: they are made, chosen from and overwritten in rounds of some
// slots. Nothing is read back.
#include "core/key_list.h"
#include "cuda/common/energies/forced.h"
#include "cuda/common/energies/pool.h"
#include "cuda/common/gather/args.h"
#include "cuda/common/heuristics.h"
#include "cuda/common/tensor_access.h"
#include "methods/gather/segment.h"

namespace flashprefill::methods::gather {
namespace {

constexpr int64_t kCodeBytes = int64_t{576} << 20; // of a round, unless one slot needs more
constexpr int64_t kWantedCtas = 6336; // of sums: 16 for each place of 132 multiprocessors with room for three
constexpr int64_t kLeastChunk = 512, kMostChunk = 8192, kMostChunks = 128; // keys; of a sequence
constexpr int64_t kMostCodeChunk = 2048;                                   // of codes, of which a round has few slots

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_gather&>(policy);
    plan.portable_ = gpu.portable;
    plan.shape_ = plan.ShapeOf(p, policy);
    return plan;
  }

  const char* Unsupported() const {
    const Problem& p = shape_.d.p;
    if (portable_) return "Gather selects on Hopper and on the CPU, not on this GPU";
    if (policy_.common.mean_correction) return "no mean correction in masks with key lists on CUDA";
    if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
    if (shape_.rules.tile_tokens < 1) return "a shared mask takes groups of at most 128 query heads";
    if (!cuda::FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
    if (!cuda::IsAligned(p.q)) return cuda::kUnalignedQ;
    if (!cuda::IsAligned(p.k)) return cuda::kUnalignedK;
    return nullptr;
  }

  void Take(Workspace& workspace, bool) { // means are for the mean correction alone
    const int64_t slots = Slots();
    rows_ = workspace.Take<uint16_t>((slots << shape_.log2_lists) * shape_.columns * Pitch());
    lse_ = workspace.Take<float>(slots * shape_.chunks * cuda::kRankColumns);
    codes_ = workspace.Take<uint16_t>((RoundSlots() << shape_.log2_lists) * CodeStride());
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    cuda::RankShape shape = shape_;
    shape.rules.dense_up_to_keys = target.follow.dense_up_to_keys;
    const Problem& p = shape.d.p;
    if (p.max_seqlen_k <= shape.rules.dense_up_to_keys) return LaunchForced(shape.d, shape.rules, target);
    if (cudaError_t error = LaunchMeanQueries(target.stream)) return error;
    cuda::RankArgs rank{};
    rank.shape = shape;
    rank.rows = rows_;
    rank.pitch = Pitch();
    rank.lse = lse_;
    rank.end_slot = static_cast<int>(Slots());
    rank.chunk = shape.chunk;
    if (cudaError_t error = LaunchRankSumsSm90(rank, target.stream)) return error;
    rank.codes = codes_;
    rank.code_stride = CodeStride();
    rank.chunk = static_cast<int>(std::min<int64_t>(shape.chunk, kMostCodeChunk));
    cuda::KeyChoiceArgs choice = Choice(shape, target.mask);
    for (int64_t first = 0; first < Slots(); first += RoundSlots()) {
      rank.first_slot = choice.first_slot = static_cast<int>(first);
      rank.end_slot = choice.end_slot = static_cast<int>(std::min(first + RoundSlots(), Slots()));
      if (cudaError_t error = LaunchRankCodesSm90(rank, target.stream)) return error;
      if (cudaError_t error = LaunchKeyChoice(choice, target.stream)) return error;
    }
    return LaunchListMask(Mask(shape, target), target.stream);
  }

  cuda::Means means;

 private:
  int64_t Pitch() const { return cuda::MeanPitch(shape_.d.p); }
  int64_t Slots() const { return int64_t{shape_.slots} * shape_.d.p.kv_heads; }
  int64_t CodeStride() const { return DivUp<int64_t>(shape_.d.p.max_seqlen_k, cuda::kRankStep) * cuda::kRankStep; }
  // Rounds are alike: a short last one would leave multiprocessors without work as long as a whole one does.
  int64_t RoundSlots() const {
    const int64_t slot_bytes = std::max<int64_t>(1, (CodeStride() << shape_.log2_lists) * 2);
    const int64_t most = std::max<int64_t>(1, kCodeBytes / slot_bytes), slots = std::max<int64_t>(1, Slots());
    return DivUp(slots, DivUp(slots, most));
  }

  cuda::RankShape ShapeOf(const Problem& p, const Policy& policy) const {
    const Geometry g = Geometry::Of(p, policy);
    cuda::RankShape a{};
    a.d = cuda::DeviceProblem::Of(p);
    a.rules = cuda::TileRules::Of(p, policy);
    a.heads = g.heads_per_tile;
    for (a.columns = 1; a.columns < std::min(a.heads, cuda::kRankColumns);) a.columns *= 2, ++a.log2_columns;
    while ((a.columns << a.log2_lists) < cuda::kRankColumns) ++a.log2_lists;
    a.segment_tiles = static_cast<int>(SegmentTiles(policy_.segment, g));
    const int64_t tokens = std::max<int64_t>(1, int64_t{a.segment_tiles} * g.tile_tokens);
    a.segment_rows = static_cast<int>(p.total_q / tokens + p.batch);
    a.slots = static_cast<int>((int64_t{a.segment_rows} * a.rules.units_per_kv >> a.log2_lists) + p.batch);
    const int64_t spread = int64_t{p.kv_heads} * a.slots * p.max_seqlen_k / kWantedCtas;
    const int64_t least = std::max(kLeastChunk, p.max_seqlen_k / kMostChunks);
    a.chunk = static_cast<int>(DivUp(std::clamp(spread, least, std::max(least, kMostChunk)), int64_t{cuda::kRankStep}) *
                               cuda::kRankStep);
    a.chunks = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, a.chunk));
    a.exponent_scale = ExponentScale(p);
    a.by_segment_tokens = cuda::Divider::Of(tokens);
    a.by_chunks = cuda::Divider::Of(a.chunk);
    a.by_slots = cuda::Divider::Of(std::max(1, a.slots));
    a.by_page = cuda::Divider::Of(std::max(1, p.page_size));
    return a;
  }

  // A segment's rows of a head are one pooled row: to the pooling pass, segments are tiles.
  cudaError_t LaunchMeanQueries(cudaStream_t stream) const {
    cuda::TileRules rules = shape_.rules;
    rules.tile_tokens *= shape_.segment_tiles;
    rules.by_tile = shape_.by_segment_tokens;
    rules.tile_rows = shape_.segment_rows;
    rules.tail_tiles = 0;
    cuda::PoolArgs pool = cuda::PoolArgs::Of(shape_.d, rules);
    pool.q_rows = rows_;
    pool.query_pool = rules.tile_tokens;
    pool.unit_rows = shape_.columns;
    return LaunchPool(pool, stream);
  }

  cuda::KeyChoiceArgs Choice(const cuda::RankShape& shape, const BlockMask& mask) const {
    cuda::KeyChoiceArgs choice{};
    choice.shape = shape;
    choice.codes = codes_;
    choice.code_stride = CodeStride();
    choice.gain = policy_.gain / static_cast<float>(kGainKeys); // NaN stays
    choice.budget = double{policy_.budget};
    choice.lists = mask.key_lists;
    choice.stride = KeyListStride(mask);
    choice.room = mask.max_keys;
    return choice;
  }

  static cuda::ListMaskArgs Mask(const cuda::RankShape& shape, const cuda::SelectTarget& target) {
    cuda::ListMaskArgs args{};
    args.shape = shape;
    args.bits = target.mask.bits;
    args.words = target.mask.words;
    args.counts = target.mask.counts;
    args.fallback = target.mask.fallback;
    args.lists = target.mask.key_lists;
    args.stride = KeyListStride(target.mask);
    args.mask_heads = shape.d.p.kv_heads * shape.rules.units_per_kv;
    args.attend_counter = target.follow.attend_counter;
    return args;
  }

  fp_gather policy_;
  bool portable_;
  cuda::RankShape shape_;
  // Scratch memory; null in a size query.
  uint16_t *rows_ = nullptr, *codes_ = nullptr;
  float* lse_ = nullptr;
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<Plan::Of>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::gather
