// The order in which a query tile gets its keys. A loading warp holds the tile's bitmap, a word per lane, and walks it
// from the diagonal down; with mean correction the blocks that were left out follow, as tiles of their means. The K
// warps and the V warps walk the same bitmap, each by itself.
//
// Kept blocks are cut into chunks of keys that lie together in memory (a block, or a page's part of one), and a key
// tile is kKeys / chunk of them: the hardware sees tiles of 128 (64) keys whatever the block size. If the chunks don't
// fill the last tile, it is the first that goes short, because that one has a mask anyway.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_KEY_ITERATOR_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_KEY_ITERATOR_CUH_

#include "cuda/sm90/attend/tile_scheduler.cuh"

namespace flashprefill::cuda {

template <class SHAPE>
class KeyIterator {
 public:
  __device__ __forceinline__ explicit KeyIterator(const AttendParams& p)
      : p_(p), lane_(threadIdx.x % 32), chunks_(kKeys >> p.chunk_shift), my_chunk_(min(lane_, chunks_ - 1)) {}

  // Takes a query tile: counts what it gets, and stands before its first keys. `word` is this lane's of the highest
  // group of mask words that the tile sees.
  __device__ __forceinline__ void Start(const Work& work, uint64_t word) {
    work_ = work;
    word_ = word;
    group_ = TopGroup();
    key_tiles_ = CountKeyTiles();
    mean_tiles_ = p_.mean_correction ? CountMeanTiles() : 0;
    if (key_tiles_ + mean_tiles_ == 0) key_tiles_ = 1; // of absent keys: rows that see nothing are written too
    word_index_ = group_ * 32 + 32;
    bits_ = 0;
    sub_ = 0;
  }

  __device__ __forceinline__ const Work& work() const { return work_; }
  __device__ __forceinline__ int chunks() const { return chunks_; } // a tile
  __device__ __forceinline__ int key_tiles() const { return key_tiles_; }
  __device__ __forceinline__ int mean_tiles() const { return mean_tiles_; }
  __device__ __forceinline__ int missing_keys() const { return missing_ << p_.chunk_shift; } // of the first tile
  __device__ __forceinline__ bool keeps_all() const { return keeps_all_; } // whether no visible block is left out

  // The next key tile: the position of chunk c in lane c, in those past the last chunk the last one's.
  __device__ __forceinline__ int NextKeys() {
    int mine = kAbsent;
    if (missing_ == 0 && sub_ == 0) NextBlock();
    if (missing_ == 0 && sub_ >= chunks_) { // mostly: the whole tile from one block
      sub_ -= chunks_;
      return block_begin_ + ((sub_ + my_chunk_) << p_.chunk_shift);
    }
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
    return mine;
  }

  // The next tile of means that has something to count: its first block. They are taken from the highest down, group by
  // group, after all tiles of keys. `first`: it is the first of them.
  __device__ __forceinline__ int NextMeans(bool first) {
    if (first) {
      if (group_ != TopGroup()) LoadGroup(TopGroup());
      means_left_ = MeanTilesOfGroup();
    }
#pragma unroll 1
    while (means_left_ == 0) {
      LoadGroup(group_ - 1);
      means_left_ = MeanTilesOfGroup();
    }
    mean_lane_ = 31 - __clz(means_left_); // it holds the tile's first word
    means_left_ ^= 1u << mean_lane_;
    return (group_ * 32 + mean_lane_) * 64;
  }
  // In lane i of the first kKeys / 32: which of the means of columns 32 i on count, of a tile that begins `before`
  // blocks earlier.
  __device__ __forceinline__ uint32_t WantedMeans(int before) const {
    const uint64_t word = __shfl_sync(~0u, MeanWord(), mean_lane_ + lane_ / 2 % kWordsPerTile);
    const uint32_t half = static_cast<uint32_t>(word >> (lane_ % 2 * 32));
    const int from = lane_ - before / 32;
    const uint32_t high = __shfl_sync(~0u, half, from), low = __shfl_sync(~0u, half, from - 1);
    return __funnelshift_l(from > 0 ? low : 0, from >= 0 ? high : 0, before);
  }

 protected: // the ascending iterator's too
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kWordsPerTile = kKeys / 64; // words of means a tile

  __device__ __forceinline__ int TopGroup() const { return max(0, (work_.visible - 1) / kGroupBlocks); }
  __device__ __forceinline__ void LoadGroup(int group) {
    group_ = group;
    word_ = MaskWord(p_, work_, group * 32 + lane_);
  }

  // Tiles of kept chunks; chunks that no row sees are left out. Leaves the highest group of mask words loaded.
  __device__ __forceinline__ int CountKeyTiles() {
    const int chunks_per_block = p_.block_size >> p_.chunk_shift;
    int kept = __popcll(word_);
#pragma unroll 1
    for (int group = 0; group < group_; ++group) kept += __popcll(MaskWord(p_, work_, group * 32 + lane_));
    kept = __reduce_add_sync(~0u, kept);
    keeps_all_ = kept >= work_.visible;
    const int last = work_.visible - 1;
    const bool has_last = last >= 0 && (__shfl_sync(~0u, word_, (last >> 6) & 31) >> (last & 63) & 1);
    last_chunks_ = (VisibleKeys(p_, work_) - last * p_.block_size + (1 << p_.chunk_shift) - 1) >> p_.chunk_shift;
    const int kept_chunks = kept * chunks_per_block - (has_last ? chunks_per_block - last_chunks_ : 0);
    const int tiles = ((kept_chunks + chunks_ - 1) << p_.chunk_shift) / kKeys;
    missing_ = tiles == 0 ? chunks_ : tiles * chunks_ - kept_chunks;
    return tiles;
  }

  // Bits of blocks whose means count, in this lane's word of the loaded group.
  __device__ __forceinline__ uint64_t MeanWord() const {
    const int left = work_.full - (group_ * 32 + lane_) * 64;
    if (left <= 0) return 0;
    return left >= 64 ? ~word_ : ~word_ & ((uint64_t{1} << left) - 1);
  }
  // A bit a tile of means (at lane numbers that are multiples of kWordsPerTile) that has something to count.
  __device__ __forceinline__ uint32_t MeanTilesOfGroup() const {
    const uint32_t any = __ballot_sync(~0u, MeanWord() != 0);
    return kWordsPerTile == 2 ? (any | any >> 1) & 0x55555555u : any;
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
    sub_ = block == work_.visible - 1 ? last_chunks_ : p_.block_size >> p_.chunk_shift;
  }

  const AttendParams& p_;
  const int lane_;
  const int chunks_, my_chunk_;

  Work work_;
  int key_tiles_, mean_tiles_;
  bool keeps_all_;
  uint64_t word_; // of the mask: lane l holds word 32 group_ + l
  int group_;
  uint64_t bits_; // of word word_index_ that are still to come
  int word_index_;
  int block_begin_;     // of the block being cut,
  int sub_;             // and how many of its chunks are still to come
  int last_chunks_;     // chunks of block visible - 1 that are seen
  int missing_;         // chunks that the first tile goes short
  uint32_t means_left_; // tiles of means of this group that are still to come
  int mean_lane_;       // of the tile of means that was taken last
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_KEY_ITERATOR_CUH_
