// Audit's division of work. The rows that are audited of all query heads of a KV head become lanes of panels, 32 to a
// panel, by their positions; a *unit* is up to four such panels. A unit passes over its keys once
// (cpu/vertical_slash/kernels.h): a key is brought to fp32 once for up to 128 rows, and a panel whose rows end before
// the key takes no part, which halves the work. What is kept of a row is its sum by key block, 8 bytes of each, and the
// rest is arithmetic on these. A lane's arithmetic does not depend on its neighbours, so neither the threads nor the
// cut into units change a bit of the result.
//
// Where a mask has lists of keys, or verticals and slashes, each lane has a bitmap of those that count, and a block's
// sum over them is taken from its scores while they are in the first cache.
#include "cpu/audit/audit.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/key_list.h"
#include "core/vertical_slash.h"
#include "cpu/vertical_slash/kernels.h"
#include "cpu/vertical_slash/lanes.h"
#include "cpu/work.h"

namespace flashprefill::cpu {
namespace {

constexpr int64_t kMostPanels = 4; // of a unit: scores of a chunk of keys by 128 lanes are 32 KiB

constexpr double kRounding = 1e-6; // of two fp32 sums over the same keys

bool HasExtraKeys(const BlockMask& mask) { return HasVerticalSlash(mask) || HasKeyLists(mask); }

// Rows order[begin, end), of one KV head.
struct Unit {
  int64_t cost; // of its last row
  int32_t begin, end;
};

class AuditCall {
 public:
  AuditCall(const Problem& p, const BlockMask& mask, const Exec& exec, std::span<AuditRow> rows, int64_t count,
            void* workspace)
      : p_(p),
        mask_(mask),
        g_(Geometry::Of(p, mask)),
        kernels_(VerticalSlashKernelsFor(exec)),
        rows_(rows),
        threads_(ThreadCount(exec.threads)),
        lanes_(UnitLanes(count)),
        blocks_(DivUp<int64_t>(p.max_seqlen_k, g_.block_size)),
        key_words_(HasExtraKeys(mask) ? DivUp<int64_t>(p.max_seqlen_k, 64) : 0) {
    Workspace memory(workspace);
    order_ = memory.Take<int32_t>(count);
    // Not by lanes_: a call of fewer rows than the workspace was asked for may have smaller units, and more of them.
    units_ = memory.Take<Unit>(DivUp<int64_t>(count, kPanelRows) + int64_t{p.batch} * p.kv_heads);
    Workspace one(nullptr);
    TakeScratch(one);
    scratch_bytes_ = one.used();
    scratch_ = memory.Take<std::byte>(static_cast<int64_t>(scratch_bytes_) * threads_);
    bytes_ = memory.used();
  }

  size_t bytes() const { return bytes_; }

  void Run() {
    const int64_t units = ListUnits();
    ForAll(threads_, units, [&](int64_t i, int thread) {
      Workspace memory(scratch_ + scratch_bytes_ * thread);
      RunUnit(units_[i], TakeScratch(memory));
    });
  }

 private:
  struct Scratch {
    float* row;     // [head_dim]
    float* panels;  // [lanes / 32][head_dim][32]
    float* keys;    // [kChunkKeys][head_dim]
    float* scores;  // [kChunkKeys][lanes]
    float* largest; // [blocks][lanes]
    float* sums;    // [blocks][lanes], relative to 2^largest
    float* extra;   // [blocks][lanes]: of sums the part that lists, verticals and slashes keep; null without them
    uint64_t* bits; // [lanes][key words]: which keys these are
    int32_t* seen;  // [lanes]
  };

  Scratch TakeScratch(Workspace& memory) const {
    const int64_t d = p_.head_dim;
    const bool extra = HasExtraKeys(mask_);
    return {.row = memory.Take<float>(d),
            .panels = memory.Take<float>(lanes_ * d),
            .keys = memory.Take<float>(kChunkKeys * d),
            .scores = memory.Take<float>(kChunkKeys * lanes_),
            .largest = memory.Take<float>(blocks_ * lanes_),
            .sums = memory.Take<float>(blocks_ * lanes_),
            .extra = extra ? memory.Take<float>(blocks_ * lanes_) : nullptr,
            .bits = extra ? memory.Take<uint64_t>(lanes_ * key_words_) : nullptr,
            .seen = memory.Take<int32_t>(lanes_)};
  }

  // As many rows per unit as leave each thread two units, in whole panels.
  int64_t UnitLanes(int64_t count) const {
    return std::clamp(DivUp<int64_t>(count / (2 * threads_), kPanelRows), int64_t{1}, kMostPanels) * kPanelRows;
  }

  int64_t Seen(const AuditRow& row, const Sequence& s) const { return p_.causal ? s.prefix + row.row + 1 : s.k_len; }

  // Orders rows by KV head and position, and cuts them into units, the dearest first.
  int64_t ListUnits() {
    const int64_t count = static_cast<int64_t>(rows_.size());
    const auto kv_head = [&](int32_t i) { return rows_[i].head / g_.group; };
    for (int64_t i = 0; i < count; ++i) order_[i] = static_cast<int32_t>(i);
    std::sort(order_, order_ + count, [&](int32_t a, int32_t b) {
      const AuditRow &x = rows_[a], &y = rows_[b];
      if (x.sequence != y.sequence) return x.sequence < y.sequence;
      if (kv_head(a) != kv_head(b)) return kv_head(a) < kv_head(b);
      return x.row != y.row ? x.row < y.row : a < b;
    });
    int64_t units = 0;
    for (int64_t begin = 0, end; begin < count; begin = end) {
      const AuditRow& first = rows_[order_[begin]];
      for (end = begin; end < std::min(count, begin + lanes_); ++end) {
        if (rows_[order_[end]].sequence != first.sequence || kv_head(order_[end]) != kv_head(order_[begin])) break;
      }
      const int64_t cost = Seen(rows_[order_[end - 1]], SequenceOf(p_, first.sequence));
      units_[units++] = {cost, static_cast<int32_t>(begin), static_cast<int32_t>(end)};
    }
    std::sort(units_, units_ + units,
              [](const Unit& a, const Unit& b) { return a.cost != b.cost ? a.cost > b.cost : a.begin < b.begin; });
    return units;
  }

  void RunUnit(const Unit& unit, const Scratch& scratch) const {
    const Sequence s = SequenceOf(p_, rows_[order_[unit.begin]].sequence);
    const int64_t kv_head = rows_[order_[unit.begin]].head / g_.group;
    FillLanes(unit, s, scratch);
    const int64_t keys = unit.cost, rows = unit.end - unit.begin, past = DivUp<int64_t>(rows, kPanelRows) * kPanelRows;
    int64_t first = 0; // lane from which on rows see the key
    for (int64_t block = 0; block * g_.block_size < keys; ++block) {
      float* largest = scratch.largest + block * lanes_;
      std::fill_n(largest, lanes_, kLeastScore);
      std::fill_n(scratch.sums + block * lanes_, lanes_, 0.f);
      if (scratch.extra) std::fill_n(scratch.extra + block * lanes_, lanes_, 0.f);
      const int64_t end = std::min(keys, (block + 1) * g_.block_size);
      for (int64_t key = block * g_.block_size; key < end; key += kChunkKeys) {
        while (scratch.seen[std::min(first + kPanelRows, rows) - 1] <= key) first += kPanelRows;
        const int64_t count = std::min<int64_t>(kChunkKeys, end - key);
        kernels_.load_keys(p_, s, key, key + count, kv_head, scratch.keys);
        const ScoreChunk chunk{scratch.panels + first * p_.head_dim,
                               scratch.keys,
                               scratch.seen + first,
                               p_.head_dim,
                               key,
                               count,
                               past - first,
                               scratch.scores};
        kernels_.score(chunk);
        AddChunk(chunk, block, first, scratch);
      }
    }
    for (int32_t i = unit.begin; i < unit.end; ++i) Finish(s, rows_[order_[i]], i - unit.begin, scratch);
  }

  // Brings the sums of a block up to date, those of the keys that lists keep too.
  void AddChunk(const ScoreChunk& chunk, int64_t block, int64_t first, const Scratch& scratch) const {
    float* largest = scratch.largest + block * lanes_ + first;
    float* sums = scratch.sums + block * lanes_ + first;
    if (!scratch.extra) return kernels_.add_to_sums(chunk, largest, sums);
    float before[kMostPanels * kPanelRows];
    std::copy_n(largest, chunk.lanes, before);
    kernels_.add_to_sums(chunk, largest, sums);
    kernels_.share(chunk, largest);
    float* extra = scratch.extra + block * lanes_ + first;
    for (int64_t lane = 0; lane < chunk.lanes; ++lane) {
      extra[lane] *= std::exp2(before[lane] - largest[lane]);
      uint64_t keys = ChunkBits(scratch.bits + (first + lane) * key_words_, chunk.first, chunk.count);
      for (; keys != 0; keys &= keys - 1) extra[lane] += chunk.scores[std::countr_zero(keys) * chunk.lanes + lane];
    }
  }

  // Bits [first, first + count) of a lane; count is at most 64.
  uint64_t ChunkBits(const uint64_t* bits, int64_t first, int64_t count) const {
    const int64_t word = first / 64, shift = first % 64;
    uint64_t chunk = bits[word] >> shift;
    if (shift > 0 && word + 1 < key_words_) chunk |= bits[word + 1] << (64 - shift);
    return count < 64 ? chunk & ((uint64_t{1} << count) - 1) : chunk;
  }

  void FillLanes(const Unit& unit, const Sequence& s, const Scratch& scratch) const {
    std::fill_n(scratch.panels, lanes_ * p_.head_dim, 0.f);
    std::fill_n(scratch.seen, lanes_, 0);
    if (scratch.extra) std::fill_n(scratch.bits, lanes_ * key_words_, uint64_t{0});
    for (int32_t i = unit.begin; i < unit.end; ++i) {
      const AuditRow& row = rows_[order_[i]];
      const int64_t lane = i - unit.begin;
      kernels_.load_queries(p_, s, row.row, row.row + 1, row.head, scratch.row);
      PutLane(scratch.row, p_.head_dim, ExponentScale(p_), lane, scratch.panels);
      scratch.seen[lane] = static_cast<int32_t>(Seen(row, s));
      if (scratch.extra) MarkExtra(s, row, scratch.bits + lane * key_words_);
    }
  }

  // Sets the bits of the keys that a row's tile sees besides its blocks.
  void MarkExtra(const Sequence& s, const AuditRow& row, uint64_t* bits) const {
    const int64_t mask_head = row.head / g_.heads_per_tile, m = row.row / g_.tile_tokens;
    const uint64_t* kept = mask_.bits + g_.Row(s, mask_head, m) * g_.words;
    const KeyList list = KeyList::OfTile(mask_, s, mask_head, m);
    for (int64_t i = 0; i < list.count && list.keys[i] < Seen(row, s); ++i) SetBit(bits, list.keys[i]);
    if (!HasVerticalSlash(mask_)) return;
    ForVerticalSlashRuns(g_, s, g_.TileOf(p_, s, m), VerticalSlash::Of(mask_, s.index, mask_head), kept,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t key = begin; key < end; ++key) SetBit(bits, key);
                         });
  }

  // A row's result, from its sums.
  void Finish(const Sequence& s, AuditRow& row, int64_t lane, const Scratch& scratch) const {
    const int64_t blocks = DivUp<int64_t>(Seen(row, s), g_.block_size);
    const uint64_t* bits = mask_.bits + g_.Row(s, row.head / g_.heads_per_tile, row.row / g_.tile_tokens) * g_.words;
    float top = kLeastScore;
    for (int64_t block = 0; block < blocks; ++block) top = std::max(top, scratch.largest[block * lanes_ + lane]);
    double total = 0, kept = 0, most = 0;
    row.missed_block = -1;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = block * lanes_ + lane;
      const double scale = std::exp2(double{scratch.largest[at]} - top), mass = scratch.sums[at] * scale;
      total += mass;
      double missed = TestBit(bits, block) ? 0 : mass;
      if (missed > 0 && scratch.extra) {
        missed -= scratch.extra[at] * scale;
        if (missed < kRounding * mass) missed = 0; // all of the block's keys are kept
      }
      kept += mass - missed;
      if (missed > most) most = missed, row.missed_block = static_cast<int32_t>(block);
    }
    row.recall = total > 0 ? static_cast<float>(kept / total) : 1;
    row.missed = total > 0 ? static_cast<float>(most / total) : 0;
  }

  const Problem& p_;
  const BlockMask& mask_;
  const Geometry g_;
  const VerticalSlashKernels& kernels_;
  const std::span<AuditRow> rows_;
  const int threads_;
  const int64_t lanes_; // of a unit
  const int64_t blocks_;
  const int64_t key_words_;
  int32_t* order_; // rows by KV head and position
  Unit* units_;
  std::byte* scratch_;
  size_t scratch_bytes_; // of one thread
  size_t bytes_;
};

} // namespace

size_t AuditWorkspace(const Problem& p, const BlockMask& mask, const Exec& exec, int64_t rows) {
  return AuditCall(p, mask, exec, {}, rows, nullptr).bytes();
}

void Audit(const Problem& p, const BlockMask& mask, const Exec& exec, std::span<AuditRow> rows, void* workspace) {
  AuditCall(p, mask, exec, rows, static_cast<int64_t>(rows.size()), workspace).Run();
}

} // namespace flashprefill::cpu
