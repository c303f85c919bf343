// The producer of the 8-bit attend kernel: a warp for K (and Q), one for V, one that takes tiles. K and V come as tile
// images (common/attend/images.h), with what an integer of theirs is worth: two bulk copies per step whatever the
// cache's layout is. So there are no tensor maps, no page tables, no ragged ends and no loads here. A lone warp takes
// some 8 cycles per instruction, and two steps' worth of math leave it 1,300: what a tile's steps share is computed
// once.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PRODUCER_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PRODUCER_CUH_

#include "cuda/sm90/attend/loading_side.cuh"
#include "cuda/sm90/attend_8bit/shared_memory.cuh"

namespace flashprefill::cuda {

template <class SHAPE>
class ImageProducer {
 public:
  static constexpr int kLoaders = 2; // warps
  static constexpr int kThreads = 96;

  __device__ __forceinline__ ImageProducer(const Attend8Params& p, SharedMemory8<SHAPE>& shared)
      : p_(p),
        sm_(shared),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)), // so the compiler knows that a warp agrees on it
        is_v_(warp_ == 1),
        keys_(p) {}

  __device__ __forceinline__ void Run() {
    if (warp_ == kLoaders) {
      StartTaking(p_, sm_);
      while (TakeTile(p_, sm_)) continue;
      return;
    }
    for (;; ++tiles_) {
      BarrierWait(&sm_.work_full, tiles_ & 1);
      const Work work = sm_.work;
      const uint64_t word = sm_.words[lane_];
      BarrierArrive(&sm_.work_empty);
      if (work.sequence < 0) break;
      keys_.Start(work, word);
      safe_ = min(work.first_position + 1, work.k_len);
      if (!is_v_) SendTile(keys_.key_tiles() + keys_.mean_tiles());
      first_image_ = FirstImage(false);
#pragma unroll 1
      for (int j = 0; j < keys_.key_tiles(); ++j) SendKeys();
      first_image_ = FirstImage(true);
#pragma unroll 1
      for (int j = 0; j < keys_.mean_tiles(); ++j) SendMeans(j == 0);
    }
    if (!is_v_) Finish();
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;

  // The sequence's first image of the head: of its keys, or of its means.
  __device__ __forceinline__ int FirstImage(bool means) const {
    const Work& work = keys_.work();
    const ImageSet& set = means ? p_.images.means : p_.images.keys;
    int base = work.sequence * (means ? p_.means_each : p_.keys_each);
    if (p_.cu_seqlens_k && !p_.page_size) {
      base = (means ? p_.by_mean_image(work.k_begin) : work.k_begin / kImageKeys) + work.sequence;
    }
    return work.kv_head * static_cast<int>(set.rows) + base;
  }

  __device__ __forceinline__ void SendKeys() {
    const int position = keys_.NextKeys();
    const int slot = ring_.stage + ring_.parity * SHAPE::kStages;
    if (!is_v_) {
      ScaledKeyTile& tile = sm_.key_tiles[slot];
      if (lane_ < kKeys / 16) tile.position[lane_] = position == kAbsent ? kAbsent : position + 16 * lane_;
      if (lane_ == 0) tile.mode = position > safe_ - kKeys ? KeyMode::kMasked : KeyMode::kPlain;
      __syncwarp();
    }
    // Absent keys: the image of zeros.
    Send(p_.images.keys, position == kAbsent ? p_.zero_image : first_image_ + position / kImageKeys, slot);
  }

  // Images of means begin at multiples of 128 blocks. Columns past the last block that all rows see are not wanted, and
  // what is no number in V has become zero, so nothing of them reaches a row.
  __device__ __forceinline__ void SendMeans(bool first) {
    const int block = keys_.NextMeans(first);
    const int image = first_image_ + block / kImageKeys, slot = ring_.stage + ring_.parity * SHAPE::kStages;
    if (!is_v_) {
      const ImageSet& set = p_.images.means;
      const uint32_t wanted = keys_.WantedMeans(0);
      ScaledKeyTile& tile = sm_.key_tiles[slot];
      uint32_t columns = 0;
      if (lane_ < 4) columns = set.k_scale[image].not_finite[lane_] | set.v_scale[image].not_finite[lane_];
      SpreadColumns<kKeys>(wanted, lane_, tile.wanted);
      if (lane_ < 4) tile.not_finite[lane_] = columns;
      const bool any = __any_sync(~0u, columns != 0);
      if (lane_ == 0) {
        int column, keys;
        const bool shorter = HasShortBlock<kKeys>(p_, keys_.work(), block, &column, &keys);
        tile.mode = KeyMode::kMeans;
        tile.any_not_finite = any;
        tile.short_column = column;
        if (shorter) tile.short_bias = log2f(static_cast<float>(keys)) - p_.mean_bias_log2;
      }
      __syncwarp();
    }
    Send(p_.images.means, image, slot);
  }

  __device__ __forceinline__ void Send(const ImageSet& set, int image, int slot) {
    const int stage = __shfl_sync(~0u, ring_.stage, 0);
    BarrierWait(is_v_ ? &sm_.v_empty[stage] : &sm_.k_empty[stage], ring_.parity ^ 1);
    if (ElectOne()) {
      uint64_t* const full = is_v_ ? &sm_.v_full[stage] : &sm_.k_full[stage];
      BarrierArriveExpect(full, kImageBytes + sizeof(ImageScale));
      BulkLoadBytes(is_v_ ? sm_.v[stage] : sm_.k[stage], (is_v_ ? set.v : set.k) + int64_t{image} * kImageBytes,
                    kImageBytes, full);
      BulkLoadBytes(is_v_ ? &sm_.key_tiles[slot].v : &sm_.key_tiles[slot].k,
                    (is_v_ ? set.v_scale : set.k_scale) + image, sizeof(ImageScale), full);
    }
    __syncwarp();
    ring_.Advance(SHAPE::kStages);
  }

  // Q in 16 bits, and the center that was taken from the keys.
  __device__ __forceinline__ void SendTile(int steps) {
    const Work& work = keys_.work();
    BarrierWait(&sm_.q_empty[0], (tiles_ & 1) ^ 1);
    if (ElectOne()) {
      sm_.tiles[tiles_ % SharedMemory8<SHAPE>::kTiles] = InfoOf(p_, work, steps);
      LoadQueries<SHAPE>(p_, sm_, work, 0, sizeof sm_.center);
      BulkLoadBytes(sm_.center,
                    p_.images.centers + (int64_t{work.sequence} * p_.kv_heads + work.kv_head) * kImageColumns,
                    sizeof sm_.center, &sm_.q_full[0]);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void Finish() {
    BarrierWait(&sm_.q_empty[0], (tiles_ & 1) ^ 1);
    if (lane_ == 0) {
      sm_.tiles[tiles_ % SharedMemory8<SHAPE>::kTiles].key_tiles = 0;
      BarrierArrive(&sm_.q_full[0]);
    }
  }

  const Attend8Params& p_;
  SharedMemory8<SHAPE>& sm_;
  const int lane_, warp_;
  const bool is_v_;
  RingPosition ring_;  // of K or V
  uint32_t tiles_ = 0; // that were sent

  KeyIterator<SHAPE> keys_;
  int first_image_; // of the tile's head and sequence
  int safe_;        // keys below this position are seen by every row
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PRODUCER_CUH_
