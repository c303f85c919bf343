// Masks in workspaces: see mask_memory.h.
#include "core/mask_memory.h"

#include "core/key_list.h"
#include "core/method.h"
#include "core/vertical_slash.h"

namespace flashprefill {

BlockMask DescribeMask(const Problem& p, const Policy& policy) {
  const Geometry g = Geometry::Of(p, policy);
  BlockMask m{};
  m.struct_size = sizeof(BlockMask);
  m.heads = g.mask_heads;
  m.tile_tokens = g.tile_tokens;
  m.block_size = g.block_size;
  m.share_heads = policy.share_heads;
  m.mean_correction = policy.mean_correction;
  m.tile_rows = g.tile_rows;
  m.words = g.words;
  const VerticalSlashRoom room = VerticalSlashRoomOf(p, policy);
  m.max_verticals = static_cast<int32_t>(room.verticals);
  m.max_slashes = static_cast<int32_t>(room.slashes);
  const KeyListRoom lists = KeyListRoomOf(p, policy);
  m.max_keys = static_cast<int32_t>(lists.keys);
  m.segment_tiles = static_cast<int32_t>(lists.segment_tiles);
  m.segment_rows = SegmentRows(p, m);
  m.skip = SkipOf(policy);
  return m;
}

BlockMask MaskIn(Workspace& workspace, const Problem& p, const Policy& policy) {
  BlockMask m = DescribeMask(p, policy);
  m.bits = workspace.Take<uint64_t>(m.heads * m.tile_rows * m.words);
  m.counts = workspace.Take<int32_t>(m.heads * m.tile_rows);
  m.fallback = workspace.Take<int32_t>(p.batch);
  m.vertical_slash = workspace.Take<int32_t>(int64_t{p.batch} * m.heads * VerticalSlashStride(m));
  m.key_lists = workspace.Take<int32_t>(m.heads * m.segment_rows * KeyListStride(m));
  return m;
}

} // namespace flashprefill
