// The order of keys where a mask skips (skip.cuh): from the lowest kept block up, because the chunks that a row may
// skip are said in that order (fp_block_mask): 128 kept keys each, which are a step's, and the blocks on the diagonal
// begin a chunk of their own. So the last step before the diagonal may be short, and the last of all. Means come as
// everywhere.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_ASCENDING_ITERATOR_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_ASCENDING_ITERATOR_CUH_

#include "cuda/sm90/attend/key_iterator.cuh"

namespace flashprefill::cuda {

template <class SHAPE>
class AscendingIterator : public KeyIterator<SHAPE> {
  using Base = KeyIterator<SHAPE>;
  using Base::bits_, Base::block_begin_, Base::chunks_, Base::group_, Base::key_tiles_, Base::lane_, Base::last_chunks_,
      Base::mean_tiles_, Base::my_chunk_, Base::p_, Base::sub_, Base::word_, Base::word_index_, Base::work_;

 public:
  __device__ __forceinline__ explicit AscendingIterator(const AttendParams& p) : Base(p) {}

  __device__ __forceinline__ void Start(const Work& work, uint64_t word) {
    work_ = work;
    word_ = word;
    group_ = this->TopGroup();
    key_tiles_ = CountKeyTiles();
    mean_tiles_ = p_.mean_correction ? this->CountMeanTiles() : 0;
    if (key_tiles_ + mean_tiles_ == 0) key_tiles_ = 1; // of absent keys: rows that see nothing are written too
    if (group_ > 0) this->LoadGroup(0);
    word_index_ = 0;
    bits_ = 0;
    sub_ = end_ = 0;
  }

  // The next key tile, as KeyIterator's.
  __device__ __forceinline__ int NextKeys() {
    if (left_ == 0) {
      left_ = diagonal_;
      diagonal_ = 0;
    }
    if (left_ == 0) return kAbsent;
    if (sub_ == end_) NextBlock();
    if (end_ - sub_ >= chunks_) { // mostly: the whole tile from one block
      const int first = sub_;
      sub_ += chunks_;
      left_ -= chunks_;
      return block_begin_ + ((first + my_chunk_) << p_.chunk_shift);
    }
    int mine = kAbsent;
#pragma unroll 1
    for (int c = 0; c < chunks_ && left_ > 0; ++c) {
      if (sub_ == end_) NextBlock();
      if (c == my_chunk_) mine = block_begin_ + (sub_ << p_.chunk_shift);
      ++sub_;
      --left_;
    }
    return mine;
  }

 private:
  // Tiles of kept chunks before the diagonal and on it; chunks that no row sees, which are the last, are left out.
  __device__ __forceinline__ int CountKeyTiles() {
    const int per_block = p_.block_size >> p_.chunk_shift;
    int kept = 0, before = 0;
#pragma unroll 1
    for (int group = group_; group >= 0; --group) {
      const int index = group * 32 + lane_, left = work_.full - index * 64;
      const uint64_t word = group == group_ ? word_ : MaskWord(p_, work_, index);
      kept += __popcll(word);
      before += left >= 64 ? __popcll(word) : left > 0 ? __popcll(word & ((uint64_t{1} << left) - 1)) : 0;
    }
    kept = __reduce_add_sync(~0u, kept);
    before = __reduce_add_sync(~0u, before);
    const int last = work_.visible - 1;
    const bool has_last = last >= 0 && (__shfl_sync(~0u, word_, (last >> 6) & 31) >> (last & 63) & 1);
    last_chunks_ = (VisibleKeys(p_, work_) - last * p_.block_size + (1 << p_.chunk_shift) - 1) >> p_.chunk_shift;
    const int all = kept * per_block - (has_last ? per_block - last_chunks_ : 0);
    left_ = min(before * per_block, all);
    diagonal_ = all - left_;
    const int tiles = Tiles(left_) + Tiles(diagonal_);
    if (left_ == 0) {
      left_ = diagonal_;
      diagonal_ = 0;
    }
    return tiles;
  }
  __device__ __forceinline__ int Tiles(int chunks) const {
    return ((chunks + chunks_ - 1) << p_.chunk_shift) / Base::kKeys;
  }

  // The next kept block, from the lowest up. There is one.
  __device__ __forceinline__ void NextBlock() {
#pragma unroll 1
    while (bits_ == 0) {
      const uint64_t from = ~uint64_t{0} << (word_index_ - group_ * 32);
      const uint32_t words = __ballot_sync(~0u, word_ != 0) & static_cast<uint32_t>(from);
      if (words == 0) {
        this->LoadGroup(group_ + 1);
        word_index_ = group_ * 32;
        continue;
      }
      const int lane = __ffs(static_cast<int>(words)) - 1;
      word_index_ = group_ * 32 + lane + 1;
      bits_ = __shfl_sync(~0u, word_, lane);
    }
    const int block = (word_index_ - 1) * 64 + __ffsll(static_cast<long long>(bits_)) - 1;
    bits_ &= bits_ - 1;
    block_begin_ = block * p_.block_size;
    sub_ = 0;
    end_ = block == work_.visible - 1 ? last_chunks_ : p_.block_size >> p_.chunk_shift;
  }

  int end_;             // of the block being cut, in chunks; sub_ is the next one
  int left_, diagonal_; // chunks still to come before the part's end, and in the part on the diagonal
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_ASCENDING_ITERATOR_CUH_
