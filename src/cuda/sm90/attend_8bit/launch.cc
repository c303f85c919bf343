// The 8-bit attend from the host's side: its limits and its launch.
#include "cuda/common/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/common/attend/plan.h"
#include "cuda/sm90/attend_8bit/params.h"

namespace flashprefill::cuda {

cudaError_t LaunchAttend8Sm90(const AttendArgs& args, const AttendCall& call, const Images& images,
                              cudaStream_t stream) {
  const Problem& p = call.p;
  Attend8Params a{};
  static_cast<AttendArgs&>(a) = args;
  while (1 << a.chunk_shift < kImageKeys) ++a.chunk_shift;
  if (cudaError_t e = SetRowParams(call, a)) return e;
  const int64_t mean_keys = int64_t{kImageKeys} * a.block_size;
  a.images = images;
  a.by_mean_image = Divider::Of(mean_keys);
  a.keys_each = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, kImageKeys));
  a.means_each = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, mean_keys));
  a.zero_image = static_cast<int>(p.kv_heads * images.keys.rows);
  a.softmax_scale = p.softmax_scale;

  const Attend8KernelSet set = p.q.dtype == FP_BF16 ? Attend8KernelOf<__nv_bfloat16>() : Attend8KernelOf<__half>();
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  if (cudaError_t e = AllowShared(set.kernel, set.shared_bytes)) return e;
  return LaunchOverlapped(set.kernel, true, std::min<int64_t>(call.items, processors), kAttendThreads, set.shared_bytes,
                          stream, a);
}

} // namespace flashprefill::cuda
