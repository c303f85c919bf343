// The producer of the attend kernel for masks with key lists: after a tile's kept blocks come the keys of its segment's
// list, 128 (64) at a time, by rows from wherever they lie. To the math side they are key tiles like others. Most have
// no mask: keys of a list lie before the segment, so that every row sees all of them.
//
// Everything comes by rows here, blocks too, through the copies of AttendProducer that serve pages of a few tokens:
// bulk copies besides them did not fit the loading side's registers. A lane knows one or two rows of each step. A row's
// way from the list to the stage takes two loads that depend on each other (its number; the page, or the bit of its
// block), so numbers are asked for two steps ahead, and what they lead to one step ahead.
//
// The loading warps' instructions decide how fast this kernel is, so that nearly all steps have a short way of their
// own (FindEven). At 128K tokens lists have 0.72 of the rate of blocks without it, and 0.87 with it.
//
// If blocks don't fill the first step, the list's first keys do.
//
// A mask made by hand may list keys that lie in kept blocks: those are left out, a zero row and a score of -inf. The
// warp that takes tiles looks whether there can be any (TileList::check). And it may list keys that lie between a
// tile's rows. Those come as tiles of neighbouring positions from the tile's first row on, in which most columns are
// absent and the positions decide what a row sees: there are at most 127 such keys.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_GATHER_PRODUCER_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_GATHER_PRODUCER_CUH_

#include "cuda/sm90/attend/producer.cuh"

namespace flashprefill::cuda {

template <class SHAPE>
class GatherProducer : public AttendProducer<SHAPE, Loading::kGather> {
  using Base = AttendProducer<SHAPE, Loading::kGather>;

 public:
  using Base::kLoaders;
  static_assert(Base::kThreads == kLoaders * 32, "the warp that takes tiles is one of the loaders");

  __device__ __forceinline__ GatherProducer(const AttendParams& p, GatherMemory<SHAPE>& shared) : Base(p, shared) {}

  __device__ __forceinline__ void Run() {
    if (warp_ == kLoaders - 1) {
      StartTaking(p_, sm_);
      Take();
    }
    uint32_t parity = 0;
    while (true) {
      BarrierWait(&sm_.work_full, parity);
      parity ^= 1;
      const Work work = sm_.work;
      const uint64_t word = sm_.words[lane_];
      list_ = Memory().list;
      BarrierArrive(&sm_.work_empty);
      if (work.sequence < 0) break;
      AskForList(0);
      keys_.Start(work, word);
      safe_ = min(work.first_position + 1, work.k_len);
      masked_ = true;
      pages_ = p_.block_table + work.sequence * p_.block_table_stride;
      first_ = data_ + work.kv_head * stride_[2];
      if (p_.page_size == 0) first_ += p_.cu_seqlens_k ? work.k_begin * stride_[1] : work.sequence * stride_[0];
      if (keys_.keeps_all()) list_.safe = list_.end = 0;
      block_tiles_ = keys_.key_tiles();
      near_end_ = block_tiles_ + (list_.end > list_.safe ? (work.tokens - 1 + kKeys - 1) / kKeys : 0);
      const int room = keys_.missing_keys();
      filled_ = !list_.check && list_.safe >= room ? room : 0;
      const int steps = near_end_ + (list_.safe - filled_ + kKeys - 1) / kKeys;
      if (!is_v_ && rank_ == 0) this->SendQueries(steps);
      FindEven(steps);
      LookAhead(0);
#pragma unroll 1
      for (int j = 0; j < steps; ++j) {
        SendStep(j, steps);
        if (warp_ == kLoaders - 1 && j == min(1, steps - 1)) Take();
      }
    }
    if (!is_v_ && rank_ == 0) this->Finish();
  }

 private:
  using Base::data_, Base::is_v_, Base::keys_, Base::lane_, Base::masked_, Base::p_, Base::page_, Base::pages_,
      Base::position_, Base::rank_, Base::ring_position_, Base::safe_, Base::sm_, Base::stride_, Base::warp_;
  using Base::kKeys, Base::kNowhere, Base::kPlaces, Base::kRowsPerWarp;

  __device__ __forceinline__ GatherMemory<SHAPE>& Memory() const { return static_cast<GatherMemory<SHAPE>&>(sm_); }

  // ---------------------------------------------------------------- the list of a tile

  __device__ __forceinline__ void Take() {
    TileList list{};
    TakeTile(
        p_, sm_, [&](const Work& work) { list = FindList(p_, p_.listed, work); },
        [&] {
          if (lane_ == 0) Memory().list = list;
        });
  }

  // ---------------------------------------------------------------- steps

  __device__ __forceinline__ int Row(int r) const { return rank_ * kRowsPerWarp + r * 32 + lane_; } // of a step

  // Finds the positions of this lane's rows of a step, -1 where there is none, and asks for what they lead to, and for
  // the list's keys of the step after it.
  __device__ __forceinline__ void LookAhead(int step) {
    const Work& work = keys_.work();
    if (step < block_tiles_) {
      position_ = keys_.NextKeys();
      if (position_ == kAbsent && filled_ > 0) position_ = -kKeys; // a position that every row sees, and no key has
    }
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      if (step < block_tiles_) {
        place_[r] = this->RowPosition(position_, r);
        if (place_[r] < 0) place_[r] = listed_[r]; // of the first step, for which the list's first keys were asked for
        if (place_[r] >= work.k_len) place_[r] = -1;
      } else if (step < near_end_) {
        place_[r] = NearPlace(work.first_position + 1 + (step - block_tiles_) * kKeys + Row(r));
      }
    }
    if (step >= near_end_) TakeListed();
    if (step + 1 >= near_end_) AskForStep(step + 1);
    if (p_.page_size > 0) {
#pragma unroll
      for (int r = 0; r < kPlaces; ++r) {
        page_[r] = place_[r] < 0 ? 0 : __ldg(pages_ + min(p_.by_page(place_[r]), p_.pages_per_seq - 1));
      }
    }
    if (step >= block_tiles_ && list_.check) {
      const auto* const bits = reinterpret_cast<const uint32_t*>(p_.bits + work.mask_row * p_.words);
#pragma unroll
      for (int r = 0; r < kPlaces; ++r) {
        kept_[r] = place_[r] < 0 ? 0 : __ldg(bits + min(p_.by_block(place_[r]) / 32, 2 * p_.words - 1));
      }
    }
  }

  // The position, if the list has it among the keys that only some rows see. Seldom, so it may take its time.
  __device__ __forceinline__ int NearPlace(int position) const {
    bool listed = false;
#pragma unroll 1
    for (int i = list_.safe; i < list_.end; ++i) listed |= __ldg(list_.keys + i) == position;
    return listed && position < keys_.work().k_len ? position : -1;
  }

  __device__ __forceinline__ bool IsEven(int step) const { return step >= even_begin_ && step < even_end_; }

  __device__ __forceinline__ void SendStep(int step, int steps) {
    uint32_t offset[kPlaces]; // of this lane's rows, from the first key or page on
    bool all = true;
    if (IsEven(step)) {
      FindEvenRows(step, steps, offset);
    } else {
      all = FindRows(step, steps, offset);
    }
    this->CopyFrom([&] { return first_; }, offset, !all);
    if (step + 1 == even_end_) TakeListed(); // the ragged step is next
  }

  // The offsets of any step; false if some rows are nowhere.
  __device__ __forceinline__ bool FindRows(int step, int steps, uint32_t (&offset)[kPlaces]) {
    const uint32_t* const units = is_v_ ? p_.v_units : p_.k_units;
    const bool check = step >= block_tiles_ && list_.check;
    uint32_t wanted[kPlaces]; // of the warp's rows
    bool all = true;
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      bool there = place_[r] >= 0;
      if (check && there) there = (kept_[r] >> p_.by_block(place_[r]) % 32 & 1) == 0;
      if (p_.page_size > 0) {
        const int in_page = place_[r] - p_.by_page(max(place_[r], 0)) * p_.page_size;
        offset[r] = ClampTo(page_[r], p_.page_count - 1) * units[0] + in_page * units[1];
      } else {
        offset[r] = place_[r] * units[1];
      }
      if (!there) offset[r] = kNowhere;
      wanted[r] = __ballot_sync(~0u, there);
      all &= wanted[r] == ~0u;
    }
    if (!is_v_) Describe(step, step + 1 == steps, wanted, all);
    if (step + 1 < steps && !IsEven(step + 1)) LookAhead(step + 1);
    return all;
  }

  // Even steps: all rows are there and seen by all rows of the tile, and where they lie needs no look-up. Those of the
  // list but for its last, ragged one; or of a tile that keeps everything, the blocks below the diagonal's. They are
  // nearly all steps, and have a short way.
  __device__ __forceinline__ void FindEven(int steps) {
    even_begin_ = even_end_ = steps;
    if (p_.page_size > 0) return;
    if (keys_.keeps_all()) { // after the first step it is whole steps down to position 0
      even_begin_ = max(1, steps - max(0, safe_) / kKeys);
    } else if (!list_.check && list_.safe - filled_ >= kKeys) {
      even_begin_ = near_end_;
      even_end_ = near_end_ + (list_.safe - filled_) / kKeys;
    }
  }

  // Their offsets. A list's keys are never trusted.
  __device__ __forceinline__ void FindEvenRows(int step, int steps, uint32_t (&offset)[kPlaces]) {
    const uint32_t unit = is_v_ ? p_.v_units[1] : p_.k_units[1];
    const bool of_list = step >= near_end_;
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      const int key = of_list ? listed_[r] : (steps - 1 - step) * kKeys + Row(r);
      offset[r] = min(static_cast<uint32_t>(key), static_cast<uint32_t>(safe_ - 1)) * unit;
    }
    if (of_list) AskForStep(step + 1);
    if (!is_v_ && lane_ == 0) {
      KeyTile& tile = sm_.key_tiles[ring_position_.stage + ring_position_.parity * SHAPE::kStages];
      if (rank_ == 0) {
        tile.mode = KeyMode::kPlain;
      } else {
        tile.SetSecondMode(KeyMode::kPlain);
      }
    }
  }

  // The next step is one of the list whose keys have come.
  __device__ __forceinline__ void TakeListed() {
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) place_[r] = listed_[r] < safe_ ? listed_[r] : -1;
  }

  // Asks for the list's keys of a step, or from key `first` of the list on.
  __device__ __forceinline__ void AskForStep(int step) { AskForList((step - near_end_) * kKeys + filled_); }
  __device__ __forceinline__ void AskForList(int first) {
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      const int index = first + Row(r);
      listed_[r] = index < list_.safe ? __ldg(list_.keys + index) : -1;
    }
  }

  // Each of the K warps its half of the columns. Bits are written where either half may lack some: in the last step,
  // and where keys are looked at one by one. (What else is absent is no key at all, of a list that is none.)
  __device__ __forceinline__ void Describe(int step, bool last, const uint32_t (&wanted)[kPlaces], bool all) {
    KeyTile& tile = sm_.key_tiles[ring_position_.stage + ring_position_.parity * SHAPE::kStages];
    KeyMode mode = KeyMode::kPlain;
    if (step >= block_tiles_) {
      mode = step < near_end_ ? KeyMode::kNear : all ? KeyMode::kPlain : KeyMode::kListed;
      if ((last || list_.check || mode != KeyMode::kPlain) && lane_ < kPlaces) {
        SpreadColumnsOf(rank_ * kPlaces + lane_, lane_ == 0 ? wanted[0] : wanted[kPlaces - 1], tile.wanted);
      }
      if (mode == KeyMode::kNear && lane_ < kKeys / 16 && rank_ == 0) {
        tile.position[lane_] = keys_.work().first_position + 1 + (step - block_tiles_) * kKeys + lane_ * 16;
      }
      if (lane_ == 0 && rank_ == 0) tile.mode = mode;
    } else if (rank_ == 0) {
      this->DescribeKeys(position_);
    }
    if (lane_ == 0 && rank_ == 1) tile.SetSecondMode(mode);
    __syncwarp();
  }

  TileList list_;
  const uint16_t* first_;     // of the sequence's keys, or of the cache's pages
  int block_tiles_;           // steps of the tile that are blocks; then those of near keys, and
  int near_end_;              // from here on those of the list
  int filled_;                // keys of the list that fill up the first step
  int even_begin_, even_end_; // even steps
  int place_[kPlaces];        // positions of this lane's rows of the next step
  int listed_[kPlaces];       // of the step after it, if it is one of the list
  uint32_t kept_[kPlaces];    // words of the mask
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_GATHER_PRODUCER_CUH_
