// The portable attend from the host's side: the choice of a plan, and its launch.
#include "cuda/common/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/common/attend/plan.h"
#include "cuda/sm80/attend/params.h"

namespace flashprefill::cuda {
namespace {

template <class T>
PortableAttendPlan PlanOf(int head_dim, const Gpu& gpu) {
  const bool small = gpu.shared_bytes < kMediumShared;
  switch (PaddedHeadDim(head_dim)) {
    case 64:
      return PortableAttend<T, 64, false>();
    case 128:
      return small ? PortableAttend<T, 128, true>() : PortableAttend<T, 128, false>();
    default:
      return small ? PortableAttend<T, 256, true>() : PortableAttend<T, 256, false>();
  }
}

} // namespace

cudaError_t LaunchAttendPortable(const AttendArgs& args, const AttendCall& call, cudaStream_t stream) {
  const Problem& p = call.p;
  const PortableAttendPlan plan =
      p.q.dtype == FP_BF16 ? PlanOf<__nv_bfloat16>(p.head_dim, call.gpu) : PlanOf<__half>(p.head_dim, call.gpu);
  PortableAttendParams a{};
  static_cast<AttendArgs&>(a) = args;
  a.q_data = p.q.data;
  for (int i = 0; i < 3; ++i) a.q_stride[i] = i == 0 && p.cu_seqlens_q ? 0 : p.q.stride[i];
  const int chunk = ChunkKeys(call.mask.block_size, plan.keys);
  while (1 << a.chunk_shift < chunk) ++a.chunk_shift;
  a.chunks_per_block = call.mask.block_size / chunk;
  a.by_chunks = Divider::Of(a.chunks_per_block);
  a.listed = ListArgs::Of(call.mask);
  a.stages = call.gpu.Holds(plan.ctas, plan.fixed_bytes + 2 * plan.stage_bytes) ? 2 : 1;
  const int bytes = plan.fixed_bytes + a.stages * plan.stage_bytes;
  const int ctas = call.gpu.Holds(plan.ctas, bytes) ? plan.ctas : 1;

  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  if (cudaError_t e = AllowSharedOnly(plan.kernel, bytes)) return e;
  return LaunchOverlapped(plan.kernel, true, std::min<int64_t>(call.items, int64_t{processors} * ctas), plan.threads,
                          bytes, stream, a);
}

} // namespace flashprefill::cuda
