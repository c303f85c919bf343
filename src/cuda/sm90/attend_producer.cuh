// The producer of the attend kernel: one warp that keeps the ring of K full, and one for V (two each for GATHER). They
// take tiles, walk their bitmap from the diagonal down, and alone know block ids: the math side sees a stream of key
// tiles and is told which of them need a mask. So sparse attention runs at the speed of dense.
//
// A warp by itself takes some 8 cycles an instruction, and has 2,000 to 3,000 a step. When one warp did all of this for
// K and V in turn, it was the slowest part of the kernel; so the common step is kept short, and K and V have their own
// warps that walk the same bitmap.
//
// Kept blocks are cut into chunks of keys that lie together in memory (a block, or a page's part of one), and a key
// tile is kKeys / chunk of them: the hardware sees tiles of 128 (64) keys whatever the block size. If the chunks don't
// fill the last tile, it is the first that goes short, because that one has a mask anyway. Absent chunks are read from
// outside the tensor, which yields zeros.
//
// Bulk copies write whole chunks, so the last chunk of a sequence may bring keys past its end. K's are masked. V's
// would do harm if they held NaN (0 * NaN), so that one chunk of V is copied row by row, with zeros past the end.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_

#include "cuda/sm90/attend_work.cuh"

namespace flashprefill::cuda {

template <class SHAPE, bool GATHER>
class AttendProducer {
 public:
  static constexpr int kTeamWarps = GATHER ? 2 : 1;  // for K, and as many for V
  static constexpr int kLoaders = 2 * kTeamWarps;    // warps
  static constexpr int kThreads = GATHER ? 128 : 96; // with the warp that takes tiles; GATHER has none to spare for it
  // Arrivals that make a K or V stage full: the team leader's, and GATHER one a thread when its own copies are done.
  static constexpr int kFullArrivals = GATHER ? 1 + kTeamWarps * 32 : 1;

  __device__ __forceinline__ AttendProducer(const AttendParams& p, SharedPlan<SHAPE>& shared)
      : p_(p),
        sm_(shared),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)), // so the compiler knows that a warp agrees on it
        rank_(warp_ % kTeamWarps),
        is_v_(warp_ >= kTeamWarps),
        chunks_(kKeys >> p.chunk_shift),
        my_chunk_(min(lane_, chunks_ - 1)),
        data_(static_cast<const uint16_t*>(is_v_ ? p.v_data : p.k_data)),
        stride_(is_v_ ? p.v_stride : p.k_stride),
        map_(is_v_ ? &p.v : &p.k),
        stages_(is_v_ ? shared.v[0] : shared.k[0]),
        full_(is_v_ ? shared.v_full : shared.k_full),
        empty_(is_v_ ? shared.v_empty : shared.k_empty) {}

  __device__ __forceinline__ void Run() {
    if (warp_ == (GATHER ? kLoaders - 1 : kLoaders)) {
      StartTaking(p_, sm_);
      if (GATHER) TakeTile(p_, sm_);
    }
    if (!GATHER && warp_ == kLoaders) {
      while (TakeTile(p_, sm_)) continue;
      return;
    }
    uint32_t parity = 0;
    while (true) {
      BarrierWait(&sm_.work_full, parity);
      parity ^= 1;
      w_ = sm_.work;
      word_ = sm_.words[lane_];
      BarrierArrive(&sm_.work_empty);
      if (w_.sequence < 0) break;
      group_ = TopGroup();
      safe_ = min(w_.first_position + 1, w_.k_len);
      const int key_tiles = CountKeyTiles();
      const int mean_tiles = p_.mean_correction ? CountMeanTiles() : 0;
      const int steps = max(1, key_tiles + mean_tiles);
      if (!is_v_ && rank_ == 0) SendQueries(steps);
      StartCursor();
#pragma unroll 1
      for (int j = 0; j < steps; ++j) {
        if (j >= key_tiles && mean_tiles > 0) {
          SendMeans(j == key_tiles);
        } else {
          SendKeys();
        }
        // V's is the team with time to spare, once its ring is full.
        if (GATHER && warp_ == kLoaders - 1 && j == min(1, steps - 1)) TakeTile(p_, sm_);
      }
    }
    if (!is_v_ && rank_ == 0) Finish();
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kPanels = SHAPE::kPanels;
  static constexpr int kPieces = SHAPE::kHeadDim / 8; // 16-byte pieces of a row
  static constexpr int kWordsATile = kKeys / 64;      // words of means a tile
  static constexpr int kRowsAWarp = kKeys / 2;        // GATHER, by rows
  using Plan = SharedPlan<SHAPE>;

  // ---------------------------------------------------------------- the bitmap

  __device__ __forceinline__ int TopGroup() const { return max(0, (w_.visible - 1) / kGroupBlocks); }
  __device__ __forceinline__ void LoadGroup(int group) {
    group_ = group;
    word_ = MaskWord(p_, w_, group * 32 + lane_);
  }

  // Tiles of kept chunks; chunks that no row sees are left out. Leaves the highest group of mask words loaded.
  __device__ __forceinline__ int CountKeyTiles() {
    const int a_block = p_.block_size >> p_.chunk_shift;
    int kept = __popcll(word_);
#pragma unroll 1
    for (int group = 0; group < group_; ++group) kept += __popcll(MaskWord(p_, w_, group * 32 + lane_));
    kept = __reduce_add_sync(~0u, kept);
    const int last = w_.visible - 1;
    const bool has_last = last >= 0 && (__shfl_sync(~0u, word_, (last >> 6) & 31) >> (last & 63) & 1);
    last_chunks_ = (VisibleKeys(p_, w_) - last * p_.block_size + (1 << p_.chunk_shift) - 1) >> p_.chunk_shift;
    const int kept_chunks = kept * a_block - (has_last ? a_block - last_chunks_ : 0);
    const int tiles = ((kept_chunks + chunks_ - 1) << p_.chunk_shift) / kKeys;
    missing_ = tiles == 0 ? chunks_ : tiles * chunks_ - kept_chunks;
    return tiles;
  }

  // Bits of blocks whose means count, in this lane's word of the loaded group.
  __device__ __forceinline__ uint64_t MeanWord() const {
    const int left = w_.full - (group_ * 32 + lane_) * 64;
    if (left <= 0) return 0;
    return left >= 64 ? ~word_ : ~word_ & ((uint64_t{1} << left) - 1);
  }
  // A bit a tile of means (at lane numbers that are multiples of kWordsATile) that has something to count.
  __device__ __forceinline__ uint32_t MeanTilesOfGroup() const {
    const uint32_t any = __ballot_sync(~0u, MeanWord() != 0);
    return kWordsATile == 2 ? (any | any >> 1) & 0x55555555u : any;
  }
  __device__ __forceinline__ int CountMeanTiles() {
    const int top = group_;
    int tiles = __popc(MeanTilesOfGroup());
#pragma unroll 1
    for (int group = top - 1; group >= 0; --group) {
      LoadGroup(group);
      tiles += __popc(MeanTilesOfGroup());
    }
    if (top > 0) LoadGroup(top);
    return tiles;
  }

  __device__ __forceinline__ void StartCursor() {
    word_index_ = group_ * 32 + 32;
    bits_ = 0;
    sub_ = 0;
  }

  // The next kept block, from the highest down. There is one.
  __device__ __forceinline__ void NextBlock() {
#pragma unroll 1
    while (bits_ == 0) {
      const uint64_t below = (uint64_t{1} << (word_index_ - group_ * 32)) - 1;
      const uint32_t words = __ballot_sync(~0u, word_ != 0) & static_cast<uint32_t>(below);
      if (words == 0) {
        LoadGroup(group_ - 1);
        word_index_ = group_ * 32 + 32;
        continue;
      }
      const int lane = 31 - __clz(static_cast<int>(words));
      word_index_ = group_ * 32 + lane;
      bits_ = __shfl_sync(~0u, word_, lane);
    }
    const int bit = 63 - __clzll(static_cast<long long>(bits_));
    bits_ ^= uint64_t{1} << bit;
    const int block = word_index_ * 64 + bit;
    block_begin_ = block * p_.block_size;
    sub_ = block == w_.visible - 1 ? last_chunks_ : p_.block_size >> p_.chunk_shift;
  }

  // ---------------------------------------------------------------- tiles of keys

  __device__ __forceinline__ void SendKeys() {
    int mine = kAbsent; // position of chunk my_chunk_: of lane c chunk c, of those past the last chunk the last
    if (missing_ == 0 && sub_ == 0) NextBlock();
    if (missing_ == 0 && sub_ >= chunks_) { // mostly: the whole tile from one block
      sub_ -= chunks_;
      mine = block_begin_ + ((sub_ + my_chunk_) << p_.chunk_shift);
    } else {
#pragma unroll 1
      for (int c = 0; c < chunks_; ++c) {
        if (missing_ > 0) {
          --missing_;
          continue;
        }
        if (sub_ == 0) NextBlock();
        --sub_;
        if (c == my_chunk_) mine = block_begin_ + (sub_ << p_.chunk_shift);
      }
    }
    if (!is_v_ && rank_ == 0) DescribeKeys(mine);
    if (GATHER && p_.by_rows) {
      SendRows(mine);
    } else {
      SendChunks(mine);
    }
  }

  __device__ __forceinline__ void DescribeKeys(int mine) {
    KeyTile& tile = sm_.key_tiles[ring_];
    ring_ = (ring_ + 1) % kKeyTileRing;
    const bool masked = __any_sync(~0u, mine > safe_ - (1 << p_.chunk_shift));
    if (masked) {
      const int column = min(lane_, kKeys / 16 - 1) * 16;
      const int position = __shfl_sync(~0u, mine, column >> p_.chunk_shift);
      const int in_chunk = column & ((1 << p_.chunk_shift) - 1);
      if (lane_ < kKeys / 16) tile.position[lane_] = position == kAbsent ? kAbsent : position + in_chunk;
    }
    if (lane_ == 0) tile.mode = masked ? KeyMode::kMasked : KeyMode::kPlain;
    __syncwarp();
  }

  __device__ __forceinline__ int PageOf(int column) const {
    const int64_t at = w_.sequence * p_.block_table_stride + min(column, p_.pages_per_seq - 1);
    return __ldg(p_.block_table + at);
  }
  __device__ __forceinline__ int CheckedPage(int page) const { return Clamp(page, 0, p_.page_count - 1); }

  __device__ __forceinline__ void SendChunks(int position) {
    int token = p_.absent_token, page = 0;
    if (position < w_.k_len) {
      if (p_.page_size) {
        const int column = position / p_.page_size;
        token = position - column * p_.page_size;
        page = PageOf(column);
      } else {
        token = w_.k_begin + position;
        page = p_.cu_seqlens_k ? 0 : w_.sequence;
      }
    }
    // V's chunk that runs past the sequence's end goes by rows, unless that is the tensor's end too.
    const bool ragged = is_v_ && position < w_.k_len && position + (1 << p_.chunk_shift) > w_.k_len &&
                        (p_.page_size || p_.cu_seqlens_k || w_.k_len < p_.max_k);
    const uint32_t by_rows = __ballot_sync(~0u, ragged) & ((2u << (chunks_ - 1)) - 1);
    BarrierWait(&empty_[ring_position_.stage], ring_position_.parity ^ 1); // the page is looked up while we wait
    if (p_.page_size) page = CheckedPage(page);
    uint8_t* const to = stages_ + ring_position_.stage * Plan::kKeyBytes;
    uint64_t* const full = &full_[ring_position_.stage];
    if (chunks_ == 1 && by_rows == 0) {
      if ((!GATHER || rank_ == 0) && ElectOne()) {
        BarrierArriveExpect(full, Plan::kKeyBytes);
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          BulkLoad(to + i * Plan::kKeyPanelBytes, map_, full, i * kPanelColumns, w_.kv_head, token, page);
        }
      }
    } else {
      if (by_rows) {
        const int which = __ffs(by_rows) - 1;
        const int rows = w_.k_len - __shfl_sync(~0u, position, which);
        const uint16_t* from = data_ + w_.kv_head * stride_[2] + __shfl_sync(~0u, page, which) * stride_[0] +
                               __shfl_sync(~0u, token, which) * stride_[1];
        if (Mine(which)) CopyRows(to, which << p_.chunk_shift, 1 << p_.chunk_shift, rows, from, stride_[1]);
      }
      const int chunk_bytes = Plan::kPanelRowsBytes << p_.chunk_shift;
      if (lane_ == 0 && rank_ == 0) BarrierArriveExpect(full, kPanels * chunk_bytes * (chunks_ - __popc(by_rows)));
      __syncwarp();
      SendEach(to, full, token, page, by_rows);
    }
    if constexpr (GATHER) BarrierArriveAfterCopies(full);
    ring_position_.Advance();
  }

  // A bulk copy a panel for each chunk of this warp: lane c holds chunk c's coordinates. One lane starts all of them,
  // after the coordinates of several have come to it at once; lanes that each start theirs take turns of 100 ns.
  __device__ __forceinline__ void SendEach(uint8_t* to, uint64_t* full, int token, int page, uint32_t left_out) {
    constexpr int kAtOnce = 4;
    const int chunk_bytes = Plan::kPanelRowsBytes << p_.chunk_shift;
#pragma unroll 1
    for (int first = rank_; first < chunks_; first += kAtOnce * kTeamWarps) {
      int tokens[kAtOnce], pages[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        tokens[i] = __shfl_sync(~0u, token, first + i * kTeamWarps);
        pages[i] = __shfl_sync(~0u, page, first + i * kTeamWarps);
      }
      if (ElectOne()) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int chunk = first + i * kTeamWarps;
          if (chunk >= chunks_ || left_out >> chunk & 1) continue;
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            BulkLoad(to + panel * Plan::kKeyPanelBytes + chunk * chunk_bytes, map_, full, panel * kPanelColumns,
                     w_.kv_head, tokens[i], pages[i]);
          }
        }
      }
      __syncwarp();
    }
  }

  // Whether this warp of its team copies that chunk.
  __device__ __forceinline__ bool Mine(int chunk) const { return chunk % kTeamWarps == rank_; }

  // GATHER: keys row by row, half of them each warp, whatever the pages are like.
  __device__ __forceinline__ void SendRows(int chunk_position) {
    constexpr int kRowsALane = kRowsAWarp / 32;
    constexpr uint32_t kNowhere = ~0u;
    int page[kRowsALane], slot[kRowsALane];
#pragma unroll
    for (int r = 0; r < kRowsALane; ++r) {
      const int row = rank_ * kRowsAWarp + r * 32 + lane_;
      const int from = __shfl_sync(~0u, chunk_position, row >> p_.chunk_shift);
      const int position = from + (row & ((1 << p_.chunk_shift) - 1));
      slot[r] = -1;
      if (from < w_.k_len && position < w_.k_len) {
        const int column = position / p_.page_size;
        slot[r] = position - column * p_.page_size;
        page[r] = PageOf(column);
      }
    }
    BarrierWait(&empty_[ring_position_.stage], ring_position_.parity ^ 1);
    uint64_t* const full = &full_[ring_position_.stage];
    if (lane_ == 0 && rank_ == 0) BarrierArrive(full);
    // Lane l copies piece l % kPieces of every (32 / kPieces)-th row. The swizzle repeats every 8 rows, so that there
    // are only kPieces / 4 different addresses but for constants.
    constexpr int kRowsAtOnce = 32 / kPieces;
    constexpr int kAddresses = 8 / kRowsAtOnce;
    const int piece = lane_ % kPieces;
    const bool inside = piece < p_.head_dim / 8;
    const uint16_t* const from = data_ + w_.kv_head * stride_[2] + piece * 8;
    const uint32_t to = SharedAddress(stages_ + ring_position_.stage * Plan::kKeyBytes) +
                        (rank_ * kRowsAWarp + lane_ / kPieces) * Plan::kPanelRowsBytes +
                        piece / 8 * Plan::kKeyPanelBytes;
    uint32_t address[kAddresses];
#pragma unroll
    for (int i = 0; i < kAddresses; ++i) address[i] = to + ((piece % 8 ^ (lane_ / kPieces + i * kRowsAtOnce)) << 4);
    // Offsets go from the lanes that know them to those that copy through shared memory, four at once: by shuffles each
    // needs an index of its own in a register, and there were none left for addresses.
    uint32_t* const offsets = sm_.row_offsets[warp_];
#pragma unroll
    for (int r = 0; r < kRowsALane; ++r) {
      offsets[r * 32 + lane_ % kRowsAtOnce * kPieces + lane_ / kRowsAtOnce] = // in units of 16 bytes
          slot[r] < 0 ? kNowhere
                      : static_cast<uint32_t>((CheckedPage(page[r]) * stride_[0] + slot[r] * stride_[1]) >> 3);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRowsALane; ++r) {
#pragma unroll
      for (int batch = 0; batch < kPieces; batch += 4) {
        const uint4 four = LoadShared16(SharedAddress(offsets + r * 32 + lane_ / kPieces * kPieces + batch));
        const uint32_t offset[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          AsyncCopy16(address[(batch + i) % kAddresses] + (r * 32 + (batch + i) * kRowsAtOnce) * Plan::kPanelRowsBytes,
                      AddUnits16(from, offset[i]), inside && offset[i] != kNowhere);
        }
      }
    }
    __syncwarp(); // the offsets are read
    BarrierArriveAfterCopies(full);
    ring_position_.Advance();
  }

  // ---------------------------------------------------------------- tiles of means

  // The next tile of means that has something to count. They are taken from the highest down, group by group. They lie
  // together; but V's that run past `full` go by rows, for what comes there may be anything.
  __device__ __forceinline__ void SendMeans(bool first) {
    if (first) {
      if (group_ != TopGroup()) LoadGroup(TopGroup());
      mean_tiles_ = MeanTilesOfGroup();
    }
#pragma unroll 1
    while (mean_tiles_ == 0) {
      LoadGroup(group_ - 1);
      mean_tiles_ = MeanTilesOfGroup();
    }
    const int from = 31 - __clz(mean_tiles_); // the lane that holds the tile's first word
    mean_tiles_ ^= 1u << from;
    const int block = (group_ * 32 + from) * 64;
    if (!is_v_ && rank_ == 0) DescribeMeans(block, from);

    const bool packed = p_.cu_seqlens_k && !p_.page_size;
    const int row = block + (packed ? w_.k_begin / p_.block_size + w_.sequence
                                    : w_.sequence * ((p_.max_k + p_.block_size - 1) / p_.block_size));
    const bool ragged = is_v_ && block + kKeys > w_.full;
    BarrierWait(&empty_[ring_position_.stage], ring_position_.parity ^ 1);
    uint8_t* const to = stages_ + ring_position_.stage * Plan::kKeyBytes;
    uint64_t* const full = &full_[ring_position_.stage];
    if (rank_ == 0) {
      int bulk_rows = kKeys;
      if (ragged) bulk_rows -= SendMeanParts(to, full, row, w_.full - block);
      if (ElectOne()) {
        BarrierArriveExpect(full, kPanels * Plan::kPanelRowsBytes * bulk_rows);
        for (int i = 0; i < (ragged ? 0 : kPanels); ++i) {
          BulkLoad(to + i * Plan::kKeyPanelBytes, is_v_ ? &p_.v_mean : &p_.k_mean, full, i * kPanelColumns, w_.kv_head,
                   row, 0);
        }
      }
    }
    if constexpr (GATHER) BarrierArriveAfterCopies(full);
    ring_position_.Advance();
  }

  // V's tile of means that ends inside, after `rows`: parts of 16 rows, of which the one that is cut goes by rows and
  // those behind it are read from outside the tensor. Returns how many rows are no bulk copy's. The copies may arrive
  // before the barrier expects them: it cannot pass without the arrival that follows.
  __device__ __forceinline__ int SendMeanParts(uint8_t* to, uint64_t* full, int row, int rows) {
    constexpr int kPart = kMeanPartRows;
    const int whole = rows / kPart * kPart;
    const bool cut = whole < rows;
    if (ElectOne()) {
#pragma unroll 1
      for (int part = 0; part < kKeys; part += kPart) {
        if (cut && part == whole) continue;
#pragma unroll
        for (int i = 0; i < kPanels; ++i) {
          BulkLoad(to + i * Plan::kKeyPanelBytes + part * Plan::kPanelRowsBytes, &p_.v_mean_part, full,
                   i * kPanelColumns, w_.kv_head, part < whole ? row + part : static_cast<int>(p_.mean_rows), 0);
        }
      }
    }
    __syncwarp();
    if (!cut) return 0;
    const int64_t first = w_.kv_head * p_.mean_rows + row + whole;
    CopyRows(to, whole, kPart, rows - whole, static_cast<const uint16_t*>(p_.v_mean_data) + first * p_.head_dim,
             p_.head_dim);
    return kPart;
  }

  __device__ __forceinline__ void DescribeMeans(int block, int from) {
    KeyTile& tile = sm_.key_tiles[ring_];
    ring_ = (ring_ + 1) % kKeyTileRing;
    const uint64_t word = __shfl_sync(~0u, MeanWord(), from + lane_ / 2 % kWordsATile);
    if (lane_ < 2 * kWordsATile) tile.wanted[lane_] = static_cast<uint32_t>(word >> (lane_ % 2 * 32));
    if (lane_ == 0) {
      const int last = (w_.k_len - 1) / p_.block_size; // shorter than the others, perhaps
      tile.mode = KeyMode::kMeans;
      tile.bias = log2f(static_cast<float>(p_.block_size)) / p_.scale_log2;
      tile.last_column = last - block;
      tile.last_bias = log2f(static_cast<float>(w_.k_len - last * p_.block_size)) / p_.scale_log2;
    }
    __syncwarp();
  }

  // ---------------------------------------------------------------- other copies

  // A warp copies `rows` of `count` rows to row0 of a stage, swizzled as bulk copies would, and makes the rest zeros.
  __device__ __forceinline__ void CopyRows(uint8_t* to, int row0, int count, int rows, const uint16_t* from,
                                           int64_t stride) {
    const uint32_t base = SharedAddress(to);
#pragma unroll 1
    for (int i = lane_; i < count * kPieces; i += 32) {
      const int row = row0 + i / kPieces;
      const int piece = i % kPieces;
      AsyncCopy16(base + piece / 8 * Plan::kKeyPanelBytes + row * Plan::kPanelRowsBytes + ((piece % 8 ^ row % 8) << 4),
                  from + (row - row0) * stride + piece * 8, row - row0 < rows && piece < p_.head_dim / 8);
    }
    AsyncCopyWaitAll();
    FenceAsyncProxy();
    __syncwarp();
  }

  __device__ __forceinline__ void SendQueries(int steps) {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (ElectOne()) {
      const int token = w_.q_begin + w_.begin;
      const int batch = p_.cu_seqlens_q ? 0 : w_.sequence;
      uint64_t* const full = &sm_.q_full[q_.stage];
      sm_.tiles[q_.stage] =
          TileInfo{steps, w_.tokens * p_.heads_a_tile, w_.first_position, w_.k_len - 1, batch, token, w_.head, 0};
      BarrierArriveExpect(full, kPanels * Plan::kPanelRowsBytes * p_.tile_tokens * p_.heads_a_tile);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        BulkLoad(sm_.q[q_.stage] + i * Plan::kQPanelBytes, &p_.q, full, i * kPanelColumns, w_.head, token, batch);
      }
    }
    q_.Advance();
  }

  __device__ __forceinline__ void Finish() {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (lane_ == 0) {
      sm_.tiles[q_.stage].key_tiles = 0;
      BarrierArrive(&sm_.q_full[q_.stage]);
    }
  }

  const AttendParams& p_;
  SharedPlan<SHAPE>& sm_;
  const int lane_, warp_;
  const int rank_; // in the team
  const bool is_v_;
  const int chunks_; // a tile
  const int my_chunk_;
  const uint16_t* const data_;
  const int64_t* const stride_;
  const CUtensorMap* const map_;
  uint8_t* const stages_;
  uint64_t *const full_, *const empty_;
  RingPosition<SHAPE::kStages> ring_position_; // of K or V
  RingPosition<SHAPE::kQStages> q_;
  int ring_ = 0; // of key_tiles

  Work w_;
  uint64_t word_; // of the mask: lane l holds word 32 group_ + l
  int group_;
  int safe_;      // keys below this position are seen by every row
  uint64_t bits_; // of word word_index_ that are still to come
  int word_index_;
  int block_begin_;     // of the block being cut,
  int sub_;             // and how many of its chunks are still to come
  int last_chunks_;     // chunks of block visible - 1 that are seen
  int missing_;         // chunks that the first tile goes short
  uint32_t mean_tiles_; // of this group that are still to come
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
