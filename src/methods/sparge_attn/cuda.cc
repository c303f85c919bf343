// SpargeAttn's first stage on CUDA: the mean query of a tile times the mean keys of blocks, where the rows of either
// are alike.
#include "cuda/common/pooled/plan.h"
#include "methods/sparge_attn/rules.h"

namespace flashprefill::methods::sparge_attn {
namespace {

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_sparge_attn&>(policy);
    plan.family_ = cuda::PooledPlan::Of(p, policy, gpu, kTileRows, 1);
    return plan;
  }

  const char* Unsupported() const { return family_.Unsupported(); }

  void Take(Workspace& workspace, bool correction) {
    family_.Take(workspace, correction);
    means = family_.means;
    const cuda::PooledShape& shape = family_.shape;
    const Problem& p = shape.d.p;
    const int64_t blocks = p.kv_heads * shape.mean_rows;
    similarity_.key_means = workspace.Take<float>(blocks * shape.pitch);
    similarity_.center = workspace.Take<float>(int64_t{p.batch} * p.kv_heads * shape.pitch);
    similarity_.similar_keys = workspace.Take<uint8_t>(blocks);
    similarity_.similar_rows = workspace.Take<uint8_t>(int64_t{p.q_heads} * shape.row_room);
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    cuda::PooledKeepArgs keep = family_.Keep(target);
    const cuda::PooledShape& shape = keep.shape;
    if (shape.d.p.max_seqlen_k <= shape.rules.dense_up_to_keys) return LaunchForced(shape.d, shape.rules, target);
    cuda::SimilarityArgs similarity = similarity_;
    similarity.shape = shape;
    similarity.threshold = SimilarityOf(policy_);
    if (cudaError_t error = family_.LaunchKeyMeans(similarity.key_means, target.stream)) return error;
    if (cudaError_t error = cuda::LaunchSimilarity(similarity, target.stream)) return error;
    const bool by_share = std::isnan(policy_.cdf);
    keep.rule = by_share ? cuda::PooledRule::kShare : cuda::PooledRule::kMostMass;
    keep.share = by_share ? policy_.topk : policy_.cdf;
    keep.similar_keys = similarity_.similar_keys;
    keep.similar_rows = similarity_.similar_rows;
    return family_.LaunchRounds(keep, target.stream);
  }

  cuda::Means means;

 private:
  fp_sparge_attn policy_;
  cuda::PooledPlan family_;
  cuda::SimilarityArgs similarity_{}; // scratch memory; null in a size query
};

constexpr cuda::Selector Make() {
  cuda::Selector selector = cuda::SelectorOverScores<Plan::Of>(cuda::EnergiesDenseUpToKeys);
  selector.without_causal = true;
  return selector;
}

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = Make();

} // namespace flashprefill::methods::sparge_attn
