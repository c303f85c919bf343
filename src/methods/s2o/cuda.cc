// S2O on CUDA, on Hopper: keys are ranked for segments' mean queries as Gather ranks them (cuda/common/gather/plan.h).
// A list first takes the best keys that it has room for; then a CTA sorts them and takes them 128 at a time, until its
// rows say stop (cuda/common/gather/stop.cuh).
#include <limits>

#include "core/segment.h"
#include "cuda/common/gather/plan.h"
#include "cuda/common/heuristics.h"

namespace flashprefill::methods::s2o {
namespace {

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_s2o&>(policy);
    plan.family_ = cuda::RankPlan::Of(p, policy, plan.policy_.segment, gpu);
    const Geometry g = Geometry::Of(p, policy);
    plan.rows_ = std::min<int64_t>(plan.policy_.stop_rows,
                                   int64_t{std::max(1, g.tile_tokens)} * SegmentTiles(plan.policy_.segment, g)) *
                 g.heads_per_tile;
    plan.most_keys_ = p.max_seqlen_k;
    plan.portable_ = gpu.portable;
    plan.apart_ = p.k.stride[1];
    plan.room_ = std::min<int64_t>(plan.policy_.max_keys, p.max_seqlen_k);
    plan.shared_bytes_ = gpu.shared_bytes;
    plan.fits_ = cuda::KeyStopBytesSm90(p.head_dim, plan.rows_, plan.room_) <= gpu.shared_bytes;
    return plan;
  }

  const char* Unsupported() const {
    if (rows_ > cuda::kMostStopRows) return "stop_rows times the query heads of a list is at most 1024 on CUDA";
    if (portable_) return "S2O selects on Hopper and on the CPU, not on this GPU";
    if (apart_ < 0 || apart_ > cuda::kMostKeyStride) return "keys at most 2^30 elements apart on CUDA";
    if (!fits_) return "fewer max_keys on this GPU: they are sorted in shared memory";
    if (most_keys_ > cuda::kMostRankedKeys) return "sequences have at most 2^24 keys on CUDA";
    return family_.Unsupported();
  }
  void Take(Workspace& workspace, bool) { family_.Take(workspace); } // means are for the mean correction alone

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    return family_.Launch(target, [&](cuda::KeyChoiceArgs choice) {
      choice.gain = std::numeric_limits<float>::quiet_NaN(); // by the budget: as many as there is room for
      choice.budget = 1;
      if (cudaError_t error = LaunchKeyChoice(choice, target.stream)) return error;
      cuda::KeyStopArgs stop{};
      static_cast<cuda::KeyChoiceArgs&>(stop) = choice;
      stop.tau = policy_.tau;
      stop.stop_rows = policy_.stop_rows;
      stop.shared_bytes = shared_bytes_;
      return LaunchKeyStopSm90(stop, target.stream);
    });
  }

  cuda::Means means;

 private:
  fp_s2o policy_;
  cuda::RankPlan family_;
  int64_t rows_, room_, most_keys_, apart_;
  int shared_bytes_;
  bool fits_, portable_;
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<Plan::Of>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::s2o
