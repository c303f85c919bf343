// Host side of selection by verticals and slashes. See plan.h.
#include "cuda/common/vertical_slash/plan.h"

#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int64_t kKeyStep = 64;      // keys per product
constexpr int64_t kLeastChunk = 256;  // keys per CTA: below this its rows' loading shows
constexpr int64_t kMostChunks = 128;  // of a sequence: each CTA of the second launch reads all their denominators
constexpr int64_t kWantedCtas = 2112; // eight for each of 132 multiprocessors with room for two

VerticalSlashShape ShapeOf(const Problem& p, const TileRules& rules, const Gpu& gpu, int rows) {
  VerticalSlashShape a{};
  a.d = DeviceProblem::Of(p);
  a.rules = rules;
  a.exponent_scale = ExponentScale(p);
  a.least_rows = 2;
  a.rows = rows;
  const bool small = p.head_dim > 128 && gpu.shared_bytes < kMediumShared; // 128 rows would not fit
  a.columns = a.rows <= 64 || small ? 64 : 128;
  a.parts = DivUp(a.rows, a.columns);
  const int64_t keys = PackedKeys(p) ? p.total_k : p.batch * p.max_seqlen_k;
  const int64_t wanted =
      std::max({int64_t{p.q_heads} * a.parts * keys / kWantedCtas, p.max_seqlen_k / kMostChunks, kLeastChunk});
  a.chunk = static_cast<int>(DivUp(std::min(wanted, std::max(p.max_seqlen_k, kLeastChunk)), kKeyStep) * kKeyStep);
  a.slot_count = static_cast<int>(MeanRows(p, a.chunk));
  a.slots_per_batch = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, a.chunk));
  a.by_chunk = Divider::Of(a.chunk);
  a.by_slots = Divider::Of(std::max(1, a.slots_per_batch));
  a.by_page = Divider::Of(std::max(1, p.page_size));
  a.by_kv = Divider::Of(p.kv_heads);
  a.by_units = Divider::Of(p.q_heads / p.kv_heads * a.parts);
  return a;
}

} // namespace

VerticalSlashPlan VerticalSlashPlan::Of(const Problem& p, const Policy& policy, const Gpu& gpu, int rows,
                                        int64_t dense_up_to_keys) {
  TileRules rules = TileRules::Of(p, policy);
  rules.dense_up_to_keys = ToInt(dense_up_to_keys);
  VerticalSlashPlan plan{};
  plan.p = p;
  plan.gpu = gpu;
  plan.shape = ShapeOf(p, rules, gpu, rows);
  plan.keeps_everything = p.total_q == 0 || p.max_seqlen_q <= 1 || p.max_seqlen_k <= dense_up_to_keys;
  plan.block_room = DivUp<int64_t>(p.max_seqlen_k, policy.block_size);
  plan.token_words = DivUp<int64_t>(p.max_seqlen_k, 32);
  plan.heads = int64_t{p.batch} * p.q_heads;
  return plan;
}

const char* VerticalSlashPlan::Unsupported() const {
  if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
  if (!FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
  if (p.batch > 65535) return "at most 65535 sequences with this policy on CUDA";
  if (!IsAligned(p.q)) return kUnalignedQ;
  if (!IsAligned(p.k)) return kUnalignedK;
  return nullptr;
}

void VerticalSlashPlan::Take(Workspace& workspace, bool correction, bool k_means, int slash_sets, int64_t slash_room) {
  means = TakeMeans(workspace, p, shape.rules.block_size, correction || k_means, correction);
  choice.words = DivUp<int64_t>(block_room, 64);
  choice.slash_words = DivUp<int64_t>(slash_room, 32);
  if (keeps_everything) return;
  const int64_t units = int64_t{p.q_heads} * shape.parts * shape.slot_count;
  lse = workspace.Take<float>(units * shape.columns);
  vertical_sums = workspace.Take<float>(units * shape.chunk);
  slash_sums = workspace.Take<float>(units * (shape.chunk + shape.columns));
  choice.verticals = workspace.Take<uint32_t>(heads * 2 * choice.words);
  choice.slashes = workspace.Take<uint32_t>(heads * slash_sets * choice.slash_words);
}

SumsArgs VerticalSlashPlan::Sums() const {
  SumsArgs args{};
  args.shape = shape;
  args.lse = lse;
  args.vertical_sums = vertical_sums;
  args.slash_sums = slash_sums;
  return args;
}

VerticalSlashMaskArgs VerticalSlashPlan::Mask(const SelectTarget& target) const {
  VerticalSlashMaskArgs args{};
  args.shape = shape;
  args.choice = choice;
  args.token_words = token_words;
  args.keeps_everything = keeps_everything;
  args.bits = target.mask.bits;
  args.counts = target.mask.counts;
  args.fallback = target.mask.fallback;
  args.words = target.mask.words;
  args.attend_counter = target.follow.attend_counter;
  return args;
}

cudaError_t VerticalSlashPlan::LaunchPooling(cudaStream_t stream) const {
  return means.k || means.v ? LaunchMeans(shape.d, shape.rules, means, true, stream) : cudaSuccess;
}

cudaError_t LaunchSums(const SumsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  return gpu.portable ? LaunchSumsPortable(args, stream) : LaunchSumsSm90(args, stream);
}

cudaError_t LaunchMap(const MapArgs& args, const Gpu& gpu, cudaStream_t stream) {
  return gpu.portable ? LaunchMapPortable(args, stream) : LaunchMapSm90(args, stream);
}

} // namespace flashprefill::cuda
