// Arguments and plans of the portable attend kernel. Sizes that depend on the plan are PortableShape, so that host and
// device share them.
#ifndef FLASHPREFILL_CUDA_SM80_ATTEND_PARAMS_H_
#define FLASHPREFILL_CUDA_SM80_ATTEND_PARAMS_H_

#include "cuda/common/attend/args.h"

namespace flashprefill::cuda {

constexpr int kPortableRows = 128; // of a query tile
constexpr int kStepRing = 4;       // steps whose rows are known at a time
constexpr int kListBlocks = 2048;  // blocks of which a list says which are kept: 32 words of the mask

// The plans, by padded head dimension and by whether there are only 99 KiB of shared memory per CTA.
//
//   head_dim  small  rows x warps  keys     Q lies in  CTAs  shared memory, besides 7 to 11 KiB of lists
//   64        either 32 x 4        128 (64) registers  2     stages x 32
//   128       no     32 x 4        64       shared     2     32 + stages x 32
//   128       yes    16 x 8        64       registers  1     2 stages x 32
//   256       no     16 x 8        64       shared     1     64 + stages x 64
//   256       yes    16 x 8        32       registers  1     2 stages x 32
//
// There are two stages where they fit, else one (A100: head_dim 128 and 256; 99 KiB: head_dim 64). 32 rows per warp
// halve what is read of K and V in shared memory, which is the limit where the matrix units are fast; 16 rows and Q in
// registers do where they are slow, or the memory is small. In brackets are the keys whose scores a warp has at a time,
// where that is not all of a step.
template <int HEAD_DIM, bool SMALL>
struct PortableShape {
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "other head dimensions are padded to these");
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kPanels = HEAD_DIM / kPanelColumns;
  static constexpr int kRowTiles = HEAD_DIM == 64 || (HEAD_DIM == 128 && !SMALL) ? 2 : 1; // of 16 rows, per warp
  static constexpr int kWarps = kPortableRows / 16 / kRowTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtas = kRowTiles;                                                 // per multiprocessor
  static constexpr int kKeys = HEAD_DIM == 64 ? 128 : HEAD_DIM == 256 && SMALL ? 32 : 64; // of a step
  static constexpr int kPartKeys = kKeys < 64 ? kKeys : 64; // whose scores are in registers at a time
  static constexpr int kSlice = kPartKeys / 2;              // whose weights are made at a time
  static constexpr bool kQueriesInRegisters = HEAD_DIM == 64 || SMALL;
  static constexpr int kQueryBytes = kPortableRows * HEAD_DIM * 2;
  static constexpr int kStageBytes = kKeys * HEAD_DIM * 2; // of K, and of V
};

struct PortableAttendParams : AttendArgs {
  const void* q_data;
  int64_t q_stride[3]; // batch (0 if packed), token, head
  Divider by_chunks;   // chunks_per_block
  int chunks_per_block;
  int stages; // of K, and of V: 1 or 2
  ListArgs listed;
};

using PortableAttendKernel = void (*)(PortableAttendParams);
struct PortableAttendPlan {
  PortableAttendKernel kernel;
  int threads, keys, ctas;
  int fixed_bytes, stage_bytes; // of shared memory
};
template <class T, int HEAD_DIM, bool SMALL>
PortableAttendPlan PortableAttend();

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ATTEND_PARAMS_H_
