// One tile of attend: its rows of Q are loaded, the bits of its mask become chunks of packed keys, the kernels add them
// up, and the rows go out. Blocks that every row sees whole pass without any token mask; the blocks on the diagonal
// carry the number of columns that each row sees, and kernels skip what none of their rows does.
#include "cpu/attend/tile.h"

#include <cmath>
#include <limits>

#include "core/skip.h"
#include "core/vertical_slash.h"
#include "cpu/attend/chunk_builder.h"
#include "cpu/attend/summary.h"

namespace flashprefill::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(kChunk == kSkipKeys && kFewRows + 1 == kRowsThatSkip, "what is skipped is said in chunks of this size");

// Every kept block, in order.
void AddKeptBlocks(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const Packed& keys,
                   int64_t next_key, TileScratch& scratch) {
  const Sequence& s = rows.s;
  const int64_t block_size = call.g.block_size;
  const int64_t last_seen = call.p.causal ? s.prefix + rows.tile.end : s.k_len;
  ChunkBuilder chunks(call.kernels, scratch.state, rows, keys, scratch.limit);
  for (int64_t w = 0; w < DivUp<int64_t>(rows.tile.visible, 64); ++w) {
    for (uint64_t word = VisibleWord(bits, w, rows.tile.visible); word != 0; word &= word - 1) {
      const int64_t block = w * 64 + std::countr_zero(word);
      chunks.Add(block * block_size, std::min((block + 1) * block_size, last_seen), block >= rows.tile.full);
    }
  }
  chunks.Flush(next_key);
}

// Keys of verticals and slashes, gathered and packed as they come: neighbours in a chunk may lie anywhere. Chunks are
// ascending, so a row sees the first keys of one.
void AddVerticalSlash(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const VerticalSlash& extra,
                      int64_t kv_head, TileScratch& scratch) {
  const Problem& p = call.p;
  const Sequence& s = rows.s;
  int32_t count = 0;
  const auto flush = [&] {
    if (count == 0) return;
    const auto rows_of = [&](const fp_tensor& tensor, float scale) {
      for (int32_t i = 0; i < count; ++i) {
        scratch.extra_offset[i] = KeyOffset(p, tensor.stride, s, scratch.extra_key[i], kv_head);
      }
      return Rows{tensor.data, tensor.dtype, count, tensor.stride[3], scratch.extra_offset, scale};
    };
    call.kernels.pack_keys(rows_of(p.k, KeyScale(p, s, kv_head)), p.head_dim, 0, scratch.gathered.k);
    call.kernels.pack_values(rows_of(p.v, ValueScale(p, s, kv_head)), p.head_dim, 0, scratch.gathered.v);
    Chunk chunk = {scratch.gathered.k, scratch.gathered.v, count, 1, {}, nullptr, -1, nullptr};
    chunk.run[0] = {0, 0, count};
    if (scratch.extra_key[count - 1] > s.prefix + rows.tile.begin) {
      for (int32_t r = 0; r < rows.count(); ++r) {
        scratch.limit[r] = static_cast<int32_t>(
            std::upper_bound(scratch.extra_key, scratch.extra_key + count, s.prefix + rows.token(r)) -
            scratch.extra_key);
      }
      chunk.limit = scratch.limit;
    }
    call.kernels.attend(scratch.state, chunk);
    count = 0;
  };
  ForVerticalSlashRuns(call.g, s, rows.tile, extra, bits, [&](int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      scratch.extra_key[count++] = key;
      if (count == kChunk) flush();
    }
  });
  flush();
}

// The keys of the segment's list, but for those in kept blocks. They are ascending, so a row sees the first keys of a
// chunk.
void AddKeyList(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const KeyList& list,
                TileScratch& scratch) {
  const int64_t first_row = rows.s.prefix + rows.tile.begin;
  for (int64_t first = 0; first < list.count; first += kChunk) {
    const int32_t* keys = list.keys + first;
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(list.count - first, kChunk));
    if (keys[0] >= rows.s.prefix + rows.tile.end) break;
    int32_t added = 0;
    std::fill_n(scratch.bias, kChunk, 0.f);
    for (int32_t i = 0; i < count; ++i) {
      const bool in_block = TestBit(bits, keys[i] / call.g.block_size);
      if (in_block) scratch.bias[i] = -kInfinity;
      added += !in_block;
    }
    if (added == 0) continue;
    Chunk chunk = {scratch.listed.k, scratch.listed.v, count, 1, {}, nullptr, -1, nullptr};
    chunk.run[0] = {first, 0, count};
    if (first + count < list.count) chunk.next = first + kChunk;
    if (added < count) chunk.bias = scratch.bias;
    if (keys[count - 1] > first_row) {
      for (int32_t r = 0; r < rows.count(); ++r) {
        scratch.limit[r] = static_cast<int32_t>(
            std::upper_bound(keys, keys + count, static_cast<int32_t>(rows.s.prefix + rows.token(r))) - keys);
      }
      chunk.limit = scratch.limit;
    }
    call.kernels.attend(scratch.state, chunk);
  }
}

// Every block that is left out and seen whole by all rows: its mean key and value, weighing as much as it has keys.
void AddMeans(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const MeanRows& means,
              TileScratch& scratch) {
  ChunkBuilder chunks(call.kernels, scratch.state, rows, means.packed, scratch.limit);
  for (int64_t first = 0; first < rows.tile.full; first += kChunk) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(rows.tile.full - first, kChunk));
    bool any = false;
    for (int32_t i = 0; i < kChunk; ++i) {
      const float keys = i < count && !TestBit(bits, first + i) ? means.Keys(call.g, rows.s, first + i) : 0.f;
      any |= keys > 0;
      scratch.bias[i] = keys > 0 ? std::log2(keys) / scratch.state.scale : -kInfinity;
    }
    if (any) chunks.AddBiased(first, count, scratch.bias);
  }
}

// The tile's rows of q or out.
Rows RowsOf(const Problem& p, const fp_tensor& tensor, const TileRows& rows, TileScratch& scratch) {
  for (int32_t r = 0; r < rows.count(); ++r) {
    scratch.offset[r] = RowOffset(p, tensor.stride, rows.s, rows.token(r), rows.head(r));
  }
  return {tensor.data, tensor.dtype, rows.count(), tensor.stride[3], scratch.offset};
}

void WriteSkipped(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m, int64_t pairs) {
  if (call.mask.skip == 0 || !call.mask.skipped) return;
  const Tile tile = call.g.TileOf(call.p, s, m);
  const int64_t rows = (tile.end - tile.begin) * call.g.heads_per_tile;
  call.mask.skipped[call.g.Row(s, mask_head, m)] = SkippedBlocks(pairs, rows, call.g.block_size);
}

// The rows go out.
void Finish(const AttendCall& call, const AttendKernels& kernels, const TileRows& rows, const TileState& state,
            TileScratch& scratch) {
  kernels.finish(state, RowsOf(call.p, call.output.out, rows, scratch), call.stream, scratch.lse);
  float* lse = call.output.lse;
  for (int32_t r = 0; lse && r < state.rows; ++r) {
    lse[LseOffset(call.p, call.output.lse_stride, rows.s, rows.token(r), rows.head(r))] = scratch.lse[r];
  }
}

} // namespace

void MeanRows::Pack(const AttendCall& call, int64_t first, int64_t blocks) const {
  const int32_t d = call.p.head_dim, count = static_cast<int32_t>(blocks);
  int64_t offset[kGroup];
  for (int32_t i = 0; i < count; ++i) offset[i] = (first + i) * d;
  call.kernels.pack_keys({keys, MeanDtype(call.p.k.dtype), count, 1, offset}, d, first, packed.k);
  call.kernels.pack_values({values, MeanDtype(call.p.v.dtype), count, 1, offset}, d, first, packed.v);
}

TileState TakeTileState(Workspace& memory, int32_t head_dim) {
  TileState state{};
  state.q = memory.Take<float>(kTileRows * QueryStride(head_dim));
  state.o = memory.Take<float>(kTileRows * ValueWidth(head_dim));
  state.scores = memory.Take<float>(kMaxStrip * kScoreStride);
  state.sum = memory.Take<float>(kTileRows * kLeast);
  state.largest = memory.Take<float>(kTileRows);
  state.skip = -kInfinity;
  return state;
}

void ClearTile(const TileState& state) {
  std::fill_n(state.o, state.rows * ValueWidth(state.head_dim), 0.0f);
  std::fill_n(state.sum, state.rows * kLeast, 0.0f);
  std::fill_n(state.largest, state.rows, -kInfinity);
}

TileScratch TileScratch::Take(Workspace& memory, const AttendCall& call) {
  const AttendKernels& kernels = call.kernels;
  const int32_t head_dim = call.p.head_dim;
  TileScratch t{};
  t.state = TakeTileState(memory, head_dim);
  t.offset = memory.Take<int64_t>(kTileRows);
  t.limit = memory.Take<int32_t>(2 * kTileRows);
  const bool summarises = call.mask.mean_correction == FP_SUMMARY_KEYS;
  t.bias = memory.Take<float>(kChunk * (summarises ? call.g.heads_per_tile : 1));
  t.lse = memory.Take<float>(kTileRows);
  t.mean = memory.Take<float>(kMaxHeadDim);
  if (HasKeyLists(call.mask)) t.listed = Packed::Take(memory, kernels, head_dim, call.mask.max_keys);
  if (HasKeyLists(call.mask) && call.mask.mean_correction) {
    const int64_t blocks = DivUp<int64_t>(call.p.max_seqlen_k, call.g.block_size);
    t.rest = MeanRows::Take(memory, call.p, call.mask, kernels, blocks);
    t.rest.count = memory.Take<float>(blocks);
  }
  if (summarises) {
    t.summary.one = TakeTileState(memory, head_dim);
    t.summary.keys = memory.Take<std::byte>(kChunk * head_dim * DtypeSize(MeanDtype(call.p.k.dtype)));
    t.summary.values = memory.Take<std::byte>(kChunk * head_dim * DtypeSize(MeanDtype(call.p.v.dtype)));
    t.summary.packed = Packed::Take(memory, kernels, head_dim, kChunk);
  }
  if (HasVerticalSlash(call.mask)) {
    t.extra_key = memory.Take<int64_t>(kChunk);
    t.extra_offset = memory.Take<int64_t>(kChunk);
    t.gathered = Packed::Take(memory, kernels, head_dim, kGroup);
  }
  return t;
}

int64_t FirstKey(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m) {
  const int64_t visible = call.g.TileOf(call.p, s, m).visible;
  const uint64_t* bits = call.mask.bits + call.g.Row(s, mask_head, m) * call.g.words;
  for (int64_t w = 0; w < DivUp<int64_t>(visible, 64); ++w) {
    if (const uint64_t word = VisibleWord(bits, w, visible)) {
      return (w * 64 + std::countr_zero(word)) * call.g.block_size;
    }
  }
  return -1;
}

void AttendTile(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m, const Packed& keys,
                const MeanRows& means, int64_t next_key, TileScratch& scratch) {
  const Problem& p = call.p;
  const Geometry& g = call.g;
  const Tile tile = g.TileOf(p, s, m);
  const TileRows rows{g, s, tile, mask_head * g.heads_per_tile};
  const uint64_t* bits = call.mask.bits + g.Row(s, mask_head, m) * g.words;
  TileState& state = scratch.state;

  state.rows = rows.count();
  state.head_dim = p.head_dim;
  state.scale = ExponentScale(p);
  call.kernels.load_queries(RowsOf(p, p.q, rows, scratch), p.head_dim, state.q);
  ClearTile(state);
  int64_t skipped = 0;
  state.skip = Skips(p, call.mask, s) ? std::log2(call.mask.skip) / state.scale : -kInfinity;
  state.skipped = &skipped;
  AddKeptBlocks(call, rows, bits, keys, next_key, scratch);
  state.skip = -kInfinity; // means count
  WriteSkipped(call, s, mask_head, m, skipped);
  if (call.mask.mean_correction == FP_BLOCK_MEANS) AddMeans(call, rows, bits, means, scratch);
  if (call.mask.mean_correction == FP_SUMMARY_KEYS) AddSummaries(call, rows, bits, means, scratch);
  if (HasVerticalSlash(call.mask)) {
    AddVerticalSlash(call, rows, bits, VerticalSlash::Of(call.mask, s.index, mask_head), mask_head / g.group, scratch);
  }
  if (HasKeyLists(call.mask)) {
    AddKeyList(call, rows, bits, KeyList::OfTile(call.mask, s, mask_head, m), scratch);
  }
  Finish(call, call.kernels, rows, state, scratch);
}

void AttendFewRows(const AttendCall& call, const Sequence& s, int64_t kv_head, TileScratch& scratch) {
  const Problem& p = call.p;
  const Geometry& g = call.g;
  const AttendKernels& kernels = call.f32_kernels;
  const int64_t mask_heads = g.group / g.heads_per_tile, first = kv_head * mask_heads;
  const Tile tile = g.TileOf(p, s, 0);
  const int64_t last_seen = p.causal ? s.prefix + tile.end : s.k_len;

  // The rows of one mask head after the other.
  auto rows_of = [&](int64_t h) { return TileRows{g, s, tile, (first + h) * g.heads_per_tile}; };
  auto bits_of = [&](int64_t h) { return call.mask.bits + g.Row(s, first + h, 0) * g.words; };
  auto state_of = [&](int64_t h) {
    TileState state = scratch.state;
    state.rows = rows_of(h).count();
    state.head_dim = p.head_dim;
    state.scale = ExponentScale(p);
    state.skip = -kInfinity;
    const int64_t row = h * state.rows;
    state.q = static_cast<float*>(state.q) + row * QueryStride(p.head_dim);
    state.o += row * ValueWidth(p.head_dim);
    state.sum += row * kLeast;
    state.largest += row;
    return state;
  };
  auto key_rows = [&](const fp_tensor& tensor, float scale, int64_t key, int32_t count, int64_t* offset) {
    for (int32_t i = 0; i < count; ++i) offset[i] = KeyOffset(p, tensor.stride, s, key + i, kv_head);
    return Rows{tensor.data, tensor.dtype, count, tensor.stride[3], offset, scale};
  };

  auto attend = [&](int64_t block, int64_t key, int32_t count) {
    int64_t k_offset[kChunk], v_offset[kChunk];
    const Rows k = key_rows(p.k, KeyScale(p, s, kv_head), key, count, k_offset);
    const Rows v = key_rows(p.v, ValueScale(p, s, kv_head), key, count, v_offset);
    const TileRows rows = rows_of(0);
    for (int64_t r = 0; r < rows.count() * mask_heads; ++r) {
      const int64_t position = s.prefix + rows.token(r % rows.count());
      scratch.limit[r] = static_cast<int32_t>(std::clamp<int64_t>(position + 1 - key, 0, count));
    }
    Chunk chunk{nullptr, nullptr, count, 1, {}, block >= tile.full ? scratch.limit : nullptr, -1, nullptr};
    chunk.run[0] = {key, 0, count};
    // Neighbouring heads that keep the block go together, unless each begins with a limit that is lower again.
    const bool together = !chunk.limit || rows.count() == 1;
    for (int64_t h = 0; h < mask_heads;) {
      TileState state = state_of(h);
      int64_t end = h;
      while (end < mask_heads && TestBit(bits_of(end), block) && (together || end == h)) ++end;
      state.rows *= static_cast<int32_t>(end - h);
      if (end > h) kernels.attend_unpacked(state, chunk, k, v);
      h = std::max(end, h + 1);
    }
  };

  for (int64_t h = 0; h < mask_heads; ++h) {
    const TileState state = state_of(h);
    kernels.load_queries(RowsOf(p, p.q, rows_of(h), scratch), p.head_dim, state.q);
    ClearTile(state);
  }
  for (int64_t block = 0; block < tile.visible; ++block) {
    const int64_t end = std::min((block + 1) * g.block_size, last_seen);
    bool any = false;
    for (int64_t h = 0; h < mask_heads; ++h) any |= TestBit(bits_of(h), block);
    for (int64_t key = block * g.block_size; any && key < end; key += kChunk) {
      attend(block, key, static_cast<int32_t>(std::min<int64_t>(end - key, kChunk)));
    }
  }
  for (int64_t h = 0; h < mask_heads; ++h) {
    Finish(call, kernels, rows_of(h), state_of(h), scratch);
    WriteSkipped(call, s, first + h, 0, 0);
  }
}

} // namespace flashprefill::cpu
