// MInference on CUDA: the best verticals and slashes of tokens of vertical-slash heads, first and nearest tokens of
// A-shape heads, and for block-sparse heads the best blocks of each block of query rows, whose bits come first.
// Verticals and slashes become blocks, whichever rounding is asked for: attention over single ones is the CPU's.
#include <limits>
#include <numeric>

#include "cuda/common/pooled/plan.h"
#include "cuda/common/vertical_slash/plan.h"
#include "methods/minference/patterns.h"

namespace flashprefill::methods::minference {
namespace {

// The most keys that a sequence may have and be too short to select for: some head asks for all keys anyway.
int64_t DenseUpToKeys(const Problem& p, const fp_minference& m) {
  int64_t least = std::numeric_limits<int32_t>::max();
  for (int h = 0; h < PatternCount(m, p); ++h) {
    const fp_minference_head head = PatternOf(m, h);
    const int64_t all = head.pattern == FP_A_SHAPE        ? int64_t{head.a} + head.b
                        : head.pattern == FP_BLOCK_SPARSE ? int64_t{head.a} * m.common.block_size
                                                          : std::max(VerticalsOf(head), SlashesOf(head));
    least = std::min(least, all);
  }
  return least;
}

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    const auto& m = reinterpret_cast<const fp_minference&>(policy);
    return {m, cuda::VerticalSlashPlan::Of(p, policy, gpu, static_cast<int>(kRows), DenseUpToKeys(p, m)),
            cuda::PooledPlan::Of(p, policy, gpu, policy.block_size, 1)};
  }

  const char* Unsupported() const {
    if (const char* unsupported = family_.Unsupported()) return unsupported;
    if (policy_.head_count > cuda::kMaxTableHeads) return "MInference takes a list of at most 256 heads on CUDA";
    return HasBlockSparse() ? pooled_.Unsupported() : nullptr;
  }

  void Take(Workspace& workspace, bool correction) {
    const int phases = policy_.common.block_size / PhaseStep();
    const bool pools = HasBlockSparse() && !family_.keeps_everything; // which makes the means too
    if (pools) pooled_.Take(workspace, correction);
    family_.Take(workspace, correction && !pools, false, phases, family_.block_room + cuda::kCrossingsBefore);
    means = pools ? pooled_.means : family_.means;
    if (family_.keeps_everything) return;
    vertical_tokens_ = workspace.Take<uint32_t>(family_.heads * family_.token_words);
    slash_tokens_ = workspace.Take<uint32_t>(family_.heads * family_.token_words);
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    if (cudaError_t error = family_.LaunchPooling(target.stream)) return error;
    cuda::SumsArgs sums = family_.Sums();
    cuda::VerticalSlashMaskArgs mask = family_.Mask(target);
    mask.slash_tokens = slash_tokens_;
    mask.phase_step = PhaseStep();
    mask.table = HasTable();
    cuda::PooledKeepArgs keep = pooled_.Keep(target);
    bool any_sums = false;
    for (int h = 0; h < Patterns(); ++h) {
      const fp_minference_head head = PatternOf(policy_, h);
      const bool needs_sums = head.pattern == FP_VERTICAL_SLASH, block_sparse = head.pattern == FP_BLOCK_SPARSE;
      any_sums |= needs_sums;
      mask.pattern[h] = needs_sums ? cuda::kVerticalSlash : block_sparse ? cuda::kGivenBits : cuda::kAShape;
      keep.numbers[h] = head.a;
      if (!block_sparse) keep.shape.skipped[h / 64] |= uint64_t{1} << (h % 64);
      mask.first[h] = head.a;
      mask.nearest[h] = head.b;
      if (!needs_sums && HasTable()) sums.skipped[h / 64] |= uint64_t{1} << (h % 64);
    }
    if (!family_.keeps_everything && any_sums) {
      if (cudaError_t error = cuda::LaunchSums(sums, family_.gpu, target.stream)) return error;
      if (cudaError_t error = cuda::LaunchTokenChoice(Choice(sums), target.stream)) return error;
    }
    if (!family_.keeps_everything && HasBlockSparse()) {
      if (cudaError_t error = LaunchBlockSparse(keep, target.stream)) return error;
    }
    return cuda::LaunchVerticalSlashMask(mask, target.stream);
  }

  cuda::Means means;

 private:
  Plan(const fp_minference& policy, const cuda::VerticalSlashPlan& family, const cuda::PooledPlan& pooled)
      : policy_(policy), family_(family), pooled_(pooled) {}

  bool HasBlockSparse() const {
    for (int h = 0; h < Patterns(); ++h) {
      if (PatternOf(policy_, h).pattern == FP_BLOCK_SPARSE) return true;
    }
    return false;
  }

  // The bits of block-sparse heads, without forced blocks.
  cudaError_t LaunchBlockSparse(cuda::PooledKeepArgs& keep, cudaStream_t stream) const {
    keep.shape.rules.dense_up_to_keys = family_.shape.rules.dense_up_to_keys;
    keep.rule = cuda::PooledRule::kNumber;
    keep.choice_alone = true;
    keep.fallback = nullptr; // the mask's kernel writes these
    keep.attend_counter = nullptr;
    if (cudaError_t error = pooled_.LaunchKeyMeans(nullptr, stream)) return error;
    if (cudaError_t error = cuda::LaunchPooledRows(keep.shape, stream)) return error;
    return pooled_.LaunchRounds(keep, stream);
  }

  bool HasTable() const { return policy_.head_count > 0; }
  int Patterns() const { return static_cast<int>(PatternCount(policy_, family_.p)); }
  // Block sizes that are no divisors of a tile's meet it in several ways.
  int PhaseStep() const { return std::gcd(kTileRows, policy_.common.block_size); }

  cuda::TokenChoiceArgs Choice(const cuda::SumsArgs& sums) const {
    cuda::TokenChoiceArgs args{};
    args.shape = family_.shape;
    args.vertical_sums = sums.vertical_sums;
    args.slash_sums = sums.slash_sums;
    std::copy(std::begin(sums.skipped), std::end(sums.skipped), args.skipped);
    args.table = HasTable();
    for (int h = 0; h < Patterns(); ++h) {
      const fp_minference_head head = PatternOf(policy_, h);
      args.verticals[h] = cuda::ToInt(VerticalsOf(head));
      args.slashes[h] = cuda::ToInt(SlashesOf(head));
    }
    args.first_verticals = static_cast<int>(kFirstVerticals);
    args.near_slashes = static_cast<int>(kNearSlashes);
    args.vertical_tokens = vertical_tokens_;
    args.slash_tokens = slash_tokens_;
    args.token_words = family_.token_words;
    args.phase_step = PhaseStep();
    args.choice = family_.choice;
    return args;
  }

  fp_minference policy_;
  cuda::VerticalSlashPlan family_;
  cuda::PooledPlan pooled_; // of block-sparse heads; without scratch memory where there are none
  uint32_t *vertical_tokens_ = nullptr, *slash_tokens_ = nullptr; // scratch memory
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOver<Plan::Of>();

} // namespace flashprefill::methods::minference
