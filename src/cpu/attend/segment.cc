// See segment.h.
#include "cpu/attend/segment.h"

#include "core/half.h"
#include "core/key_list.h"

namespace flashprefill::cpu {
namespace {

constexpr int kMaxBlock = 1024; // of the C ABI

class SegmentPacker {
 public:
  SegmentPacker(const AttendCall& call, const Sequence& s, int64_t kv_head, const KeyList& list, TileScratch& scratch)
      : call_(call),
        s_(s),
        kv_head_(kv_head),
        key_scale_(KeyScale(call.p, s, kv_head)),
        value_scale_(ValueScale(call.p, s, kv_head)),
        list_(list),
        scratch_(scratch) {}

  void PackKeys() const {
    for (int64_t first = 0; first < list_.count; first += kGroup) {
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(list_.count - first, kGroup));
      const int32_t* keys = list_.keys + first;
      int64_t offset[kGroup];
      call_.kernels.pack_keys(RowsAt(call_.p.k, key_scale_, keys, count, offset), call_.p.head_dim, first,
                              scratch_.listed.k);
      call_.kernels.pack_values(RowsAt(call_.p.v, value_scale_, keys, count, offset), call_.p.head_dim, first,
                                scratch_.listed.v);
    }
  }

  // What stands for blocks [0, blocks) without the keys in the list.
  void PackRest(const BlockMeans& means, int64_t blocks) const {
    const int32_t d = call_.p.head_dim;
    const int32_t* listed = list_.keys;
    for (int64_t block = 0; block < blocks; ++block) {
      const int32_t* first = listed;
      const int64_t end = block * call_.g.block_size + call_.g.BlockKeys(s_, block);
      while (listed != list_.keys + list_.count && *listed < end) ++listed;
      const int32_t count = static_cast<int32_t>(listed - first);
      scratch_.rest.count[block] = static_cast<float>(call_.g.BlockKeys(s_, block) - count);
      MeanOfRest(call_.p.k, key_scale_, means.keys + block * d, block, first, count, scratch_.rest.keys);
      MeanOfRest(call_.p.v, value_scale_, means.values + block * d, block, first, count, scratch_.rest.values);
    }
    if (call_.mask.mean_correction != FP_BLOCK_MEANS) return;
    for (int64_t block = 0; block < blocks; block += kGroup) {
      scratch_.rest.Pack(call_, block, std::min<int64_t>(kGroup, blocks - block));
    }
  }

 private:
  Rows RowsAt(const fp_tensor& tensor, float scale, const int32_t* keys, int32_t count, int64_t* offset) const {
    for (int32_t i = 0; i < count; ++i) offset[i] = KeyOffset(call_.p, tensor.stride, s_, keys[i], kv_head_);
    return {tensor.data, tensor.dtype, count, tensor.stride[3], offset, scale};
  }

  // The mean of a block's keys but for `count` listed ones, rounded to MeanDtype. Of these and the others the
  // fewer are added up: what is subtracted from the mean of all is then at most half of it, and loses nothing.
  void MeanOfRest(const fp_tensor& tensor, float scale, const float* mean_of_all, int64_t block, const int32_t* listed,
                  int32_t count, std::byte* to) const {
    const int32_t d = call_.p.head_dim, all = static_cast<int32_t>(call_.g.BlockKeys(s_, block)), rest = all - count;
    float* mean = scratch_.mean;
    int64_t offset[kMaxBlock];
    if (count == 0 || rest == 0) {
      std::copy_n(mean_of_all, d, mean);
    } else if (count <= rest) {
      call_.kernels.mean(RowsAt(tensor, scale, listed, count, offset), d, mean);
      const float share = static_cast<float>(count) / static_cast<float>(rest);
      for (int32_t i = 0; i < d; ++i) mean[i] = mean_of_all[i] + (mean_of_all[i] - mean[i]) * share;
    } else {
      int32_t others[kMaxBlock], n = 0;
      const int32_t begin = static_cast<int32_t>(block * call_.g.block_size);
      for (int32_t key = begin, next = 0; key < begin + all; ++key) {
        if (next < count && listed[next] == key) {
          ++next;
        } else {
          others[n++] = key;
        }
      }
      call_.kernels.mean(RowsAt(tensor, scale, others, n, offset), d, mean);
    }
    for (int32_t i = 0; i < d; ++i) StoreElement(to, MeanDtype(tensor.dtype), block * d + i, mean[i]);
  }

  const AttendCall& call_;
  const Sequence& s_;
  const int64_t kv_head_;
  const float key_scale_, value_scale_;
  const KeyList list_;
  TileScratch& scratch_;
};

} // namespace

void AttendSegment(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t first, const Packed& keys,
                   const BlockMeans& means, TileScratch& scratch) {
  const int64_t end = std::min(first + call.mask.segment_tiles, call.g.Tiles(s));
  const int64_t kv_head = mask_head * call.g.heads_per_tile / call.g.group;
  const SegmentPacker packer(call, s, kv_head, KeyList::OfTile(call.mask, s, mask_head, first), scratch);
  packer.PackKeys();
  if (call.mask.mean_correction) packer.PackRest(means, call.g.TileOf(call.p, s, end - 1).full);
  for (int64_t m = first; m < end; ++m) {
    const int64_t next_key = m + 1 < end ? FirstKey(call, s, mask_head, m + 1) : -1;
    AttendTile(call, s, mask_head, m, keys, scratch.rest, next_key, scratch);
  }
}

} // namespace flashprefill::cpu
