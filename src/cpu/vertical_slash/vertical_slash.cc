// Sums by vertical and slash, means and ranks: see vertical_slash.h.
#include "cpu/vertical_slash/vertical_slash.h"

#include <cmath>
#include <functional>
#include <limits>

#include "core/vertical_slash.h"
#include "cpu/vertical_slash/lanes.h"

namespace flashprefill::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Adds keys [first, first + count), which lie in scratch.rows, to the means of their blocks.
void AddToMeans(const HeadCall& call, int64_t first, int64_t count) {
  const int64_t depth = call.p.head_dim, size = call.block_size();
  for (int64_t t = first; t < first + count;) {
    const int64_t block = t / size, end = std::min({(block + 1) * size, first + count});
    float* mean = call.scratch.key_means + block * depth;
    if (t == block * size) std::fill_n(mean, depth, 0.f);
    call.kernels.add_rows(call.scratch.rows + (t - first) * depth, end - t, depth, mean);
    if (end == block * size + call.g.BlockKeys(call.s, block)) {
      FinishMean(mean, depth, call.g.BlockKeys(call.s, block), call.p.k.dtype);
    }
    t = end;
  }
}

// The tokens in ranks become a list of the mask: 0, the verticals, or 1, the slashes.
void WriteList(const HeadCall& call, int list, int64_t count) {
  int32_t* own = VerticalSlashAt(call.mask, call.s.index, call.head);
  int32_t* to = own + 2 + (list == 0 ? 0 : call.mask.max_verticals);
  std::sort(call.scratch.ranks, call.scratch.ranks + count);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(call.scratch.ranks[i]);
  own[list] = static_cast<int32_t>(count);
}

} // namespace

VerticalSlashScratch VerticalSlashScratch::Take(Workspace& memory, const SelectCall& call,
                                                const VerticalSlashNeeds& needs) {
  const Problem& p = call.p;
  const int64_t keys = p.max_seqlen_k, depth = p.head_dim, size = call.g.block_size;
  const int64_t blocks = DivUp<int64_t>(keys, size);
  const int64_t query_lanes = DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_q, size), kPanelRows) * kPanelRows;
  const int64_t lanes = DivUp<int64_t>(needs.last_rows, kPanelRows) * kPanelRows;
  VerticalSlashScratch t{};
  t.verticals = memory.Take<float>(keys);
  t.slashes = memory.Take<float>(keys + lanes);
  t.key_means = memory.Take<float>(blocks * depth);
  t.query_panels = memory.Take<float>(query_lanes * depth);
  t.query_reference = memory.Take<float>(query_lanes);
  t.query_seen = memory.Take<int32_t>(query_lanes);
  t.query_left = memory.Take<int32_t>(query_lanes);
  t.logits = memory.Take<float>(needs.pooled_logits ? blocks * kPanelRows : 0);
  t.rows = memory.Take<float>(std::max({size, int64_t{kChunkKeys}, needs.last_rows}) * depth);
  t.panels = memory.Take<float>(lanes * depth);
  t.scores = memory.Take<float>(kChunkKeys * lanes);
  t.largest = memory.Take<float>(lanes);
  t.sums = memory.Take<float>(lanes);
  t.seen = memory.Take<int32_t>(lanes);
  t.ranks = memory.Take<uint64_t>(needs.tokens ? keys : blocks);
  t.counts = memory.Take<int32_t>(needs.tokens ? keys + 1 : 0);
  t.vertical_blocks = memory.Take<uint64_t>(DivUp<int64_t>(blocks, 64));
  return t;
}

void SumVerticalSlash(const HeadCall& call, int64_t rows, bool with_means) {
  const VerticalSlashScratch& t = call.scratch;
  const int64_t depth = call.p.head_dim, keys = call.s.k_len;
  rows = std::min(rows, call.s.q_len);
  const int64_t lanes = DivUp<int64_t>(rows, kPanelRows) * kPanelRows;
  call.kernels.load_queries(call.p, call.s, call.s.q_len - rows, call.s.q_len, call.head, t.rows);
  std::fill_n(t.panels, lanes * depth, 0.f);
  for (int64_t lane = 0; lane < rows; ++lane) {
    PutLane(t.rows + (rows - 1 - lane) * depth, depth, call.exponent_scale(), lane, t.panels);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) t.seen[lane] = static_cast<int32_t>(lane < rows ? keys - lane : 0);
  std::fill_n(t.largest, lanes, kLeastScore);
  std::fill_n(t.sums, lanes, 0.f);
  std::fill_n(t.slashes, keys + lanes, 0.f);

  const auto for_chunks = [&](const auto& body) {
    for (int64_t first = 0; first < keys; first += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, keys - first);
      call.kernels.load_keys(call.p, call.s, first, first + count, call.kv_head(), t.rows);
      const ScoreChunk chunk{t.panels, t.rows, t.seen, depth, first, count, lanes, t.scores};
      call.kernels.score(chunk);
      body(chunk);
    }
  };
  for_chunks([&](const ScoreChunk& chunk) {
    call.kernels.add_to_sums(chunk, t.largest, t.sums);
    if (with_means) AddToMeans(call, chunk.first, chunk.count);
  });
  for (int64_t lane = 0; lane < lanes; ++lane) {
    t.largest[lane] = LaneReference(t.largest[lane], t.sums[lane], 1.f / static_cast<float>(rows));
  }
  for_chunks([&](const ScoreChunk& chunk) {
    call.kernels.share(chunk, t.largest);
    call.kernels.add_vertical_slash(chunk, t.verticals + chunk.first, t.slashes + chunk.first);
  });
}

void MeanKeys(const HeadCall& call) {
  for (int64_t first = 0; first < call.s.k_len; first += kChunkKeys) {
    const int64_t count = std::min<int64_t>(kChunkKeys, call.s.k_len - first);
    call.kernels.load_keys(call.p, call.s, first, first + count, call.kv_head(), call.scratch.rows);
    AddToMeans(call, first, count);
  }
}

void MeanQueries(const HeadCall& call, int64_t begin, int64_t end, float* mean) {
  const int64_t depth = call.p.head_dim;
  call.kernels.load_queries(call.p, call.s, begin, end, call.head, call.scratch.rows);
  std::fill_n(mean, depth, 0.f);
  call.kernels.add_rows(call.scratch.rows, end - begin, depth, mean);
  FinishMean(mean, depth, end - begin, call.p.q.dtype);
}

void PoolQueries(const HeadCall& call) {
  const VerticalSlashScratch& t = call.scratch;
  const int64_t depth = call.p.head_dim, size = call.block_size(), n = call.query_blocks();
  const int64_t lanes = DivUp<int64_t>(n, kPanelRows) * kPanelRows;
  std::fill_n(t.query_panels + (lanes - kPanelRows) * depth, kPanelRows * depth, 0.f);
  std::fill_n(t.query_seen, lanes, 0);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t end = std::min((r + 1) * size, call.s.q_len);
    float* mean = t.panels; // of the last rows, which are done with
    MeanQueries(call, r * size, end, mean);
    PutLane(mean, depth, call.exponent_scale(), r, t.query_panels);
    t.query_seen[r] = static_cast<int32_t>((call.s.prefix + end - 1) / size + 1);
  }
}

int64_t Best(const float* values, int64_t stride, int64_t n, int64_t forced, int64_t count, uint64_t* ranks) {
  // The bits of a float order as it does once those of negative ones are inverted; forced ones are above all.
  const auto order_of = [](float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  };
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float x = values[i * stride];
    if (!(x > -kInfinity) && i >= forced) continue;
    const uint64_t rank = i < forced ? 0xffffffffu : order_of(x);
    ranks[candidates++] = rank << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(i));
  }
  count = std::min(count, candidates);
  if (count > 0 && count < candidates) {
    std::nth_element(ranks, ranks + (count - 1), ranks + candidates, std::greater<>());
  }
  for (int64_t i = 0; i < count; ++i) ranks[i] = static_cast<uint32_t>(~ranks[i]);
  return count;
}

void KeepVerticals(const HeadCall& call, int64_t count, int32_t rounding) {
  const VerticalSlashScratch& t = call.scratch;
  std::fill_n(t.vertical_blocks, DivUp<int64_t>(call.blocks(), 64), uint64_t{0});
  if (rounding == FP_ROUND_TOKENS) return WriteList(call, 0, count);
  for (int64_t i = 0; i < count; ++i) SetBit(t.vertical_blocks, static_cast<int64_t>(t.ranks[i]) / call.block_size());
}

// Verticals are the same blocks for all tiles; slashes become a running count, so that whether some slash crosses a
// block on its way through a tile is one subtraction.
void KeepSlashes(const HeadCall& call, int64_t count, int32_t rounding) {
  const VerticalSlashScratch& t = call.scratch;
  if (rounding == FP_ROUND_TOKENS) return WriteList(call, 1, count);
  const int64_t keys = call.s.k_len, size = call.block_size();
  std::fill_n(t.counts, keys + 1, 0);
  for (int64_t i = 0; i < count; ++i) t.counts[t.ranks[i] + 1] = 1;
  for (int64_t d = 0; d < keys; ++d) t.counts[d + 1] += t.counts[d]; // chosen slashes below d

  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) {
    const Tile tile = call.g.TileOf(call.p, call.s, m);
    uint64_t* row = call.Row(m);
    std::copy_n(t.vertical_blocks, DivUp<int64_t>(call.blocks(), 64), row);
    const int64_t first = call.s.prefix + tile.begin, last = call.s.prefix + tile.end - 1;
    for (int64_t block = 0; block < tile.visible; ++block) {
      const int64_t begin = block * size, end = begin + call.g.BlockKeys(call.s, block);
      const int64_t nearest = std::max<int64_t>(0, first - (end - 1)), farthest = last - begin;
      if (t.counts[farthest + 1] > t.counts[nearest]) SetBit(row, block);
    }
  }
}

} // namespace flashprefill::cpu
