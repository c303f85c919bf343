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
      Chunk before{}, now{};
#pragma unroll 1
      for (int j = -1; j <= steps;
           ++j) { // tiles are looked up a step ahead of K, and K is a step ahead of V, as it is used
        const Chunk next = j + 1 < steps ? Take(j + 1 - key_tiles, mean_tiles) : Chunk{};
        if (j >= 0 && j < steps) SendK(now);
        if (j > 0) SendV(before);
        before = now;
        now = next;
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
  static constexpr int kKeysShift = kKeys == 128 ? 7 : 6;
  static constexpr int kPanels = SHAPE::kPanels;
  static constexpr int kGroupBlocks = 32 * 64;        // blocks of which a warp holds the mask, a word a lane
  static constexpr int kPieces = SHAPE::kHeadDim / 8; // 16-byte pieces of a row
  static constexpr int kWordsATile = kKeys / 64;      // words of means a tile
  using Plan = SharedPlan<SHAPE>;

  // What the lanes know of a key tile. Lane c holds chunk c; GATHER, unless of means: a lane holds a row.
  struct Chunk {
    KeyMode mode;
    int position;    // of the chunk's first key (kMeans: block), or kAbsent
    int token, page; // where it lies; the page as the table has it
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
    last_chunks_ = last < 0 ? 0 : (VisibleKeys(p_, w_) - last * p_.block_size + chunk_keys() - 1) >> p_.chunk_shift;
    const int chunks = kept * a_block - (has_last ? a_block - last_chunks_ : 0);
    const int a_tile = kKeys >> p_.chunk_shift;
    const int tiles = (chunks + a_tile - 1) * chunk_keys() / kKeys;
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
    sub_ = 0;
  }

  // The next kept block, from the highest down. There is one.
  __device__ __forceinline__ void NextBlock() {
#pragma unroll 1
    while (bits_ == 0) {
      --word_index_;
      if (word_index_ < group_ * 32) LoadGroup(group_ - 1);
      bits_ = __shfl_sync(~0u, word_, word_index_ & 31);
    }
    const int bit = 63 - __clzll(static_cast<long long>(bits_));
    bits_ ^= uint64_t{1} << bit;
    block_ = word_index_ * 64 + bit;
    sub_ = block_ == w_.visible - 1 ? last_chunks_ : p_.block_size >> p_.chunk_shift;
  }

  // ---------------------------------------------------------------- key tiles

  __device__ __forceinline__ Chunk Take(int past_keys, int mean_tiles) {
    ring_ = (ring_ + 1) % kKeyTileRing;
    return past_keys >= 0 && mean_tiles > 0 ? TakeMeans(past_keys == 0) : TakeChunks();
  }

  __device__ __forceinline__ Chunk TakeChunks() {
    const int chunks = kKeys >> p_.chunk_shift;
    int mine = kAbsent;
    if (missing_ == 0 && sub_ == 0) NextBlock();
    if (missing_ == 0 && sub_ >= chunks) { // mostly: the whole tile from one block
      sub_ -= chunks;
      if (lane_ < chunks) mine = block_ * p_.block_size + ((sub_ + lane_) << p_.chunk_shift);
    } else {
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        if (missing_ > 0) {
          --missing_;
          continue;
        }
        if (sub_ == 0) NextBlock();
        --sub_;
        if (c == lane_) mine = block_ * p_.block_size + (sub_ << p_.chunk_shift);
      }
    }
    Chunk chunk{KeyMode::kPlain, mine, p_.absent_token, 0};
    const int safe = min(w_.first_position + 1, w_.k_len); // keys below it are seen by every row
    if (__any_sync(~0u, lane_ < chunks && mine > safe - chunk_keys())) {
      chunk.mode = KeyMode::kMasked;
      const int column = min(lane_, kKeys / 16 - 1) * 16;
      const int position = __shfl_sync(~0u, mine, column >> p_.chunk_shift);
      const int in_chunk = column & (chunk_keys() - 1);
      if (threadIdx.x < kKeys / 16) {
        sm_.key_tiles[ring_].position[lane_] = position == kAbsent ? kAbsent : position + in_chunk;
      }
    }
    if (leader_) sm_.key_tiles[ring_].mode = chunk.mode;
    if (GATHER && p_.by_rows) {
      const int from = __shfl_sync(~0u, mine, Row() >> p_.chunk_shift);
      chunk.position = from == kAbsent ? kAbsent : from + (Row() & (chunk_keys() - 1));
    }
    if (chunk.position < w_.k_len) {
      if (p_.page_size) {
        const int column = chunk.position / p_.page_size;
        chunk.token = chunk.position - column * p_.page_size;
        chunk.page = __ldg(p_.block_table + w_.sequence * p_.block_table_stride + min(column, p_.pages_per_seq - 1));
      } else {
        chunk.token = w_.k_begin + chunk.position;
        chunk.page = p_.cu_seqlens_k ? 0 : w_.sequence;
      }
    }
    return chunk;
  }

  // Not done where the page is looked up, so that nobody waits for the load there.
  __device__ __forceinline__ int CheckedPage(int page) const {
    return p_.page_size ? Clamp(page, 0, p_.page_count - 1) : page;
  }

  // The next tile of means that has something to count. They are taken from the highest down, group by group.
  __device__ __forceinline__ Chunk TakeMeans(bool first) {
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
    const uint64_t word = __shfl_sync(~0u, MeanWord(), from + lane_ / 2 % kWordsATile);
    KeyTile& tile = sm_.key_tiles[ring_];
    if (threadIdx.x < 2 * kWordsATile) tile.wanted[lane_] = static_cast<uint32_t>(word >> (lane_ % 2 * 32));
    if (leader_) {
      const int last = (w_.k_len - 1) / p_.block_size; // shorter than the others, perhaps
      tile.mode = KeyMode::kMeans;
      tile.bias = log2f(static_cast<float>(p_.block_size)) / p_.scale_log2;
      tile.last_column = last - block;
      tile.last_bias = log2f(static_cast<float>(w_.k_len - last * p_.block_size)) / p_.scale_log2;
    }
    const bool packed = p_.cu_seqlens_k && !p_.page_size;
    const int row0 = packed ? w_.k_begin / p_.block_size + w_.sequence
                            : w_.sequence * ((p_.max_k + p_.block_size - 1) / p_.block_size);
    return {KeyMode::kMeans, block, row0 + block, 0};
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

  __device__ __forceinline__ void SendK(const Chunk& at) {
    BarrierWait(&sm_.k_empty[k_.stage], k_.parity ^ 1);
    Send<false>(at, sm_.k[k_.stage], &sm_.k_full[k_.stage], at.mode == KeyMode::kMeans ? &p_.k_mean : &p_.k, p_.k_data,
                p_.k_stride);
    k_.Advance();
  }

  __device__ __forceinline__ void SendV(const Chunk& at) {
    BarrierWait(&sm_.v_empty[v_.stage], v_.parity ^ 1);
    Send<true>(at, sm_.v[v_.stage], &sm_.v_full[v_.stage], at.mode == KeyMode::kMeans ? &p_.v_mean : &p_.v, p_.v_data,
               p_.v_stride);
    v_.Advance();
  }

  template <bool IS_V>
  __device__ __forceinline__ void Send(const Chunk& at, uint8_t* to, uint64_t* full, const CUtensorMap* map,
                                       const void* data, const int64_t* stride) {
    __syncwarp(); // the key tile's description is written before it is announced
    const bool means = at.mode == KeyMode::kMeans;
    if (GATHER && !means && p_.by_rows) {
      SendRows(at, to, data, stride);
      if (leader_) BarrierArrive(full);
    } else {
      SendChunks<IS_V>(at, to, full, map, means ? p_.v_mean_data : data, means ? p_.mean_stride : stride);
    }
    if constexpr (GATHER) BarrierArriveAfterCopies(full);
  }

  // Chunks of keys, or a tile of means, by bulk copies; GATHER: a quarter of them each warp. But V's chunk that runs
  // past the end (of the sequence, of the blocks that are seen whole) goes row by row, unless the end is the tensor's
  // own.
  template <bool IS_V>
  __device__ __forceinline__ void SendChunks(const Chunk& at, uint8_t* to, uint64_t* full, const CUtensorMap* map,
                                             const void* data, const int64_t* stride) {
    const bool means = at.mode == KeyMode::kMeans;
    const int shift = means ? kKeysShift : p_.chunk_shift;
    const int end = means ? w_.full : w_.k_len;
    const int chunks = kKeys >> shift;
    const int page = means ? 0 : CheckedPage(at.page);
    uint32_t by_rows = 0;
    if constexpr (IS_V) {
      const bool clipped = !means && !p_.page_size && !p_.cu_seqlens_k && w_.k_len == p_.max_k;
      by_rows = __ballot_sync(~0u, lane_ < chunks && at.position < end && at.position + (1 << shift) > end && !clipped);
      if (by_rows) {
        const int which = __ffs(by_rows) - 1;
        const int rows = end - __shfl_sync(~0u, at.position, which);
        const uint16_t* from = static_cast<const uint16_t*>(data) + w_.kv_head * stride[2] +
                               __shfl_sync(~0u, page, which) * stride[0] +
                               __shfl_sync(~0u, at.token, which) * stride[1];
        if (Mine(which)) CopyRows(to, which << shift, 1 << shift, rows, from, stride[1]);
      }
    }
    const int chunk_bytes = Plan::kPanelRowsBytes << shift;
    if (leader_) BarrierArriveExpect(full, kPanels * chunk_bytes * (chunks - __popc(by_rows)));
    __syncwarp();
    if (lane_ < chunks && Mine(lane_) && !(by_rows >> lane_ & 1)) {
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        BulkLoad(to + i * Plan::kKeyPanelBytes + lane_ * chunk_bytes, map, full, i * kPanelColumns, w_.kv_head,
                 at.token, page);
      }
    }
  }

  // Whether this warp copies that chunk.
  __device__ __forceinline__ bool Mine(int chunk) const {
    return !GATHER || chunk % 4 == static_cast<int>(threadIdx.x) / 32;
  }

  // A warp copies `rows` of `count` rows to row0 of a stage, swizzled as bulk copies would, and makes the rest zeros.
  __device__ __forceinline__ void CopyRows(uint8_t* to, int row0, int count, int rows, const uint16_t* from,
                                           int64_t stride) {
    const uint32_t base = SharedAddress(to);
#pragma unroll 1
    for (int i = lane_; i < count * kPieces; i += 32) {
      const int row = i / kPieces;
      const bool valid = row < rows && i % kPieces < p_.head_dim / 8;
      AsyncCopy16(base + PieceOffset(row0 + row, i % kPieces), valid ? from + row * stride + i % kPieces * 8 : from,
                  valid);
    }
    AsyncCopyWaitAll();
    FenceAsyncProxy();
    __syncwarp();
  }

  // Where 16 bytes of a row lie in a stage.
  static __device__ __forceinline__ uint32_t PieceOffset(int row, int piece) {
    return piece / 8 * Plan::kKeyPanelBytes + row * Plan::kPanelRowsBytes + ((piece % 8 ^ row % 8) << 4);
  }

  // GATHER: each warp copies its quarter of the rows, whose offsets its lanes hold in units of 16 bytes.
  static constexpr int kRowsAWarp = kKeys / 4;
  __device__ __forceinline__ int Row() const { return threadIdx.x / 32 * kRowsAWarp + lane_ % kRowsAWarp; }

  __device__ __forceinline__ void SendRows(const Chunk& at, uint8_t* to, const void* data, const int64_t* stride) {
    constexpr uint32_t kNowhere = ~0u;
    const int64_t elements = CheckedPage(at.page) * stride[0] + at.token * stride[1] + w_.kv_head * stride[2];
    const uint32_t offset = at.position < w_.k_len ? static_cast<uint32_t>(elements >> 3) : kNowhere;
    const int piece = lane_ % kPieces;
    const uint4* from = static_cast<const uint4*>(data) + piece;
    const uint32_t base = SharedAddress(to);
    const int row0 = threadIdx.x / 32 * kRowsAWarp;
#pragma unroll
    for (int i = 0; i < kRowsAWarp * kPieces / 32; ++i) {
      const int row = i * 32 / kPieces + lane_ / kPieces;
      const uint32_t o = __shfl_sync(~0u, offset, row);
      const bool valid = o != kNowhere && piece < p_.head_dim / 8;
      AsyncCopy16(base + PieceOffset(row0 + row, piece), valid ? from + o : from, valid);
    }
  }

  __device__ __forceinline__ void Finish() {
    BarrierWait(&sm_.q_empty[q_.stage], q_.parity ^ 1);
    if (leader_) {
      sm_.tiles[q_.stage].key_tiles = 0;
      BarrierArrive(&sm_.q_full[q_.stage]);
    }
  }

  __device__ __forceinline__ int chunk_keys() const { return 1 << p_.chunk_shift; }

  const AttendParams& p_;
  SharedPlan<SHAPE>& sm_;
  const int lane_;
  const bool leader_;
  RingPosition<SHAPE::kQStages> q_;
  RingPosition<SHAPE::kStages> k_, v_;
  int ring_ = kKeyTileRing - 1; // of key_tiles: the one described last

  Work w_;
  uint64_t word_; // of the mask: lane l holds word 32 group_ + l
  int group_;
  uint64_t bits_; // of word word_index_ that are still to come
  int word_index_;
  int block_, sub_;     // the block being cut, and how many of its chunks are still to come
  int last_chunks_;     // chunks of block visible - 1 that are seen
  int missing_;         // chunks that the first tile goes short
  uint32_t mean_tiles_; // of this group that are still to come
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PRODUCER_CUH_
