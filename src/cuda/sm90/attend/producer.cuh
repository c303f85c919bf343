// The producer of the attend kernel: one warp that keeps the ring of K full, and one for V (two each where tiles come
// in pieces). They take tiles, walk their bitmap (key_iterator.cuh), and alone know block ids: the math side sees a
// stream of key tiles and is told which of them need a mask. So sparse attention runs at the speed of dense.
//
// A warp by itself takes some 8 cycles per instruction, and has 2,000 to 3,000 a step. When one warp did all of this
// for K and V in turn, it was the slowest part of the kernel; so the common step is kept short, K and V have their own
// warps, and page numbers are asked for a step before they are needed.
//
// Bulk copies write whole chunks, so the last chunk of a sequence may bring keys past its end. K's are masked. V's
// would do harm if they held NaN (0 * NaN), so that one chunk of V is copied row by row, with zeros past the end.
// Absent chunks are read from outside the tensor, which yields zeros.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_

#include <type_traits>

#include "core/skip.h"
#include "cuda/sm90/attend/ascending_iterator.cuh"
#include "cuda/sm90/attend/loading_side.cuh"

namespace flashprefill::cuda {

template <class SHAPE, Loading LOADING>
class AttendProducer {
  static constexpr bool kRows = LoadsRows(LOADING);
  static constexpr bool kAscending = LOADING == Loading::kAscending;
  static constexpr bool kTeams = LOADING != Loading::kTiles && !kAscending;
  static constexpr bool kEachArrives = LOADING == Loading::kGather; // both warps of a team say what they have described

 public:
  static constexpr int kTeamWarps = kTeams ? 2 : 1;  // for K, and as many for V
  static constexpr int kLoaders = 2 * kTeamWarps;    // warps
  static constexpr int kThreads = kTeams ? 128 : 96; // with the warp that takes tiles; teams have none to spare for it
  // Arrivals that make a K or V stage full: a warp's each, and by rows the leader's and one a thread when its own
  // copies are done.
  static constexpr int kFullArrivals = kRows ? (kEachArrives ? kTeamWarps : 1) + kTeamWarps * 32 : kTeamWarps;

  __device__ __forceinline__ AttendProducer(const AttendParams& p, SharedMemory<SHAPE>& shared)
      : p_(p),
        sm_(shared),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)), // so the compiler knows that a warp agrees on it
        rank_(warp_ % kTeamWarps),
        is_v_(warp_ >= kTeamWarps),
        data_(static_cast<const uint16_t*>(is_v_ ? p.v_data : p.k_data)),
        stride_(is_v_ ? p.v_stride : p.k_stride),
        map_(is_v_ ? &p.v : &p.k),
        stages_(is_v_ ? shared.v[0] : shared.k[0]),
        full_(is_v_ ? shared.v_full : shared.k_full),
        empty_(is_v_ ? shared.v_empty : shared.k_empty),
        keys_(p) {}

  __device__ __forceinline__ void Run() {
    if (warp_ == (kTeams ? kLoaders - 1 : kLoaders)) {
      StartTaking(p_, sm_);
      if (kTeams) TakeTile(p_, sm_);
    }
    if (!kTeams && warp_ == kLoaders) {
      while (TakeTile(p_, sm_)) continue;
      return;
    }
    uint32_t parity = 0;
    while (true) {
      BarrierWait(&sm_.work_full, parity);
      parity ^= 1;
      const Work work = sm_.work;
      const uint64_t word = sm_.words[lane_];
      BarrierArrive(&sm_.work_empty);
      if (work.sequence < 0) break;
      keys_.Start(work, word);
      safe_ = min(work.first_position + 1, work.k_len);
      masked_ = true;
      pages_ = p_.block_table + work.sequence * p_.block_table_stride;
      const int key_tiles = keys_.key_tiles(), steps = key_tiles + keys_.mean_tiles();
      if (!is_v_ && rank_ == 0) SendQueries(steps);
      if (key_tiles > 0) LookAhead();
#pragma unroll 1
      for (int j = 0; j < steps; ++j) {
        if (kAscending && is_v_ && j > 0 && j < key_tiles && !IsWanted()) {
          LeaveOut(j + 1 < key_tiles);
        } else if (j < key_tiles) {
          SendKeys(j == 0, j + 1 < key_tiles);
        } else {
          SendMeans(j == key_tiles);
        }
        // V's is the team with time to spare, once its ring is full.
        if (kTeams && warp_ == kLoaders - 1 && j == min(1, steps - 1)) TakeTile(p_, sm_);
      }
    }
    if (!is_v_ && rank_ == 0) Finish();
  }

 protected: // the gathering producer's too
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kPanels = SHAPE::kPanels;
  static constexpr int kPieces = SHAPE::kHeadDim / 8;           // 16-byte pieces of a row
  static constexpr int kRowsPerWarp = kKeys / 2;                // by rows
  static constexpr int kPlaces = kRows ? kRowsPerWarp / 32 : 1; // that a lane looks up: of its chunk, or of its rows
  static constexpr uint32_t kNowhere = ~0u;
  using Memory = SharedMemory<SHAPE>;

  // ---------------------------------------------------------------- tiles of keys

  // Finds the next key tile, and asks for its pages: the answers take some 700 cycles and are used a step later.
  __device__ __forceinline__ void LookAhead() {
    position_ = keys_.NextKeys();
    const Work& work = keys_.work();
    if (p_.page_size == 0) {
      token_[0] = position_ < work.k_len ? work.k_begin + position_ : p_.absent_token;
      return;
    }
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      const int position = kRows ? RowPosition(position_, r) : position_;
      token_[r] = p_.absent_token;
      page_[r] = 0;
      if (position < work.k_len) {
        const int column = p_.by_page(position);
        token_[r] = position - column * p_.page_size;
        page_[r] = __ldg(pages_ + min(column, p_.pages_per_seq - 1));
      }
    }
  }

  __device__ __forceinline__ void SendKeys(bool first, bool more) {
    const int mine = position_;
    int token[kPlaces], page[kPlaces];
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      token[r] = token_[r];
      page[r] = ClampTo(page_[r], p_.page_count - 1);
    }
    if (p_.page_size == 0) page[0] = p_.cu_seqlens_k ? 0 : keys_.work().sequence;
    if (more) LookAhead();
    if (!is_v_ && rank_ == 0) DescribeKeys(mine);
    if constexpr (kRows) {
      SendRows(token, page);
    } else {
      SendChunks(mine, token[0], page[0], first);
    }
  }

  // Loading::kAscending: whether one of the warpgroups counts V's next step. The stage is free then, so that the last
  // decision on it has been seen.
  __device__ __forceinline__ bool IsWanted() {
    auto& sm = static_cast<SkipMemory<SHAPE>&>(sm_);
    const int stage = ring_position_.stage;
    BarrierWait(&empty_[stage], ring_position_.parity ^ 1);
    for (int group = 0; group < 2; ++group) { // the first one is mostly ahead
      BarrierWait(&sm.decided[group][stage], ring_position_.parity);
      if (*reinterpret_cast<const volatile uint32_t*>(sm.counts[group][stage]) != 0) return true;
    }
    return false;
  }

  // A step of V that nobody counts: an empty stage.
  __device__ __forceinline__ void LeaveOut(bool more) {
    if (more) LookAhead();
    if (lane_ == 0) BarrierArrive(&full_[ring_position_.stage]);
    __syncwarp();
    ring_position_.Advance(SHAPE::kStages);
  }

  // Where positions fall, no tile has a mask after the first that has none.
  __device__ __forceinline__ void DescribeKeys(int mine) {
    KeyTile& tile = sm_.key_tiles[ring_position_.stage + ring_position_.parity * SHAPE::kStages];
    if (kAscending || masked_) masked_ = __any_sync(~0u, mine > safe_ - (1 << p_.chunk_shift));
    if (masked_) {
      const int column = min(lane_, kKeys / 16 - 1) * 16;
      const int position = __shfl_sync(~0u, mine, column >> p_.chunk_shift);
      const int in_chunk = column & ((1 << p_.chunk_shift) - 1);
      if (lane_ < kKeys / 16) tile.position[lane_] = position == kAbsent ? kAbsent : position + in_chunk;
    }
    if (lane_ == 0) tile.mode = masked_ ? KeyMode::kMasked : KeyMode::kPlain;
    __syncwarp();
  }

  __device__ __forceinline__ void SendChunks(int position, int token, int page, bool first) {
    const Work& work = keys_.work();
    const int chunks = keys_.chunks();
    // V's chunk that runs past the sequence's end goes by rows, unless that is the tensor's end too. It is the highest.
    uint32_t by_rows = 0;
    if (is_v_ && (kAscending || first)) {
      const bool ragged = position < work.k_len && position + (1 << p_.chunk_shift) > work.k_len &&
                          (p_.page_size || p_.cu_seqlens_k || work.k_len < p_.max_k);
      by_rows = __ballot_sync(~0u, ragged) & ((2u << (chunks - 1)) - 1);
    }
    // So that the compiler knows that they are uniform, and before the wait: any instruction after it delays the copy.
    const int stage = __shfl_sync(~0u, ring_position_.stage, 0), head = __shfl_sync(~0u, work.kv_head, 0);
    BarrierWait(&empty_[stage], ring_position_.parity ^ 1);
    uint8_t* const to = stages_ + stage * Memory::kKeyBytes;
    uint64_t* const full = &full_[stage];
    if (chunks == 1 && by_rows == 0) {
      if (rank_ == 0 && ElectOne()) {
        BarrierArriveExpect(full, Memory::kKeyBytes);
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          BulkLoad(to + i * Memory::kKeyPanelBytes, map_, full, i * kPanelColumns, head, token, page);
        }
      }
    } else {
      if (by_rows) {
        const int which = __ffs(by_rows) - 1;
        const int rows = work.k_len - __shfl_sync(~0u, position, which);
        const uint16_t* from = data_ + head * stride_[2] + __shfl_sync(~0u, page, which) * stride_[0] +
                               __shfl_sync(~0u, token, which) * stride_[1];
        if (Mine(which)) CopyRows(to, which << p_.chunk_shift, 1 << p_.chunk_shift, 0, rows, from, stride_[1]);
      }
      const int chunk_bytes = Memory::kPanelRowsBytes << p_.chunk_shift;
      if (lane_ == 0 && rank_ == 0) BarrierArriveExpect(full, kPanels * chunk_bytes * (chunks - __popc(by_rows)));
      __syncwarp();
      SendEach(to, full, head, token, page, by_rows);
    }
    ArriveToo(full);
    ring_position_.Advance(SHAPE::kStages);
  }

  // A bulk copy per panel for each chunk of this warp: lane c holds chunk c's coordinates. One lane starts all of them,
  // after the coordinates of several have come to it at once; lanes that each start theirs take turns of 100 ns.
  __device__ __forceinline__ void SendEach(uint8_t* to, uint64_t* full, int head, int token, int page,
                                           uint32_t left_out) {
    constexpr int kAtOnce = 4;
    const int chunks = keys_.chunks();
    const int chunk_bytes = Memory::kPanelRowsBytes << p_.chunk_shift;
    const auto send = [&](int chunk, int its_token, int its_page) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        BulkLoad(to + panel * Memory::kKeyPanelBytes + chunk * chunk_bytes, map_, full, panel * kPanelColumns, head,
                 its_token, its_page);
      }
    };
    if (left_out == 0 && chunks == kAtOnce * kTeamWarps) { // pages of 16 (d256: of 8): all at once
      int tokens[kAtOnce], pages[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        tokens[i] = __shfl_sync(~0u, token, rank_ + i * kTeamWarps);
        pages[i] = __shfl_sync(~0u, page, rank_ + i * kTeamWarps);
      }
      if (ElectOne()) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) send(rank_ + i * kTeamWarps, tokens[i], pages[i]);
      }
      __syncwarp();
      return;
    }
#pragma unroll 1
    for (int chunk = rank_; chunk < chunks; chunk += kTeamWarps) {
      const int its_token = __shfl_sync(~0u, token, chunk), its_page = __shfl_sync(~0u, page, chunk);
      if ((left_out >> chunk & 1) == 0 && ElectOne()) send(chunk, its_token, its_page);
      __syncwarp();
    }
  }

  // The arrivals on a full barrier besides the team leader's, which says how many bytes will come.
  __device__ __forceinline__ void ArriveToo(uint64_t* full) {
    if constexpr (kRows) {
      BarrierArriveAfterCopies(full);
    } else if (kTeams && rank_ != 0 && ElectOne()) {
      BarrierArrive(full);
    }
  }

  // Whether this warp of its team copies that chunk.
  __device__ __forceinline__ bool Mine(int chunk) const { return chunk % kTeamWarps == rank_; }

  // The position of row r * 32 + lane of this warp's half of a tile whose chunks lie at `chunk_position`.
  __device__ __forceinline__ int RowPosition(int chunk_position, int r) const {
    const int row = rank_ * kRowsPerWarp + r * 32 + lane_;
    return __shfl_sync(~0u, chunk_position, row >> p_.chunk_shift) + (row & ((1 << p_.chunk_shift) - 1));
  }

  // Keys row by row, half of them each warp, whatever the pages are like. A lane finds the addresses of one or
  // two rows.
  __device__ __forceinline__ void SendRows(const int (&token)[kPlaces], const int (&page)[kPlaces]) {
    const uint32_t* const units = is_v_ ? p_.v_units : p_.k_units;
    uint32_t offset[kPlaces]; // in units of 16 bytes
    bool all = true;
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) {
      const bool there = token[r] != p_.absent_token;
      all &= there;
      offset[r] = page[r] * units[0] + token[r] * units[1];
      if (!there) offset[r] = is_v_ ? kNowhere : 0; // K's are masked, so that any row serves
    }
    CopyFrom([&] { return data_ + keys_.work().kv_head * stride_[2]; }, offset, is_v_ && __any_sync(~0u, !all));
  }

  // Copies the rows that this warp's lanes have found, `offset` from first(), which is asked when the stage is free; if
  // `checked`, some are nowhere, and get zeros. Eight lanes copy per row's panel, so that an address serves all panels
  // of four rows; the swizzle repeats every 8 rows, so that there are two addresses to write to, but for constants.
  // Addresses go from the lanes that know them to those that copy through shared memory, four at once: by shuffles each
  // needs an index of its own.
  template <class First>
  __device__ __forceinline__ void CopyFrom(First&& first, const uint32_t (&offset)[kPlaces], bool checked) {
    constexpr int kBatches = kRowsPerWarp / 16; // of 16 rows, four a lane
    constexpr bool kEarly = kEachArrives;       // offsets into registers before the stage is free, where these suffice
    uint32_t* const offsets = sm_.row_offsets[warp_];
#pragma unroll
    for (int r = 0; r < kPlaces; ++r) offsets[r * 32 + lane_ / 16 * 16 + lane_ % 4 * 4 + lane_ / 4 % 4] = offset[r];
    __syncwarp();
    const int piece = lane_ % 8, row = lane_ / 8;
    const auto load = [&](int b) { return LoadShared16(SharedAddress(offsets + b * 16 + row * 4)); };
    uint4 loaded[kBatches];
#pragma unroll
    for (int b = 0; kEarly && b < kBatches; ++b) loaded[b] = load(b);
    BarrierWait(&empty_[ring_position_.stage], ring_position_.parity ^ 1);
    uint64_t* const full = &full_[ring_position_.stage];
    if (lane_ == 0 && (kEachArrives || rank_ == 0)) BarrierArrive(full);
    const uint16_t* const from = first() + piece * 8;
    const uint32_t to = SharedAddress(stages_ + ring_position_.stage * Memory::kKeyBytes) +
                        (rank_ * kRowsPerWarp + row) * Memory::kPanelRowsBytes;
    const uint32_t address[2] = {to + ((piece ^ row) << 4), to + ((piece ^ (row + 4)) << 4)};
    const auto copy = [&](auto check) {
      constexpr bool kCheck = decltype(check)::value;
#pragma unroll(kCheck && !kEarly ? 1 : kBatches)
      for (int b = 0; b < kBatches; ++b) {
        const uint4 four = kEarly ? loaded[b] : load(b);
        const uint32_t at[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto* const source = static_cast<const uint16_t*>(AddUnits16(from, at[i]));
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            AsyncCopy16(address[i % 2] + panel * Memory::kKeyPanelBytes + (b * 16 + i * 4) * Memory::kPanelRowsBytes,
                        source + panel * kPanelColumns,
                        panel * 8 + piece < p_.head_dim / 8 && !(kCheck && at[i] == kNowhere));
          }
        }
      }
    };
    if (checked) {
      copy(std::true_type{});
    } else {
      copy(std::false_type{});
    }
    __syncwarp(); // the offsets are read
    BarrierArriveAfterCopies(full);
    ring_position_.Advance(SHAPE::kStages);
  }

  // ---------------------------------------------------------------- tiles of means

  // They lie together. The first tile, the highest, would run past `full`, where there may be anything; so it begins
  // earlier and ends there. Where that is before the sequence begins, V's first rows are kept out: zeros lie before the
  // first sequence, another one's means before the others. So columns stand alike in every sequence, and a sequence
  // gets the same bits alone and in a batch.
  __device__ __forceinline__ void SendMeans(bool first) {
    const Work& work = keys_.work();
    const bool packed = p_.cu_seqlens_k && !p_.page_size;
    const int row0 = packed ? p_.by_block(work.k_begin) + work.sequence : work.sequence * p_.mean_rows_each;
    int block = keys_.NextMeans(first);
    const int before = max(0, block + kKeys - work.full);
    block -= before;
    if (!is_v_ && rank_ == 0) DescribeMeans(block, before);
    const int row = row0 + block;
    const bool ragged = is_v_ && block < 0 && row0 > 0;
    BarrierWait(&empty_[ring_position_.stage], ring_position_.parity ^ 1);
    uint8_t* const to = stages_ + ring_position_.stage * Memory::kKeyBytes;
    uint64_t* const full = &full_[ring_position_.stage];
    if (rank_ == 0) {
      int bulk_rows = kKeys;
      if (ragged) bulk_rows -= SendMeanParts(to, full, row, -block);
      if (ElectOne()) {
        BarrierArriveExpect(full, kPanels * Memory::kPanelRowsBytes * bulk_rows);
        for (int i = 0; i < (ragged ? 0 : kPanels); ++i) {
          BulkLoad(to + i * Memory::kKeyPanelBytes, is_v_ ? &p_.v_mean : &p_.k_mean, full, i * kPanelColumns,
                   work.kv_head, row, 0);
        }
      }
    }
    ArriveToo(full);
    ring_position_.Advance(SHAPE::kStages);
  }

  // V's tile of means that begins inside, after `absent` rows of zeros: parts of 16 rows, of which the one that is cut
  // goes by rows and those before it are read from outside the tensor. Returns how many rows are no bulk copy's. The
  // copies may arrive before the barrier expects them: it cannot pass without the arrival that follows.
  __device__ __forceinline__ int SendMeanParts(uint8_t* to, uint64_t* full, int row, int absent) {
    constexpr int kPart = kMeanPartRows;
    const int cut_part = absent / kPart * kPart;
    const bool cut = cut_part < absent;
    if (ElectOne()) {
#pragma unroll 1
      for (int part = 0; part < kKeys; part += kPart) {
        if (cut && part == cut_part) continue;
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          BulkLoad(to + i * Memory::kKeyPanelBytes + part * Memory::kPanelRowsBytes, &p_.v_mean_part, full,
                   i * kPanelColumns, keys_.work().kv_head,
                   part >= absent ? row + part : static_cast<int>(p_.mean_rows), 0);
        }
      }
    }
    __syncwarp();
    if (!cut) return 0;
    const int64_t first = keys_.work().kv_head * p_.mean_rows + row + cut_part;
    CopyRows(to, cut_part, kPart, absent - cut_part, kPart,
             static_cast<const uint16_t*>(p_.v_mean_data) + first * p_.head_dim, p_.head_dim);
    return kPart;
  }

  __device__ __forceinline__ void DescribeMeans(int block, int before) {
    KeyTile& tile = sm_.key_tiles[ring_position_.stage + ring_position_.parity * SHAPE::kStages];
    const uint32_t wanted = keys_.WantedMeans(before);
    SpreadColumns<kKeys>(wanted, lane_, tile.wanted);
    if (lane_ == 0) {
      int column, keys;
      const bool shorter = HasShortBlock<kKeys>(p_, keys_.work(), block, &column, &keys);
      tile.mode = KeyMode::kMeans;
      tile.short_column = column;
      if (shorter) tile.short_bias = log2f(static_cast<float>(keys)) / p_.exponent_scale - p_.mean_bias;
    }
    __syncwarp();
  }

  // ---------------------------------------------------------------- other copies

  // A warp copies rows `begin` to `end` of `count` to row0 of a stage, swizzled as bulk copies would, and makes the
  // rest zeros. `from` is where row 0 of them would be.
  __device__ __forceinline__ void CopyRows(uint8_t* to, int row0, int count, int begin, int end, const uint16_t* from,
                                           int64_t stride) {
    const uint32_t base = SharedAddress(to);
#pragma unroll 1
    for (int i = lane_; i < count * kPieces; i += 32) {
      const int of_count = i / kPieces, row = row0 + of_count;
      const int piece = i % kPieces;
      AsyncCopy16(
          base + piece / 8 * Memory::kKeyPanelBytes + row * Memory::kPanelRowsBytes + ((piece % 8 ^ row % 8) << 4),
          from + of_count * stride + piece * 8, of_count >= begin && of_count < end && piece < p_.head_dim / 8);
    }
    AsyncCopyWaitAll();
    FenceAsyncProxy();
    __syncwarp();
  }

  __device__ __forceinline__ void SendQueries(int steps) {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (ElectOne()) {
      sm_.tiles[q_.stage] = InfoOf(p_, keys_.work(), steps);
      if constexpr (kAscending) {
        const Work& work = keys_.work();
        sm_.tiles[q_.stage].skips = QueryLength(p_, work.sequence) * p_.group >= kRowsThatSkip;
        TileSkipped& slot = static_cast<SkipMemory<SHAPE>&>(sm_).skipped[q_.stage + 2 * q_.parity];
        slot.info = sm_.tiles[q_.stage];
        slot.mask_row = work.mask_row;
      }
      LoadQueries<SHAPE>(p_, sm_, keys_.work(), q_.stage, 0);
    }
    q_.Advance(SHAPE::kQStages);
  }

  __device__ __forceinline__ void Finish() {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (lane_ == 0) {
      sm_.tiles[q_.stage].key_tiles = 0;
      BarrierArrive(&sm_.q_full[q_.stage]);
    }
  }

  const AttendParams& p_;
  SharedMemory<SHAPE>& sm_;
  const int lane_, warp_;
  const int rank_; // in the team
  const bool is_v_;
  const uint16_t* const data_;
  const int64_t* const stride_;
  const CUtensorMap* const map_;
  uint8_t* const stages_;
  uint64_t *const full_, *const empty_;
  RingPosition ring_position_; // of K or V
  RingPosition q_;

  std::conditional_t<kAscending, AscendingIterator<SHAPE>, KeyIterator<SHAPE>> keys_;
  int safe_;                           // keys below this position are seen by every row
  bool masked_;                        // the last tile of keys had a mask
  const int32_t* pages_;               // of the sequence
  int position_;                       // the next key tile, as NextKeys has it;
  int token_[kPlaces], page_[kPlaces]; // where its chunk (by rows: this lane's rows) lies
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
