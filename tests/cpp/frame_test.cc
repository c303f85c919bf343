// The frame of the CPU's select by itself: every unit of work and every row of the mask exactly once, for batches with
// empty sequences, for all shapes of items, in one wave or in many.
#include "cpu/frame.h"

#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <tuple>
#include <vector>

#include "engine.h"
#include "op_case.h"

namespace flashprefill::test {
namespace {

using cpu::Item;
using cpu::ItemShape;
using cpu::MaskRow;
using cpu::SelectCall;
using cpu::SelectFrame;

const std::vector<Lengths> kBatch = {{0, 0},    {300, 900}, {0, 0},     {0, 700}, {1, 1},
                                     {1, 4000}, {129, 129}, {700, 700}, {0, 0}};

OpCase Batch(int kv_heads, int group) {
  OpCase op;
  op.lengths = kBatch;
  op.kv_heads = kv_heads;
  op.group = group;
  op.head_dim = 16;
  op.q_layout = op.k_layout = Layout::kPacked;
  return op;
}

// A policy that scores, without forced blocks beyond the diagonal.
AnyPolicy Scored(int block_size) { return WithForced(Parse("flashprefill(alpha=0.5)", block_size), 0, 0, 0); }

// A frame, the call and the memory under it.
struct Framed {
  OpData data;
  AnyPolicy policy;
  Mask mask;
  fp_exec exec{};
  SelectCall call;
  std::vector<std::byte> bytes;
  Workspace memory;
  SelectFrame frame;

  Framed(const OpCase& op, const AnyPolicy& by, const ItemShape& shape)
      : data(op),
        policy(by),
        mask(data.problem(), policy.get()),
        exec{.struct_size = sizeof(fp_exec),
             .threads = 3,
             .backend = nullptr,
             .target = nullptr,
             .stream = nullptr,
             .timings = nullptr,
             .guard = nullptr,
             .math = FP_MATH_INPUT,
             .reserved = 0},
        call{data.problem(), *policy.get(), exec, Geometry::Of(data.problem(), *policy.get())},
        bytes(1 << 16),
        memory(bytes.data()),
        frame(call, shape, &mask.view, memory) {
    frame.TakeScratch(memory, 64);
  }
};

std::vector<ItemShape> Shapes(int group) {
  return {{},
          {.rows = 1},
          {.heads = group},
          {.heads = group, .rows = 4},
          {.heads = group, .one_tile = true},
          {.heads = group, .one_tile = true, .rows = 2},
          {.heads = group, .one_tile = true, .rows = 2, .wave_panels = 1},
          {.heads = group, .rows = 5, .wave_panels = 1}};
}

TEST(Frame, EveryRowOfTheMaskIsInOneItem) {
  for (const int group : {1, 3}) {
    for (const ItemShape& shape : Shapes(group)) {
      Framed f(Batch(2, group), Scored(64), shape);
      std::vector<std::atomic<int>> seen(f.mask.counts.size());
      std::atomic<int> chosen{0};
      while (f.frame.NextWave()) {
        f.frame.ForItems([&](const Item& item, Workspace) {
          ++chosen;
          for (const MaskRow& row : item.rows) {
            ++seen[row.index];
            EXPECT_EQ(row.index, f.call.g.Row(item.s, row.head, row.m));
            EXPECT_EQ(row.head / group, item.kv_head);
            EXPECT_TRUE(row.m == item.rows[0].m || !shape.one_tile);
            EXPECT_EQ(std::popcount(row.bits[0]), 0) << "rows begin empty";
          }
          EXPECT_LE(static_cast<int64_t>(item.rows.size()), shape.rows);
        });
      }
      EXPECT_GT(chosen, 0);
      for (int b = 0; b < f.call.p.batch; ++b) {
        const Sequence s = SequenceOf(f.call.p, b);
        for (int64_t h = 0; h < f.call.g.mask_heads; ++h) {
          for (int64_t m = 0; m < f.call.g.Tiles(s); ++m) {
            const int64_t index = f.call.g.Row(s, h, m);
            EXPECT_LE(seen[index], 1);
            EXPECT_TRUE(seen[index] == 1 || f.mask.fallback[b] != FP_SELECTED || m == 0);
            // Nothing was chosen, so what is there is forced: the diagonal, or all.
            const Tile tile = f.call.g.TileOf(f.call.p, s, m);
            const bool all = f.mask.fallback[b] != FP_SELECTED || tile.diagonal <= 0;
            EXPECT_EQ(f.mask.counts[index], all ? tile.visible : tile.visible - tile.diagonal);
          }
        }
      }
    }
  }
}

TEST(Frame, EveryUnitIsDoneOnce) {
  for (const int64_t wave_panels : {int64_t{1}, ItemShape::kAll}) {
    Framed f(Batch(3, 1), Scored(16), {.units = 1000, .wave_panels = wave_panels});
    const auto count = [](const Sequence& s) { return s.k_len / 100; };
    std::vector<std::vector<std::atomic<int>>> units;
    for (const Lengths& lengths : kBatch) units.emplace_back(lengths.k / 100);
    std::vector<std::vector<std::atomic<int>>> blocks;
    for (const Lengths& lengths : kBatch) blocks.emplace_back(3 * DivUp<int64_t>(lengths.k, 16));
    int waves = 0;
    for (; f.frame.NextWave(); ++waves) {
      f.frame.ForUnits(count, [&](const Sequence& s, int64_t unit, Workspace) { ++units[s.index][unit]; });
      f.frame.ForRuns([&](const cpu::BlockRun& run, Workspace) {
        for (int64_t b = run.begin; b < run.end; ++b) ++blocks[run.s.index][run.kv_head * f.call.g.Blocks(run.s) + b];
      });
    }
    EXPECT_EQ(waves > 1, wave_panels == 1);
    for (size_t b = 0; b < kBatch.size(); ++b) {
      const int expected = f.mask.fallback[b] == FP_SELECTED ? 1 : 0;
      for (const auto& done : units[b]) EXPECT_EQ(done, expected);
      for (const auto& done : blocks[b]) EXPECT_EQ(done, expected);
    }
  }
}

TEST(Frame, PanelsOfAWaveDoNotOverlap) {
  for (const int64_t wave_panels : {int64_t{3}, ItemShape::kAll}) {
    Framed f(Batch(2, 2), Scored(16), {.heads = 2, .wave_panels = wave_panels});
    while (f.frame.NextWave()) {
      std::vector<std::atomic<int>> used(2 * f.frame.capacity());
      f.frame.ForUnits([](const Sequence&) { return 2; },
                       [&](const Sequence& s, int64_t head, Workspace) {
                         const int64_t first = f.frame.Panel(s, head, 2);
                         for (int64_t i = 0; i < f.call.Panels(s); ++i) ++used.at(first + i);
                       });
      for (const auto& times : used) EXPECT_LE(times, 1);
    }
  }
}

TEST(Frame, AThreadsMemoryIsItsOwn) {
  Framed f(Batch(2, 2), Scored(16), {});
  std::atomic<int> inside{0};
  while (f.frame.NextWave()) {
    f.frame.ForItems([&](const Item&, Workspace scratch) {
      auto* own = scratch.Take<std::atomic<int>>(1);
      *own = 0;
      for (int i = 0; i < 1000; ++i) ++*own;
      EXPECT_EQ(*own, 1000);
      ++inside;
    });
  }
  EXPECT_GT(inside, 0);
}

} // namespace
} // namespace flashprefill::test
