// FlexPrefill on CUDA: verticals and slashes of blocks up to a budget by gamma, and for query-aware heads the largest
// entries of the pooled map.
#include "cuda/common/vertical_slash/plan.h"

namespace flashprefill::methods::flexprefill {
namespace {

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    const auto& f = reinterpret_cast<const fp_flexprefill&>(policy);
    const int64_t size = policy.block_size;
    const int64_t dense_up_to_keys = std::max(2 * size, DivUp<int64_t>(f.min_budget, size) * size);
    return {f, cuda::VerticalSlashPlan::Of(p, policy, gpu, policy.block_size, dense_up_to_keys)};
  }

  const char* Unsupported() const { return family_.Unsupported(); }

  void Take(Workspace& workspace, bool correction) {
    family_.Take(workspace, correction, HasMap(), 1, family_.block_room);
    means = family_.means;
    if (family_.keeps_everything) return;
    const int64_t heads = family_.heads;
    by_block_ = workspace.Take<float>(heads * 3 * family_.block_room);
    budget_ = workspace.Take<int>(heads * 2);
    aware_ = workspace.Take<int>(heads);
    if (!HasMap()) return;
    const int64_t rows = family_.p.q_heads * MapRowRoom();
    q_means_ = workspace.Take<uint16_t>(rows * family_.p.head_dim);
    map_lse_ = workspace.Take<float>(rows);
    map_equal_ = workspace.Take<uint32_t>(rows);
    map_states_ = workspace.Take<cuda::MapState>(heads);
    map_counts_ = workspace.Take<uint32_t>(heads * cuda::kRadixBins);
    map_rests_ = workspace.Take<uint64_t>(heads * cuda::kRadixBins);
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    if (cudaError_t error = family_.LaunchPooling(target.stream)) return error;
    if (!family_.keeps_everything) {
      if (cudaError_t error = cuda::LaunchSums(family_.Sums(), family_.gpu, target.stream)) return error;
      if (cudaError_t error = cuda::LaunchBlockChoice(Choice(), target.stream)) return error;
      if (cudaError_t error = HasMap() ? cuda::LaunchMap(Map(target.mask), family_.gpu, target.stream) : cudaSuccess)
        return error;
    }
    cuda::VerticalSlashMaskArgs mask = family_.Mask(target);
    mask.phase_step = 1;
    mask.cover_both = policy_.cover == FP_COVER_BOTH;
    mask.aware = HasMap() ? aware_ : nullptr;
    return cuda::LaunchVerticalSlashMask(mask, target.stream);
  }

  cuda::Means means;

 private:
  Plan(const fp_flexprefill& policy, const cuda::VerticalSlashPlan& family) : policy_(policy), family_(family) {}

  bool HasMap() const { return policy_.tau > 0; }
  int BlockSize() const { return policy_.common.block_size; }
  int64_t MapRowRoom() const { return family_.p.total_q / BlockSize() + family_.p.batch; }

  cuda::BlockChoiceArgs Choice() const {
    const int64_t size = BlockSize();
    cuda::BlockChoiceArgs args{};
    args.shape = family_.shape;
    args.vertical_sums = family_.vertical_sums;
    args.slash_sums = family_.slash_sums;
    args.gamma = policy_.gamma;
    args.tau = policy_.tau;
    args.least_blocks = cuda::ToInt(std::max<int64_t>(1, DivUp<int64_t>(policy_.min_budget, size)));
    args.most_blocks = cuda::ToInt(DivUp<int64_t>(policy_.max_budget, size));
    args.cover_both = policy_.cover == FP_COVER_BOTH;
    args.k_means = means.k;
    args.mean_rows = cuda::MeanRows(family_.p, BlockSize());
    args.pitch = family_.p.head_dim;
    args.block_room = family_.block_room;
    args.by_block = by_block_;
    args.budget = budget_;
    args.aware = aware_;
    args.choice = family_.choice;
    return args;
  }

  cuda::MapArgs Map(const BlockMask& mask) const {
    const int64_t panel_rows = int64_t{cuda::kMapRows} * BlockSize();
    cuda::MapArgs args{};
    args.shape = family_.shape;
    args.gamma = policy_.gamma;
    args.aware = aware_;
    args.k_means = means.k;
    args.mean_rows = cuda::MeanRows(family_.p, BlockSize());
    args.pitch = family_.p.head_dim;
    args.row_room = MapRowRoom();
    args.panel_room = static_cast<int>(family_.p.total_q / panel_rows + family_.p.batch);
    args.by_panel = cuda::Divider::Of(panel_rows);
    args.q_means = q_means_;
    args.lse = map_lse_;
    args.equal = map_equal_;
    args.state = map_states_;
    args.counts = map_counts_;
    args.rests = map_rests_;
    args.bits = mask.bits;
    args.words = mask.words;
    return args;
  }

  fp_flexprefill policy_;
  cuda::VerticalSlashPlan family_;
  // Scratch memory; null where it is not needed, and in a size query.
  float *by_block_ = nullptr, *map_lse_ = nullptr;
  int *budget_ = nullptr, *aware_ = nullptr;
  void* q_means_ = nullptr;
  cuda::MapState* map_states_ = nullptr;
  uint32_t *map_equal_ = nullptr, *map_counts_ = nullptr;
  uint64_t* map_rests_ = nullptr;
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOver<Plan::Of>();

} // namespace flashprefill::methods::flexprefill
