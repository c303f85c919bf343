// Arguments of the attend kernel: what all share (AttendArgs), tensor maps made on the host, and the numbers that both
// sides must agree on. Sizes that depend on the head dimension are AttendShape, so that host and device share them.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_
#define FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/attend/args.h"

namespace flashprefill::cuda {

constexpr int kTileRowsSm90 = 128;
constexpr int kMeanPartRows = 16;
constexpr int kMathThreads = 256;
constexpr int kAttendThreads = 384;

// How K and V come, and by how many warps each.
enum class Loading {
  kTiles,     // one: a bulk copy or two bring a key tile
  kChunks,    // two, which share a tile's many bulk copies
  kAscending, // as kTiles, from the lowest key up: for masks that skip (skip.cuh)
  kRows,      // two, by asynchronous copies: from pages of less than 16 rows
  kGather     // the same, for masks with key lists: rows from anywhere (gather_producer.cuh)
};
constexpr bool LoadsRows(Loading loading) { return loading >= Loading::kRows; }

// What a mask skips, as fp_block_mask has it.
struct SkipArgs {
  float below; // a row skips a chunk whose largest raw score lies further below its largest so far: log(skip) / scale
  int32_t* skipped; // [mask heads, tile_rows], or null
};

// Tile sizes by padded head dimension. 227 KiB of shared memory must hold the Q stages, the K/V stages and 32 KiB (d64:
// 16) for O: d128: 2 * 32 + 2 * 64 + 32 = 224.
template <int HEAD_DIM>
struct AttendShape {
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "other head dimensions are padded to these");
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kPanels = HEAD_DIM / kPanelColumns;
  static constexpr int kKeys = HEAD_DIM == 256 ? 64 : 128; // keys per step: S and O must share the 224 registers
  static constexpr int kStages = HEAD_DIM == 64 ? 4 : 2;   // K tiles, and V tiles, in flight; steps of d64 are shorter
  static constexpr int kQStages = HEAD_DIM == 256 ? 1 : 2; // 2: the next tile's Q is there before this one is done
  // Products of P V that are still to be issued when the turn is passed. d64's are so short that it does harm.
  static constexpr int kEarlyTurn = HEAD_DIM == 64 ? 0 : HEAD_DIM == 128 ? 2 : 1;
  static constexpr int kOutColumns = HEAD_DIM < 128 ? HEAD_DIM : 128; // of O staged at a time
  // The kernel starts with 168 registers per thread, 384 * 168 = 64,512; the producer's 128 threads give some to the
  // 256.
  static constexpr int kProducerRegisters = HEAD_DIM == 256 ? 56 : 88;
  static constexpr int kMathRegisters = HEAD_DIM == 256 ? 224 : 208;
  static_assert(128 * kProducerRegisters + 256 * kMathRegisters == 64512, "all registers are used");
};

struct AttendParams : AttendArgs {
  CUtensorMap q, k, v;        // (head_dim, heads, tokens, batch or page)
  CUtensorMap out_map;        // of a warp's 16 rows, as q; only with bulk_out
  CUtensorMap k_mean, v_mean; // (head_dim, rows, kv_heads, 1); only with mean_correction
  CUtensorMap v_mean_part;    // v_mean in boxes of kMeanPartRows
  int absent_token;           // a token coordinate outside of K and V: reads as zeros
  int bulk_out;               // 16 rows of a tile are whole tokens
  uint32_t zero;              // OpaqueCopy's
  float minus_one;            // HoldBack's
  ListArgs listed;            // last, so that the other kernels' arguments lie where they always lay
  SkipArgs skip;
  int beside; // AttendCall's
};

// Everything of a call that concerns the rows of q and of the output, the OpaqueCopy and HoldBack constants too.
struct AttendCall;
cudaError_t SetRowParams(const AttendCall& call, AttendParams& a);

// The kernels for a dtype and a head dimension, to be launched with AttendParams.
using AttendKernel = void (*)(AttendParams);
struct AttendKernelSet {
  AttendKernel tiles, chunks, rows; // by Loading
  int shared_bytes;
};
template <class T, int HEAD_DIM>
AttendKernelSet AttendKernels();

// The kernel for masks with key lists, and the one for masks that skip, of head dimensions up to 128.
struct OneAttendKernel {
  AttendKernel kernel;
  int shared_bytes;
};
template <class T, int HEAD_DIM>
OneAttendKernel AttendGatherKernel();
template <class T, int HEAD_DIM>
OneAttendKernel AttendSkipKernel();

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_
