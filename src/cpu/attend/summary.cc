// See summary.h.
#include "cpu/attend/summary.h"

#include <cmath>
#include <limits>

#include "core/half.h"

namespace flashprefill::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(64 % FP_SUMMARY_BLOCKS == 0, "the blocks of a summary key lie in one word of the mask");
static_assert(FP_SUMMARY_BLOCKS <= kChunk, "a softmax over them is one chunk");

// A summary key's softmax: the blocks that are left out of a group, as rows of their means.
struct LeftOut {
  int32_t count;
  int64_t offset[FP_SUMMARY_BLOCKS]; // of their means
  float bias[FP_SUMMARY_BLOCKS];     // keys of each, as a score
};

class SummaryColumns {
 public:
  SummaryColumns(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const MeanRows& means,
                 TileScratch& scratch)
      : call_(call), rows_(rows), bits_(bits), means_(means), scratch_(scratch), heads_(call.g.heads_per_tile) {}

  // Heads of a shared tile have mean queries of their own: with one for all, a quarter of what the correction gains is
  // lost (docs/quality.md).
  void AddAll() {
    for (int32_t head = 0; head < heads_; ++head) AverageQueries(head);
    for (int64_t first = 0; first < rows_.tile.full; first += FP_SUMMARY_BLOCKS) {
      const LeftOut left = LeftOutOf(first);
      for (int32_t head = 0; head < heads_ && left.count > 0; ++head) {
        AddColumn(left, head);
        if (columns_ == kChunk) Flush();
      }
    }
    Flush();
  }

 private:
  float* Query(int32_t head) const {
    return static_cast<float*>(scratch_.summary.one.q) + head * QueryStride(call_.p.head_dim);
  }

  // The mean query of the tile's rows of a head. One that is not finite counts as zero, so that a NaN in one row does
  // not reach the others: the summary is a plain mean then.
  void AverageQueries(int32_t head) const {
    const fp_tensor& q = call_.p.q;
    int32_t count = 0;
    for (int64_t r = head; r < rows_.count(); r += heads_) {
      scratch_.offset[count++] = RowOffset(call_.p, q.stride, rows_.s, rows_.token(r), rows_.head(r));
    }
    float* mean = Query(head);
    const int32_t d = call_.p.head_dim;
    call_.f32_kernels.mean({q.data, q.dtype, count, q.stride[3], scratch_.offset}, d, mean);
    if (!std::all_of(mean, mean + d, [](float x) { return std::isfinite(x); })) std::fill_n(mean, d, 0.f);
  }

  LeftOut LeftOutOf(int64_t first) const {
    LeftOut left;
    left.count = 0;
    const int64_t end = std::min<int64_t>(first + FP_SUMMARY_BLOCKS, rows_.tile.full);
    for (int64_t block = first; block < end; ++block) {
      const float keys = means_.Keys(call_.g, rows_.s, block);
      if (TestBit(bits_, block) || keys == 0) continue;
      left.offset[left.count] = block * call_.p.head_dim;
      left.bias[left.count++] = std::log2(keys) / scratch_.state.scale;
    }
    return left;
  }

  // The softmax of a head's mean query over the means of keys: the sum of `values` into row columns_ of `to`. Returns
  // the logarithm of its denominator.
  float Attend(const LeftOut& left, int32_t head, const std::byte* values, int32_t dtype, std::byte* to) const {
    TileState one = scratch_.summary.one;
    one.rows = 1;
    one.head_dim = call_.p.head_dim;
    one.scale = scratch_.state.scale;
    one.q = Query(head);
    ClearTile(one);
    Chunk chunk{nullptr, nullptr, left.count, 1, {}, nullptr, -1, nullptr};
    chunk.run[0] = {0, 0, left.count};
    float bias[kChunk]; // whole vectors are read
    std::fill(std::copy_n(left.bias, left.count, bias), bias + kChunk, -kInfinity);
    chunk.bias = bias;
    call_.f32_kernels.attend_unpacked(one, chunk, {means_.keys, MeanDtype(call_.p.k.dtype), left.count, 1, left.offset},
                                      {values, dtype, left.count, 1, left.offset});
    const int64_t offset = columns_ * call_.p.head_dim;
    float lse;
    call_.f32_kernels.finish(one, {to, dtype, 1, 1, &offset}, false, &lse);
    return lse;
  }

  // The column counts for rows of its head only. Its bias makes it exact for the mean query: what the rounded key is
  // worth less than the logarithm of the sum.
  void AddColumn(const LeftOut& left, int32_t head) {
    const int32_t d = call_.p.head_dim;
    Attend(left, head, means_.values, MeanDtype(call_.p.v.dtype), scratch_.summary.values);
    const float lse = Attend(left, head, means_.keys, MeanDtype(call_.p.k.dtype), scratch_.summary.keys);
    const float* query = Query(head);
    float score = 0;
    for (int32_t i = 0; i < d; ++i) {
      score += query[i] * LoadElement(scratch_.summary.keys, MeanDtype(call_.p.k.dtype), columns_ * d + i);
    }
    for (int32_t h = 0; h < heads_; ++h) scratch_.bias[h * kChunk + columns_] = -kInfinity;
    scratch_.bias[head * kChunk + columns_] = lse / call_.p.softmax_scale - score;
    ++columns_;
  }

  void Flush() {
    if (columns_ == 0) return;
    const Packed& to = scratch_.summary.packed;
    int64_t offset[kGroup];
    for (int32_t i = 0; i < columns_; ++i) offset[i] = int64_t{i} * call_.p.head_dim;
    const auto rows_of = [&](const std::byte* data, int32_t dtype) { return Rows{data, dtype, columns_, 1, offset}; };
    call_.kernels.pack_keys(rows_of(scratch_.summary.keys, MeanDtype(call_.p.k.dtype)), call_.p.head_dim, 0, to.k);
    call_.kernels.pack_values(rows_of(scratch_.summary.values, MeanDtype(call_.p.v.dtype)), call_.p.head_dim, 0, to.v);
    for (int32_t h = 0; h < heads_; ++h) {
      std::fill(scratch_.bias + h * kChunk + columns_, scratch_.bias + (h + 1) * kChunk, -kInfinity);
    }
    Chunk chunk{to.k, to.v, columns_, 1, {}, nullptr, -1, scratch_.bias, heads_};
    chunk.run[0] = {0, 0, columns_};
    call_.kernels.attend(scratch_.state, chunk);
    columns_ = 0;
  }

  const AttendCall& call_;
  const TileRows& rows_;
  const uint64_t* bits_;
  const MeanRows& means_;
  TileScratch& scratch_;
  const int32_t heads_;
  int32_t columns_ = 0; // that wait for Flush
};

} // namespace

void AddSummaries(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const MeanRows& means,
                  TileScratch& scratch) {
  SummaryColumns(call, rows, bits, means, scratch).AddAll();
}

} // namespace flashprefill::cpu
