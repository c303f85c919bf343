// One work item is one head of one sequence, taken from a shared counter: its choice needs a look at all of K, and the
// bits of its tiles follow from it. What a head chooses, and what is forced, is joined here.
#include "cpu/select_vertical_slash.h"

#include <atomic>

#include "core/method.h"
#include "core/threads.h"
#include "core/vertical_slash.h"
#include "cpu/select_keep.h"
#include "cpu/vertical_slash.h"

namespace flashprefill::cpu {
namespace {

using Chooser = void (*)(const HeadCall&);

Chooser ChooserOf(const Policy& policy) {
  switch (policy.kind) {
    case FP_FLEXPREFILL:
      return ChooseFlexPrefill;
    case FP_MINFERENCE:
      return ChooseMInference;
    default:
      return nullptr;
  }
}

struct Memory {
  int threads;
  std::byte* scratch;
  size_t scratch_bytes; // of one thread
  size_t bytes;
};

Memory MemoryOf(const Problem& p, const Policy& policy, const Exec& exec, void* workspace) {
  Memory m{};
  m.threads = static_cast<int>(std::clamp<int64_t>(int64_t{p.batch} * p.q_heads, 1, ThreadCount(exec.threads)));
  Workspace one(nullptr);
  VerticalSlashScratch::Take(one, p, policy);
  m.scratch_bytes = one.used();
  Workspace parts(workspace);
  m.scratch = parts.Take<std::byte>(static_cast<int64_t>(m.scratch_bytes) * m.threads);
  m.bytes = parts.used();
  return m;
}

} // namespace

bool ChoosesByHead(const Policy& policy) { return ChooserOf(policy) != nullptr; }

size_t SelectVerticalSlashWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return MemoryOf(p, policy, exec, nullptr).bytes;
}

void SelectVerticalSlash(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  const Geometry g = Geometry::Of(p, policy);
  const Memory memory = MemoryOf(p, policy, exec, workspace);
  const VerticalSlashKernels& kernels = VerticalSlashKernelsFor(exec);
  const Chooser choose = ChooserOf(policy);

  auto select_head = [&](const Sequence& s, int64_t head, const VerticalSlashScratch& scratch) {
    const bool everything = FallbackOf(p, g, policy, s) != FP_SELECTED;
    const HeadCall call{p, policy, g, kernels, s, head, mask, scratch};
    if (HasVerticalSlash(mask)) std::fill_n(VerticalSlashAt(mask, s.index, head), 2, 0);
    if (!everything) choose(call);
    for (int64_t m = 0; m < g.Tiles(s); ++m) {
      const Tile tile = g.TileOf(p, s, m);
      uint64_t* row = call.Row(m);
      if (everything || InDenseTail(g, policy, s, m)) {
        FillRow(row, g.words, tile.visible);
      } else {
        for (int64_t w = 0; w < g.words; ++w) row[w] = VisibleWord(row, w, tile.visible);
        KeepForced(policy, tile, row);
      }
      if (mask.counts) {
        const int64_t keys = VerticalSlashKeys(g, s, tile, VerticalSlash::Of(mask, s.index, head), row);
        mask.counts[g.Row(s, head, m)] =
            CountBits(row, g.words) + static_cast<int32_t>(DivUp<int64_t>(keys, g.block_size));
      }
    }
  };

  for (int b = 0; mask.fallback && b < p.batch; ++b) mask.fallback[b] = FallbackOf(p, g, policy, SequenceOf(p, b));
  const int64_t items = int64_t{p.batch} * p.q_heads;
  std::atomic<int64_t> next{0};
  Parallel(static_cast<int>(std::min<int64_t>(memory.threads, items)), [&](int thread) {
    Workspace own(memory.scratch + memory.scratch_bytes * thread);
    const VerticalSlashScratch scratch = VerticalSlashScratch::Take(own, p, policy);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      select_head(SequenceOf(p, static_cast<int>(i / p.q_heads)), i % p.q_heads, scratch);
    }
  });
}

} // namespace flashprefill::cpu
