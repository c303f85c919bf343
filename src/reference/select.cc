// Select: the policy's own choice for each tile, joined with the forced blocks (Rule 3), as bits.
#include "core/method.h"
#include "reference/selector.h"

namespace flashprefill::reference {
namespace {

void WriteList(const KeyChoice& choice, int32_t* list) {
  list[0] = 0;
  list[1] = static_cast<int32_t>(choice.wanted);
  for (size_t key = 0; key < choice.kept.size(); ++key) {
    if (choice.kept[key]) list[2 + list[0]++] = static_cast<int32_t>(key);
  }
}

} // namespace

void Select(const Problem& p, const Policy& policy, BlockMask& mask, const Observer& observer,
            const KeyObserver& key_observer) {
  const Geometry g = Geometry::Of(p, policy);

  auto select_head = [&](const Sequence& s, int64_t mask_head, bool everything) {
    const int64_t first_head = mask_head * g.heads_per_tile;
    std::vector<Matrix> queries;
    Matrix keys;
    std::unique_ptr<HeadSelector> selector;
    const HeadView view{p, policy, g, s, keys, queries, first_head};
    if (!everything) {
      for (int64_t h = first_head; h < first_head + g.heads_per_tile; ++h) queries.push_back(LoadQueries(p, s, h));
      keys = LoadKeys(p, s, first_head / g.group);
      if (const Selector* method = SelectorOf(policy)) selector = method->make(view);
    }
    if (HasVerticalSlash(mask)) {
      std::vector<int32_t> columns, distances;
      if (selector) selector->ChooseVerticalSlash(columns, distances);
      int32_t* vertical_slash = VerticalSlashAt(mask, s.index, mask_head);
      vertical_slash[0] = static_cast<int32_t>(columns.size());
      vertical_slash[1] = static_cast<int32_t>(distances.size());
      std::copy(columns.begin(), columns.end(), vertical_slash + 2);
      std::copy(distances.begin(), distances.end(), vertical_slash + 2 + mask.max_verticals);
    }
    for (int64_t i = 0; i < Segments(mask, s); ++i) {
      const KeyChoice choice = selector ? selector->ChooseKeys(i) : KeyChoice{};
      WriteList(choice, KeyListAt(mask, s, mask_head, i));
      if (selector && key_observer) key_observer(s, mask_head, i, choice);
    }
    for (int64_t m = 0; m < g.Tiles(s); ++m) {
      const Tile tile = g.TileOf(p, s, m);
      const int64_t row = g.Row(s, mask_head, m);
      uint64_t* bits = mask.bits + row * g.words;
      const bool dense = everything || InDenseTail(g, policy, s, m);
      FillRow(bits, g.words, dense ? tile.visible : 0);
      if (!dense) {
        TileChoice choice;
        choice.kept.resize(tile.visible);
        if (selector) {
          choice = selector->Choose(tile);
          if (observer) observer(s, mask_head, m, choice);
        }
        for (int64_t b = 0; b < tile.visible; ++b) {
          if (choice.kept[b] || IsForced(policy, tile, b)) SetBit(bits, b);
        }
      }
      if (mask.counts) {
        mask.counts[row] = 0;
        for (int64_t b = 0; b < tile.visible; ++b) mask.counts[row] += TestBit(bits, b);
        const int64_t keys = VerticalSlashKeys(g, s, tile, VerticalSlash::Of(mask, s.index, mask_head), bits);
        mask.counts[row] += static_cast<int32_t>(DivUp<int64_t>(keys, g.block_size));
        mask.counts[row] +=
            static_cast<int32_t>(ListedBlocks(g, s, tile, KeyList::OfTile(mask, s, mask_head, m), bits));
      }
    }
  };

  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    const int32_t fallback = FallbackOf(p, g, policy, s);
    if (mask.fallback) mask.fallback[b] = fallback;
    for (int64_t h = 0; h < g.mask_heads; ++h) select_head(s, h, fallback != FP_SELECTED);
  }
}

} // namespace flashprefill::reference
