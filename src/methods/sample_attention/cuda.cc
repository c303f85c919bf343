// SampleAttention on CUDA: the exact softmax of sampled rows by key block, added up over rows by block and by distance
// (cuda/common/sampled/), the smallest sets of both with the wanted share, and from these the mask as for other
// verticals and slashes. Energies of sampled rows take four bytes per row and key block, too many at length for all
// rows at a time: they are made, added up and overwritten in rounds of some panels.
#include "cuda/common/energies/forced.h"
#include "cuda/common/sampled/args.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::methods::sample_attention {
namespace {

constexpr int64_t kEnergyBytes = int64_t{256} << 20; // of a round, unless one panel of all heads needs more
constexpr int kChunkKeys = 4096;                     // of a CTA, about

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_sample_attention&>(policy);
    plan.gpu_ = gpu;
    plan.shape_ = plan.ShapeOf(p, policy);
    return plan;
  }

  const char* Unsupported() const {
    const Problem& p = shape_.d.p;
    if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
    if (!cuda::FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
    if (p.batch > 65535 || p.q_heads > 32767) return "at most 65535 sequences with this policy on CUDA";
    if (!cuda::SampledChooses(gpu_, shape_.block_room)) {
      return "max_seqlen_k / block_size is too large for the masses of a head to stay in shared memory";
    }
    if (!cuda::IsAligned(p.q)) return cuda::kUnalignedQ;
    if (!cuda::IsAligned(p.k)) return cuda::kUnalignedK;
    return nullptr;
  }

  void Take(Workspace& workspace, bool correction) {
    const Problem& p = shape_.d.p;
    means = cuda::TakeMeans(workspace, p, shape_.rules.block_size, correction, correction);
    shape_.energies =
        workspace.Take<float>(int64_t{p.q_heads} * RoundPanels() * cuda::kSampledRows * shape_.part_stride);
    shape_.masses = workspace.Take<float>(int64_t{p.q_heads} * shape_.panel_room * 2 * shape_.block_room);
    const int64_t heads = int64_t{p.batch} * p.q_heads;
    choice_.words = DivUp<int64_t>(shape_.block_room, 64);
    choice_.slash_words = DivUp<int64_t>(shape_.block_room, 32);
    choice_.verticals = workspace.Take<uint32_t>(heads * 2 * choice_.words);
    choice_.slashes = workspace.Take<uint32_t>(heads * choice_.slash_words);
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    if (means.k) {
      if (cudaError_t error = LaunchMeans(shape_.d, shape_.rules, means, true, target.stream)) return error;
    }
    cuda::SampledShape a = shape_;
    const int panels = RoundPanels();
    for (int first = 0; first < a.panel_room; first += panels) {
      a.first_panel = first;
      a.end_panel = std::min(first + panels, a.panel_room);
      a.by_round = cuda::Divider::Of(a.end_panel - a.first_panel);
      const cudaError_t error = gpu_.portable ? cuda::LaunchSampledScorePortable(a, target.stream)
                                              : cuda::LaunchSampledScoreSm90(a, target.stream);
      if (error) return error;
      if (cudaError_t e = cuda::LaunchSampledMasses(a, target.stream)) return e;
    }
    if (cudaError_t error = cuda::LaunchSampledChoice(a, policy_.coverage, choice_, target.stream)) return error;
    return cuda::LaunchVerticalSlashMask(Mask(target), target.stream);
  }

  cuda::Means means;

 private:
  int RoundPanels() const {
    const int64_t panel_bytes = int64_t{shape_.d.p.q_heads} * cuda::kSampledRows * shape_.part_stride * 4;
    return static_cast<int>(std::clamp<int64_t>(kEnergyBytes / panel_bytes, 1, std::max(1, shape_.panel_room)));
  }

  cuda::SampledShape ShapeOf(const Problem& p, const Policy& policy) const {
    cuda::SampledShape a{};
    a.d = cuda::DeviceProblem::Of(p);
    a.rules = cuda::TileRules::Of(p, policy);
    a.ratio = policy_.sample_ratio;
    a.tail = policy_.sample_rows;
    a.spare_panels = DivUp(a.tail, cuda::kSampledRows) + 2;
    a.panel_room =
        static_cast<int>(static_cast<double>(p.total_q) * a.ratio / cuda::kSampledRows) + p.batch * a.spare_panels;
    const int size = policy.block_size;
    a.part_keys = size % 64 == 0 ? size : 16;
    a.block_parts = size / a.part_keys;
    a.chunk_parts = std::clamp(kChunkKeys / a.part_keys, 1, cuda::kMostChunkParts);
    a.chunks = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, int64_t{a.chunk_parts} * a.part_keys));
    a.block_room = std::max<int64_t>(1, DivUp<int64_t>(p.max_seqlen_k, size));
    a.part_stride = a.block_room * a.block_parts;
    a.exponent_scale = ExponentScale(p);
    a.by_tail = cuda::Divider::Of(a.tail);
    a.by_group = cuda::Divider::Of(p.q_heads / p.kv_heads);
    a.by_chunks = cuda::Divider::Of(std::max(1, a.chunks));
    a.by_page = cuda::Divider::Of(std::max(1, p.page_size));
    return a;
  }

  cuda::VerticalSlashMaskArgs Mask(const cuda::SelectTarget& target) const {
    cuda::VerticalSlashMaskArgs args{};
    args.shape.d = shape_.d;
    args.shape.rules = shape_.rules;
    args.choice = choice_;
    args.window_ratio = policy_.window_ratio;
    args.bits = target.mask.bits;
    args.counts = target.mask.counts;
    args.fallback = target.mask.fallback;
    args.words = target.mask.words;
    args.attend_counter = target.follow.attend_counter;
    return args;
  }

  fp_sample_attention policy_;
  cuda::Gpu gpu_;
  cuda::SampledShape shape_;
  cuda::VerticalSlashChoice choice_{}; // scratch memory; null in a size query
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<Plan::Of>();

} // namespace flashprefill::methods::sample_attention
