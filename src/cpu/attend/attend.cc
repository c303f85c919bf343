// Attend's division of work. A *pair* is one KV head of one sequence. Its K and V are packed once, then all tiles of
// all its query heads are computed from them. Pairs go through in waves, as many together as the memory for packed keys
// holds: a long prompt's heads one by one, so that packed keys stay in the last cache and scratch memory is one head's;
// hundreds of short ones at once. In a wave all threads pack, then all take tiles from one list with the heaviest tiles
// first, so that whatever is left at the end is small. A sequence of few queries (decoding) is not packed: its rows
// read K and V as they lie. Where the mask has key lists, what is taken from the list of tiles is a segment: its keys
// are packed once, by rows from anywhere, and then serve all its tiles. A tile's arithmetic is one thread's, in a fixed
// order: the result does not depend on the number of threads.
#include "cpu/attend/attend.h"

#include <atomic>
#include <numeric>

#include "core/half.h"
#include "core/key_list.h"
#include "core/threads.h"
#include "core/vertical_slash.h"
#include "cpu/attend/segment.h"
#include "cpu/attend/tile.h"

namespace flashprefill::cpu {
namespace {

constexpr int64_t kUnitKeys = 256;               // keys per unit of packing, at least
constexpr int64_t kWaveBytes = int64_t{2} << 20; // packed keys per thread and wave if pairs are short

// One KV head of one sequence, in the wave that it is part of.
struct Pair {
  Sequence s;
  int64_t head;
  bool is_packed;
  Packed keys;
  MeanRows means;
  BlockMeans block_means; // with key lists in place of these
  uint64_t* used;         // blocks that some tile keeps: only these are packed
  int64_t first_unit;     // of packing
};

// One tile of one mask head; with key lists the tiles of one segment, of which it is the first.
struct Item {
  int64_t kept; // blocks
  int32_t pair, mask_head, tile;
};

bool Heavier(const Item& a, const Item& b) {
  if (a.kept != b.kept) return a.kept > b.kept;
  if (a.tile != b.tile) return a.tile > b.tile;
  return a.pair != b.pair ? a.pair < b.pair : a.mask_head < b.mask_head;
}

// Whether keys that `q_len` queries see are worth packing: reading them once for each row must not cost more. Rows that
// read keys as they lie know blocks only.
bool WorthPacking(const AttendCall& call, int64_t q_len, bool has_lists) {
  return q_len * call.g.group > kFewRows || call.mask.mean_correction || HasVerticalSlash(call.mask) || has_lists;
}

// Whether some key list of a pair holds a key.
bool HasListedKeys(const AttendCall& call, const Sequence& s, int64_t kv_head) {
  const int64_t mask_heads = call.g.group / call.g.heads_per_tile;
  for (int64_t h = kv_head * mask_heads; h < (kv_head + 1) * mask_heads; ++h) {
    for (int64_t i = 0; i < Segments(call.mask, s); ++i) {
      if (KeyList::Of(call.mask, s, h, i).count > 0) return true;
    }
  }
  return false;
}

// Cuts the memory of one pair out of a wave's.
void TakePair(Workspace& memory, const AttendCall& call, int64_t k_len, bool is_packed, Pair& pair) {
  const int64_t blocks = DivUp<int64_t>(k_len, call.g.block_size);
  pair.is_packed = is_packed;
  pair.block_means = {}; // a pair lies in memory that nothing was written to
  pair.keys = pair.is_packed ? Packed::Take(memory, call.kernels, call.p.head_dim, k_len) : Packed{};
  pair.used = memory.Take<uint64_t>(DivUp<int64_t>(blocks, 64));
  if (!call.mask.mean_correction) return;
  if (HasKeyLists(call.mask)) {
    pair.block_means = BlockMeans::Take(memory, call.p.head_dim, blocks);
    return;
  }
  pair.means = MeanRows::Take(memory, call.p, call.mask, call.kernels, blocks);
}

// An upper bound where the mask has key lists, which may be empty.
size_t PairBytes(const AttendCall& call, int64_t q_len, int64_t k_len) {
  Workspace memory(nullptr);
  Pair pair{};
  TakePair(memory, call, k_len, WorthPacking(call, q_len, HasKeyLists(call.mask)), pair);
  return memory.used();
}

TileScratch TakeScratch(Workspace& memory, const AttendCall& call) { return TileScratch::Take(memory, call); }

// The parts of the caller's workspace.
struct Memory {
  int threads;
  Pair* pairs;     // [batch * kv_heads]
  Item* items;     // [mask heads * tile rows]
  std::byte* wave; // packed keys
  size_t capacity; // bytes of it
  std::byte* scratch;
  size_t scratch_bytes; // of one thread
  size_t bytes;

  Memory(const AttendCall& call, const Exec& exec, void* workspace) {
    const int64_t pair_count = int64_t{call.p.batch} * call.p.kv_heads;
    threads = ThreadCount(exec.threads);
    Workspace parts(workspace);
    pairs = parts.Take<Pair>(pair_count);
    items = parts.Take<Item>(call.g.mask_heads * call.g.tile_rows);
    const size_t longest = PairBytes(call, call.p.max_seqlen_q, call.p.max_seqlen_k);
    capacity = std::max(longest, std::min<size_t>(longest * pair_count, threads * kWaveBytes));
    wave = parts.Take<std::byte>(capacity);
    Workspace one(nullptr);
    TakeScratch(one, call);
    scratch_bytes = one.used();
    scratch = parts.Take<std::byte>(scratch_bytes * threads);
    bytes = parts.used();
  }
};

// Packing and averaging: keys [begin, begin + kGroup) or blocks of a pair.
class Packer {
 public:
  Packer(const AttendCall& call) : call_(call) {
    const int64_t both = std::lcm<int64_t>(kGroup, call.g.block_size); // whole groups and whole blocks
    unit_keys_ = DivUp(kUnitKeys, both) * both;
  }

  int64_t Units(const Pair& pair) const { return pair.is_packed ? DivUp(pair.s.k_len, unit_keys_) : 0; }

  // One unit of a pair: packs its used keys, and takes the means of its blocks.
  void Pack(const Pair& pair, int64_t unit, float* mean) const {
    const int64_t begin = unit * unit_keys_, end = std::min(begin + unit_keys_, pair.s.k_len);
    for (int64_t key = begin; key < end; key += kGroup) {
      if (Used(pair, key)) PackGroup(pair, key);
    }
    if (!call_.mask.mean_correction) return;
    const int64_t block_size = call_.g.block_size;
    for (int64_t block = begin / block_size; block < DivUp(end, block_size); ++block) MeanOf(pair, block, mean);
  }

  // Packs the means of blocks [block, block + kGroup) like keys.
  void PackMeans(const Pair& pair, int64_t block) const {
    pair.means.Pack(call_, block, std::min<int64_t>(kGroup, call_.g.Blocks(pair.s) - block));
  }

 private:
  bool Used(const Pair& pair, int64_t key) const {
    const int64_t end = std::min(key + kGroup, pair.s.k_len);
    for (int64_t block = key / call_.g.block_size; block * call_.g.block_size < end; ++block) {
      if (TestBit(pair.used, block)) return true;
    }
    return false;
  }

  // Keys [key, key + count) of a tensor as rows.
  Rows KeyRows(const Pair& pair, const fp_tensor& tensor, float scale, int64_t key, int32_t count,
               int64_t* offset) const {
    for (int32_t i = 0; i < count; ++i) {
      offset[i] = KeyOffset(call_.p, tensor.stride, pair.s, key + i, pair.head);
    }
    return {tensor.data, tensor.dtype, count, tensor.stride[3], offset, scale};
  }

  float ScaleOfKeys(const Pair& pair) const { return KeyScale(call_.p, pair.s, pair.head); }
  float ScaleOfValues(const Pair& pair) const { return ValueScale(call_.p, pair.s, pair.head); }

  void PackGroup(const Pair& pair, int64_t key) const {
    int64_t offset[kGroup];
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(kGroup, pair.s.k_len - key));
    const int32_t d = call_.p.head_dim;
    const Packed& to = pair.keys;
    call_.kernels.pack_keys(KeyRows(pair, call_.p.k, ScaleOfKeys(pair), key, count, offset), d, key, to.k);
    call_.kernels.pack_values(KeyRows(pair, call_.p.v, ScaleOfValues(pair), key, count, offset), d, key, to.v);
  }

  void MeanOf(const Pair& pair, int64_t block, float* mean) const {
    int64_t offset[kMaxBlock];
    const int32_t count = static_cast<int32_t>(call_.g.BlockKeys(pair.s, block));
    const int32_t d = call_.p.head_dim;
    auto average = [&](const fp_tensor& tensor, float scale, std::byte* to, float* exact) {
      call_.kernels.mean(KeyRows(pair, tensor, scale, block * call_.g.block_size, count, offset), d, mean);
      if (exact) {
        std::copy_n(mean, d, exact + block * d);
      } else {
        for (int32_t i = 0; i < d; ++i) StoreElement(to, MeanDtype(tensor.dtype), block * d + i, mean[i]);
      }
    };
    average(call_.p.k, ScaleOfKeys(pair), pair.means.keys, pair.block_means.keys);
    average(call_.p.v, ScaleOfValues(pair), pair.means.values, pair.block_means.values);
  }

  static constexpr int kMaxBlock = 1024; // of the C ABI
  const AttendCall& call_;
  int64_t unit_keys_;
};

// Lists the tiles of a pair, heaviest or not, and which blocks they keep; one item for all of them where keys are not
// packed. Returns how many.
int64_t ListItems(const AttendCall& call, int32_t index, const Pair& pair, Item* items) {
  const Geometry& g = call.g;
  const int64_t mask_heads = g.group / g.heads_per_tile; // of this KV head
  std::fill_n(pair.used, DivUp<int64_t>(g.Blocks(pair.s), 64), uint64_t{0});
  int64_t count = 0;
  for (int64_t h = pair.head * mask_heads; h < (pair.head + 1) * mask_heads; ++h) {
    for (int64_t m = 0; m < g.Tiles(pair.s); ++m) {
      const Tile tile = g.TileOf(call.p, pair.s, m);
      const uint64_t* bits = call.mask.bits + g.Row(pair.s, h, m) * g.words;
      int64_t kept = 0;
      for (int64_t w = 0; w < DivUp<int64_t>(tile.visible, 64); ++w) {
        const uint64_t word = VisibleWord(bits, w, tile.visible);
        pair.used[w] |= word;
        kept += std::popcount(word);
      }
      if (!pair.is_packed && count == 1) {
        items[0].kept += kept;
        continue;
      }
      if (pair.is_packed && HasKeyLists(call.mask)) {
        kept += ListedBlocks(g, pair.s, tile, KeyList::OfTile(call.mask, pair.s, h, m), bits);
        if (m % call.mask.segment_tiles != 0) {
          items[count - 1].kept += kept;
          continue;
        }
      }
      if (HasVerticalSlash(call.mask)) {
        kept += VerticalSlashKeys(g, pair.s, tile, VerticalSlash::Of(call.mask, pair.s.index, h), bits) / g.block_size;
      }
      items[count++] = {kept, index, static_cast<int32_t>(h), static_cast<int32_t>(m)};
    }
  }
  return count;
}

// Whether out is too large to stay in a core's caches. Then it is stored past them, so that memory is not read before
// it is written: on a core with AMX a tile's end takes 2.5 us instead of 12, of 34 for a tile that keeps its diagonal.
bool Streams(const Problem& p) {
  constexpr int64_t kLarge = int64_t{4} << 20; // bytes; L2 caches are smaller
  return p.total_q * p.q_heads * p.head_dim * static_cast<int64_t>(DtypeSize(p.q.dtype)) >= kLarge;
}

// A call's struct: kernels by the exec's target.
AttendCall MakeCall(const Problem& p, const BlockMask& mask, const Exec& exec, const Output& output) {
  const Isa isa = IsaOf(exec);
  return {p, mask, output, Geometry::Of(p, mask), AttendKernelsFor(isa, p), AttendF32KernelsFor(isa), Streams(p)};
}

} // namespace

size_t AttendWorkspace(const Problem& p, const BlockMask& mask, const Exec& exec) {
  const Output none{};
  return Memory(MakeCall(p, mask, exec, none), exec, nullptr).bytes;
}

void Attend(const Problem& p, const BlockMask& mask, const Exec& exec, const Output& output, void* workspace) {
  const AttendCall call = MakeCall(p, mask, exec, output);
  const Memory memory(call, exec, workspace);
  const Packer packer(call);

  auto scratch_of = [&](int thread) {
    Workspace part(memory.scratch + thread * memory.scratch_bytes);
    return TakeScratch(part, call);
  };

  // Runs body(index, next, scratch) for every index below count, each on whichever thread is free. A thread takes its
  // next index, or `count`, before it begins with one, so that it can fetch ahead.
  auto for_each = [&](int64_t count, auto&& body) {
    std::atomic<int64_t> next{0};
    const int threads = static_cast<int>(std::min<int64_t>(memory.threads, count));
    if (threads == 0) return;
    Parallel(threads, [&](int thread) {
      TileScratch scratch = scratch_of(thread);
      const auto take = [&] { return std::min(next.fetch_add(1, std::memory_order_relaxed), count); };
      for (int64_t i = take(), after; i < count; i = after) {
        after = take();
        body(i, after, scratch);
      }
    });
  };

  // Pairs from `first` on, as many as there is memory for. Returns the first of the next wave.
  auto run_wave = [&](int64_t first) {
    Workspace wave(memory.wave);
    int64_t count = 0, units = 0, items = 0;
    const int64_t left = int64_t{p.batch} * p.kv_heads - first;
    for (; count < left; ++count) {
      Pair& pair = memory.pairs[count];
      pair.s = SequenceOf(p, static_cast<int>((first + count) / p.kv_heads));
      pair.head = (first + count) % p.kv_heads;
      if (wave.used() + PairBytes(call, pair.s.q_len, pair.s.k_len) > memory.capacity) break;
      const bool is_packed = WorthPacking(call, pair.s.q_len, HasListedKeys(call, pair.s, pair.head));
      TakePair(wave, call, pair.s.k_len, is_packed, pair);
      pair.first_unit = units;
      units += packer.Units(pair);
      items += ListItems(call, static_cast<int32_t>(count), pair, memory.items + items);
    }
    std::sort(memory.items, memory.items + items, Heavier);

    for_each(units, [&](int64_t unit, int64_t, TileScratch& scratch) {
      const Pair* pair = std::upper_bound(memory.pairs, memory.pairs + count, unit,
                                          [](int64_t u, const Pair& x) { return u < x.first_unit; }) -
                         1;
      packer.Pack(*pair, unit - pair->first_unit, scratch.mean);
    });
    if (mask.mean_correction == FP_BLOCK_MEANS && !HasKeyLists(mask)) {
      for_each(count, [&](int64_t i, int64_t, TileScratch&) {
        const Pair& pair = memory.pairs[i];
        for (int64_t block = 0; block < call.g.Blocks(pair.s); block += kGroup) packer.PackMeans(pair, block);
      });
    }
    for_each(items, [&](int64_t i, int64_t after, TileScratch& scratch) {
      const Item& item = memory.items[i];
      const Pair& pair = memory.pairs[item.pair];
      if (pair.is_packed && HasKeyLists(mask)) {
        AttendSegment(call, pair.s, item.mask_head, item.tile, pair.keys, pair.block_means, scratch);
      } else if (pair.is_packed) {
        const Item* next = after < items && memory.items[after].pair == item.pair ? &memory.items[after] : nullptr;
        const int64_t next_key = next ? FirstKey(call, pair.s, next->mask_head, next->tile) : -1;
        AttendTile(call, pair.s, item.mask_head, item.tile, pair.keys, pair.means, next_key, scratch);
      } else {
        AttendFewRows(call, pair.s, pair.head, scratch);
      }
    });
    return first + count;
  };

  const int64_t pairs = int64_t{p.batch} * p.kv_heads;
  for (int64_t first = 0; first < pairs;) first = run_wave(first);
}

} // namespace flashprefill::cpu
