// The producer of the attend kernel: one warp (four for GATHER) that takes tiles, walks their bitmap from the diagonal
// down, and keeps the K and V rings full. It alone knows block ids; the math side sees a stream of key tiles and is
// told which of them need a mask. So sparse attention runs at the speed of dense.
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
  __device__ __forceinline__ AttendProducer(const AttendParams& p, SharedPlan<SHAPE>& shared)
      : p_(p), sm_(shared), lane_(threadIdx.x % 32), leader_(threadIdx.x == 0) {}

  __device__ __forceinline__ void Run() {
    const int tiles_of_batch = TilesOfBatch(p_);
    const int items = tiles_of_batch * p_.kv_heads * (p_.group / p_.heads_a_tile);
    int turn = 0;
    int fetched = blockIdx.x;
    uint64_t next_word = 0;
    for (int item = -1; item < items;) { // the first round has no tile yet: it only looks up the first one
      int steps = 0, key_tiles = 0, mean_tiles = 0;
      if (item >= 0) {
        w_ = sm_.next_work[threadIdx.x / 32];
        word_ = next_word;
        group_ = TopGroup();
        key_tiles = CountKeyTiles();
        if (p_.mean_correction) mean_tiles = CountMeanTiles();
        steps = max(1, key_tiles + mean_tiles);
        SendQueries(steps);
        StartCursor();
      }
      Chunk before{};
#pragma unroll 1
      for (int j = 0; j <= steps; ++j) { // K runs one step ahead of V, as it is used
        if (j < steps) {
          if (j >= key_tiles && mean_tiles > 0) {
            TakeMeans(j == key_tiles);
          } else {
            TakeChunks();
          }
          SendK();
        }
        if (j > 0) SendV(before);
        before = chunk_;
        if (j == min(1, steps)) { // late enough for the ring to be full, early enough for the mask to be there in time
          item = Receive(fetched, turn);
          fetched = Fetch();
          turn ^= 1;
          if (item < items) next_word = LookUp(item, tiles_of_batch);
        }
      }
    }
    Finish();
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kPanels = SHAPE::kPanels;
  static constexpr int kGroupBlocks = 32 * 64;        // blocks of which a warp holds the mask, a word a lane
  static constexpr int kPieces = SHAPE::kHeadDim / 8; // 16-byte pieces of a row
  static constexpr int kWordsATile = kKeys / 64;      // words of means a tile
  using Plan = SharedPlan<SHAPE>;

  // What the lanes know of the key tile that was taken last. Lane c holds chunk c (GATHER: a lane holds a row).
  struct Chunk {
    KeyMode mode;
    int position;    // of the chunk's first key; kAbsent; kMeans: the first block
    int token, page; // coordinates for the bulk copies
  };

  // ---------------------------------------------------------------- items

  // Leaves the item's tile in shared memory, to spare registers, and returns this lane's word of its mask.
  __device__ __forceinline__ uint64_t LookUp(int item, int tiles_of_batch) {
    const Work next = DecodeItem(p_, item, tiles_of_batch);
    __syncwarp();
    if (lane_ == 0) sm_.next_work[threadIdx.x / 32] = next;
    __syncwarp();
    return MaskWord(p_, next, max(0, (next.visible - 1) / kGroupBlocks) * 32 + lane_);
  }
  __device__ __forceinline__ int TopGroup() const { return max(0, (w_.visible - 1) / kGroupBlocks); }

  __device__ __forceinline__ int Fetch() {
    return leader_ ? atomicAdd(p_.counter, 1) + static_cast<int>(gridDim.x) : 0;
  }
  __device__ __forceinline__ int Receive(int fetched, int turn) {
    if constexpr (!GATHER) return __shfl_sync(~0u, fetched, 0);
    if (leader_) sm_.next_item[turn] = fetched;
    NamedBarrierSync(kProducerBarrier, 128);
    return sm_.next_item[turn];
  }

  // ---------------------------------------------------------------- the bitmap

  __device__ __forceinline__ void LoadGroup(int group) {
    group_ = group;
    word_ = MaskWord(p_, w_, group * 32 + lane_);
  }

  // Tiles of kept chunks; chunks that no row sees are left out. Leaves the highest group of mask words loaded.
  __device__ __forceinline__ int CountKeyTiles() {
    const int a_block = p_.block_size >> p_.chunk_shift;
    const int top = group_;
    int kept = 0;
#pragma unroll 1
    for (int group = 0; group < top; ++group) kept += __popcll(MaskWord(p_, w_, group * 32 + lane_));
    kept += __popcll(word_);
    kept = __reduce_add_sync(~0u, kept);
    const int last = w_.visible - 1;
    const bool has_last = last >= 0 && (__shfl_sync(~0u, word_, (last >> 6) & 31) >> (last & 63) & 1);
    last_chunks_ = last < 0 ? 0 : (VisibleKeys(p_, w_) - last * p_.block_size + chunk() - 1) >> p_.chunk_shift;
    const int chunks = kept * a_block - (has_last ? a_block - last_chunks_ : 0);
    const int a_tile = kKeys >> p_.chunk_shift;
    const int tiles = (chunks + a_tile - 1) * chunk() / kKeys;
    missing_ = tiles == 0 ? a_tile : tiles * a_tile - chunks;
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
    sub_ = -1;
  }

  // Position of the next kept chunk, from the highest down. There is one.
  __device__ __forceinline__ int NextChunk() {
    if (sub_ < 0) {
      while (bits_ == 0) {
        --word_index_;
        if (word_index_ < group_ * 32) LoadGroup(group_ - 1);
        bits_ = __shfl_sync(~0u, word_, word_index_ & 31);
      }
      const int bit = 63 - __clzll(static_cast<long long>(bits_));
      bits_ ^= uint64_t{1} << bit;
      block_ = word_index_ * 64 + bit;
      sub_ = (block_ == w_.visible - 1 ? last_chunks_ : p_.block_size >> p_.chunk_shift) - 1;
    }
    return block_ * p_.block_size + chunk() * sub_--;
  }

  // ---------------------------------------------------------------- key tiles

  __device__ __forceinline__ void TakeChunks() {
    const int chunks = kKeys >> p_.chunk_shift;
    int mine = kAbsent;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      int position = kAbsent;
      if (missing_ > 0) {
        --missing_;
      } else {
        position = NextChunk();
      }
      if (c == lane_) mine = position;
    }
    chunk_.position = mine;
    const int safe = min(w_.first_position + 1, w_.k_len); // keys below it are seen by every row
    const bool masked = lane_ < chunks && mine > safe - chunk();
    chunk_.mode = __any_sync(~0u, masked) ? KeyMode::kMasked : KeyMode::kPlain;
    KeyTile& tile = sm_.key_tiles[ring_];
    const int column = min(lane_, 7) * 16;
    const int position = __shfl_sync(~0u, mine, (column >> p_.chunk_shift) % (kKeys / 16));
    if (threadIdx.x < 8) tile.position[lane_] = position == kAbsent ? kAbsent : position + (column & (chunk() - 1));
    if (leader_) tile.mode = chunk_.mode;
    if constexpr (GATHER) {
      const int row = Row();
      const int from = __shfl_sync(~0u, mine, row >> p_.chunk_shift);
      chunk_.position = from == kAbsent ? kAbsent : from + (row & (chunk() - 1));
      chunk_.page = chunk_.position < w_.k_len ? Page(chunk_.position) : 0;
    } else {
      chunk_.token = p_.absent_token;
      chunk_.page = 0;
      if (lane_ < chunks && mine < w_.k_len) {
        chunk_.token = p_.page_size ? mine % p_.page_size : w_.k_begin + mine;
        chunk_.page = p_.page_size ? Page(mine) : p_.cu_seqlens_k ? 0 : w_.sequence;
      }
    }
  }

  __device__ __forceinline__ int Page(int position) const {
    const int column = min(position / p_.page_size, p_.pages_per_seq - 1);
    return Clamp(__ldg(p_.block_table + w_.sequence * p_.block_table_stride + column), 0, p_.page_count - 1);
  }

  // The next tile of means that has something to count. They are taken from the highest down, group by group.
  __device__ __forceinline__ void TakeMeans(bool first) {
    if (first) {
      const int top = TopGroup();
      if (group_ != top) LoadGroup(top);
      mean_tiles_ = MeanTilesOfGroup();
    }
    while (mean_tiles_ == 0) {
      LoadGroup(group_ - 1);
      mean_tiles_ = MeanTilesOfGroup();
    }
    const int from = 31 - __clz(mean_tiles_); // the lane that holds the tile's first word
    mean_tiles_ ^= 1u << from;
    chunk_.mode = KeyMode::kMeans;
    chunk_.position = (group_ * 32 + from) * 64;
    chunk_.page = static_cast<int>(__shfl_sync(~0u, MeanWord(), from + lane_ / 2 % kWordsATile) >> (lane_ % 2 * 32));
    KeyTile& tile = sm_.key_tiles[ring_];
    if (threadIdx.x < 2 * kWordsATile) tile.wanted[lane_] = static_cast<uint32_t>(chunk_.page);
    if (leader_) {
      const int last = (w_.k_len - 1) / p_.block_size; // shorter than the others, perhaps
      tile.mode = KeyMode::kMeans;
      tile.last_block_column = last - chunk_.position;
      tile.last_block_bias = log2f(static_cast<float>(w_.k_len - last * p_.block_size)) / p_.scale_log2;
      tile.full_bias = log2f(static_cast<float>(p_.block_size)) / p_.scale_log2;
    }
  }

  // ---------------------------------------------------------------- copies

  __device__ __forceinline__ void SendQueries(int steps) {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (leader_) {
      const int token = w_.q_begin + w_.begin;
      const int batch = p_.cu_seqlens_q ? 0 : w_.sequence;
      sm_.tiles[q_.stage] =
          TileInfo{steps, w_.tokens * p_.heads_a_tile, w_.first_position, w_.k_len - 1, batch, token, w_.head, 0};
      const int bytes = kPanels * Plan::kPanelRowsBytes * p_.tile_tokens * p_.heads_a_tile;
      BarrierArriveExpect(&sm_.q_full[q_.stage], bytes);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        BulkLoad(sm_.q[q_.stage] + i * Plan::kQPanelBytes, &p_.q, &sm_.q_full[q_.stage], i * kPanelColumns, w_.head,
                 token, batch);
      }
    }
    q_.Advance();
  }

  __device__ __forceinline__ void SendK() {
    BarrierWait(&sm_.k_empty[k_.stage], k_.parity ^ 1);
    Send(chunk_, sm_.k[k_.stage], &sm_.k_full[k_.stage], &p_.k, &p_.k_mean, p_.k_data, p_.k_stride, false);
    ring_ = (ring_ + 1) % kKeyTileRing;
    k_.Advance();
  }

  __device__ __forceinline__ void SendV(const Chunk& at) {
    BarrierWait(&sm_.v_empty[v_.stage], v_.parity ^ 1);
    Send(at, sm_.v[v_.stage], &sm_.v_full[v_.stage], &p_.v, &p_.v_mean, p_.v_data, p_.v_stride, true);
    v_.Advance();
  }

  __device__ __forceinline__ void Send(const Chunk& at, uint8_t* to, uint64_t* full, const CUtensorMap* map,
                                       const CUtensorMap* mean_map, const void* data, const int64_t* stride,
                                       bool is_v) {
    __syncwarp(); // the key tile's description is written before it is announced
    if (at.mode == KeyMode::kMeans) {
      SendMeans(at, to, full, mean_map, is_v);
    } else if constexpr (GATHER) {
      const int64_t head = w_.kv_head * stride[2];
      const int64_t offset =
          at.position < w_.k_len ? at.page * stride[0] + at.position % p_.page_size * stride[1] + head : -1;
      const int mine = Row() - lane_ % kRowsAWarp;
      CopyRows(to, mine, kRowsAWarp, [&](int row) -> const uint16_t* {
        const int64_t o = __shfl_sync(~0u, offset, row - mine);
        return o < 0 ? nullptr : static_cast<const uint16_t*>(data) + o;
      });
      if (leader_) BarrierArrive(full);
      BarrierArriveAfterCopies(full);
    } else {
      SendChunks(at, to, full, map, data, stride, is_v);
    }
  }

  __device__ __forceinline__ void SendChunks(const Chunk& at, uint8_t* to, uint64_t* full, const CUtensorMap* map,
                                             const void* data, const int64_t* stride, bool is_v) {
    const int chunks = kKeys >> p_.chunk_shift;
    // Rows past the end that the tensor map doesn't know to be outside.
    const bool ragged = is_v && lane_ < chunks && at.position < w_.k_len && at.position + chunk() > w_.k_len &&
                        (p_.page_size || p_.cu_seqlens_k || w_.k_len < p_.max_k);
    const uint32_t by_rows = is_v ? __ballot_sync(~0u, ragged) : 0;
    if (by_rows) {
      const int which = __ffs(by_rows) - 1;
      const int position = __shfl_sync(~0u, at.position, which);
      const int token = __shfl_sync(~0u, at.token, which);
      const int page = __shfl_sync(~0u, at.page, which);
      const uint16_t* from =
          static_cast<const uint16_t*>(data) + page * stride[0] + token * stride[1] + w_.kv_head * stride[2];
      CopyRows(to, which * chunk(), chunk(), [&](int row) -> const uint16_t* {
        const int i = row - which * chunk();
        return position + i < w_.k_len ? from + i * stride[1] : nullptr;
      });
      FinishCopies();
    }
    const int chunk_bytes = chunk() * Plan::kPanelRowsBytes;
    if (leader_) BarrierArriveExpect(full, kPanels * chunk_bytes * (chunks - __popc(by_rows)));
    __syncwarp();
    if (lane_ < chunks && !(by_rows >> lane_ & 1)) {
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        BulkLoad(to + i * Plan::kKeyPanelBytes + lane_ * chunk_bytes, map, full, i * kPanelColumns, w_.kv_head,
                 at.token, at.page);
      }
    }
  }

  // Means lie together, so one bulk copy brings them; but rows past `full` may hold anything, which V's must not.
  __device__ __forceinline__ void SendMeans(const Chunk& at, uint8_t* to, uint64_t* full, const CUtensorMap* map,
                                            bool is_v) {
    const bool by_rows = is_v && at.position + kKeys > w_.full;
    const bool packed = p_.cu_seqlens_k && !p_.page_size;
    const int row0 = at.position + (packed ? w_.k_begin / p_.block_size + w_.sequence
                                           : w_.sequence * ((p_.max_k + p_.block_size - 1) / p_.block_size));
    if (by_rows && (!GATHER || threadIdx.x < 32)) {
      const uint16_t* from =
          static_cast<const uint16_t*>(p_.v_mean_data) + (w_.kv_head * p_.mean_rows + row0) * p_.head_dim;
      CopyRows(to, 0, kKeys, [&](int row) -> const uint16_t* {
        const uint32_t wanted = __shfl_sync(~0u, at.page, row / 32);
        return wanted >> (row % 32) & 1 ? from + static_cast<int64_t>(row) * p_.head_dim : nullptr;
      });
      FinishCopies();
    }
    if (leader_) {
      BarrierArriveExpect(full, by_rows ? 0 : Plan::kKeyBytes);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        if (!by_rows) BulkLoad(to + i * Plan::kKeyPanelBytes, map, full, i * kPanelColumns, row0, w_.kv_head, 0);
      }
    }
    if constexpr (GATHER) BarrierArriveAfterCopies(full);
  }

  // A warp copies rows into a K or V stage, swizzled as bulk copies would; rows for which `source` is null become
  // zeros.
  template <class Source>
  __device__ __forceinline__ void CopyRows(uint8_t* to, int row0, int rows, Source source) {
    const uint32_t base = SharedAddress(to);
#pragma unroll(GATHER ? 4 : 1)
    for (int i = lane_; i < rows * kPieces; i += 32) {
      const int row = row0 + i / kPieces;
      const int piece = i % kPieces;
      const uint16_t* from = source(row);
      const bool valid = from != nullptr && piece < p_.head_dim / 8;
      const uint32_t address =
          base + piece / 8 * Plan::kKeyPanelBytes + row * Plan::kPanelRowsBytes + ((piece % 8 ^ row % 8) << 4);
      AsyncCopy16(address, valid ? from + piece * 8 : static_cast<const uint16_t*>(p_.v_data), valid);
    }
  }
  __device__ __forceinline__ void FinishCopies() {
    AsyncCopyWaitAll();
    FenceAsyncProxy();
    __syncwarp();
  }

  // GATHER: the row of a key tile whose whereabouts this lane holds.
  static constexpr int kRowsAWarp = kKeys / 4;
  __device__ __forceinline__ int Row() const { return threadIdx.x / 32 * kRowsAWarp + lane_ % kRowsAWarp; }

  __device__ __forceinline__ void Finish() {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (leader_) {
      sm_.tiles[q_.stage].key_tiles = 0;
      BarrierArrive(&sm_.q_full[q_.stage]);
    }
  }

  __device__ __forceinline__ int chunk() const { return 1 << p_.chunk_shift; }

  const AttendParams& p_;
  SharedPlan<SHAPE>& sm_;
  const int lane_;
  const bool leader_;
  RingPosition<SHAPE::kQStages> q_;
  RingPosition<SHAPE::kStages> k_, v_;
  int ring_ = 0; // of key_tiles

  Work w_;
  uint64_t word_; // of the mask: lane l holds word 32 group_ + l
  int group_;
  uint64_t bits_; // of word word_index_ that are still to come
  int word_index_;
  int block_, sub_;     // the block being cut, and its next chunk
  int last_chunks_;     // chunks of block visible - 1 that are seen
  int missing_;         // chunks that the first tile goes short
  uint32_t mean_tiles_; // of this group that are still to come
  Chunk chunk_;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
