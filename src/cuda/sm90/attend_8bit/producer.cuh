// The producer of the 8-bit attend kernel: a warp for K (and Q), one for V, one that takes tiles. K and V come as tile
// images (common/attend/images.h), one bulk copy per step whatever the cache's layout is, so there are no tensor maps,
// no page tables and no ragged ends here. What a step's integers are worth is asked for a step before it is needed.
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
      if (keys_.key_tiles() > 0) LookAhead();
#pragma unroll 1
      for (int left = keys_.key_tiles(); left > 0; --left) SendKeys(left > 1);
#pragma unroll 1
      for (int j = 0; j < keys_.mean_tiles(); ++j) SendMeans(j == 0);
    }
    if (!is_v_) Finish();
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;

  // The sequence's first image of the head: of its keys, or of its means.
  __device__ __forceinline__ int64_t FirstImage(bool means) const {
    const Work& work = keys_.work();
    const ImageSet& set = means ? p_.images.means : p_.images.keys;
    int base = work.sequence * (means ? p_.means_each : p_.keys_each);
    if (p_.cu_seqlens_k && !p_.page_size) {
      base = (means ? p_.by_mean_image(work.k_begin) : work.k_begin / kImageKeys) + work.sequence;
    }
    return work.kv_head * set.rows + base;
  }

  // This lane's word of an image's scales: K's in the lanes from 0 on, V's in those from 8 on.
  __device__ __forceinline__ uint32_t ScaleWord(const ImageSet& set, int64_t image) const {
    const ImageScale* const scale = (lane_ & 8 ? set.v_scale : set.k_scale) + image;
    return __ldg(reinterpret_cast<const uint32_t*>(scale) + lane_ % 8);
  }

  __device__ __forceinline__ int64_t ImageAt(int position) const {
    if (position == kAbsent) return p_.kv_heads * p_.images.keys.rows; // of zeros
    return FirstImage(false) + position / kImageKeys;
  }

  // The next key tile, and its scales.
  __device__ __forceinline__ void LookAhead() {
    position_ = keys_.NextKeys();
    if (!is_v_) scale_word_ = ScaleWord(p_.images.keys, ImageAt(position_));
  }

  __device__ __forceinline__ void SendKeys(bool more) {
    const int position = position_;
    const uint32_t scale_word = scale_word_;
    if (more) LookAhead();
    if (!is_v_) {
      ScaledKeyTile& tile = Describe(scale_word);
      const bool any = __any_sync(~0u, lane_ >= 1 && lane_ <= 4 && scale_word != 0);
      if (any) SpreadColumns<kKeys>(__shfl_sync(~0u, scale_word, lane_ + 1), lane_, tile.not_finite);
      if (lane_ < kKeys / 16) tile.position[lane_] = position == kAbsent ? kAbsent : position + 16 * lane_;
      if (lane_ == 0) {
        tile.mode = position > safe_ - kKeys || any ? KeyMode::kMasked : KeyMode::kPlain;
        tile.any_not_finite = any;
      }
      __syncwarp();
    }
    Send(p_.images.keys, ImageAt(position));
  }

  // Images of means begin at multiples of 128 blocks. Columns past the last block that all rows see are not wanted, and
  // what is no number in V has become zero, so nothing of them reaches a row.
  __device__ __forceinline__ void SendMeans(bool first) {
    const int block = keys_.NextMeans(first);
    const int64_t image = FirstImage(true) + block / kImageKeys;
    if (!is_v_) {
      const uint32_t scale_word = ScaleWord(p_.images.means, image), wanted = keys_.WantedMeans(0);
      ScaledKeyTile& tile = Describe(scale_word);
      const uint32_t columns = __shfl_sync(~0u, scale_word, lane_ + 1) | __shfl_sync(~0u, scale_word, lane_ + 9);
      const bool any = __any_sync(~0u, lane_ < 4 && columns != 0);
      SpreadColumns<kKeys>(wanted, lane_, tile.wanted);
      if (any) SpreadColumns<kKeys>(columns, lane_, tile.not_finite);
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
    Send(p_.images.means, image);
  }

  // The description of the step that is sent next, with its scales.
  __device__ __forceinline__ ScaledKeyTile& Describe(uint32_t scale_word) {
    ScaledKeyTile& tile = sm_.key_tiles[ring_.stage + ring_.parity * SHAPE::kStages];
    if (lane_ == 0) tile.k_scale = __uint_as_float(scale_word);
    if (lane_ == 8) tile.v_scale = __uint_as_float(scale_word);
    return tile;
  }

  __device__ __forceinline__ void Send(const ImageSet& set, int64_t image) {
    const int stage = __shfl_sync(~0u, ring_.stage, 0);
    BarrierWait(is_v_ ? &sm_.v_empty[stage] : &sm_.k_empty[stage], ring_.parity ^ 1);
    if (ElectOne()) {
      uint64_t* const full = is_v_ ? &sm_.v_full[stage] : &sm_.k_full[stage];
      BarrierArriveExpect(full, kImageBytes);
      BulkLoadBytes(is_v_ ? sm_.v[stage] : sm_.k[stage], (is_v_ ? set.v : set.k) + image * kImageBytes, kImageBytes,
                    full);
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
  int safe_;            // keys below this position are seen by every row
  int position_;        // of the next key tile's first key,
  uint32_t scale_word_; // and this lane's word of its scales
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PRODUCER_CUH_
