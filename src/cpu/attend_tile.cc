// One tile of attend: its rows of Q are loaded, the bits of its mask become chunks of packed keys, the kernels add them
// up, and the rows go out. Blocks that every row sees whole pass without any token mask; the blocks on the diagonal
// carry the number of columns that each row sees, and kernels skip what none of their rows does.
#include "cpu/attend_tile.h"

#include <cmath>
#include <limits>

namespace flashprefill::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.442695041f;

// The tile's rows: token begin + r / heads_a_tile, and the heads of a token side by side.
struct TileRows {
  const Geometry& g;
  const Sequence& s;
  const Tile& tile;
  int64_t first_head;

  int32_t count() const { return static_cast<int32_t>((tile.end - tile.begin) * g.heads_a_tile); }
  int64_t token(int64_t r) const { return tile.begin + r / g.heads_a_tile; }
  int64_t head(int64_t r) const { return first_head + r % g.heads_a_tile; }
};

// Collects runs of packed keys and hands them to the kernels a chunk at a time. It stays one chunk behind, so that the
// kernels know which keys come next.
class ChunkBuilder {
 public:
  ChunkBuilder(const AttendCall& call, const TileRows& rows, const Packed& packed, TileScratch& scratch)
      : call_(call), rows_(rows), scratch_(scratch) {
    for (Chunk& chunk : chunks_) chunk = {packed.k, packed.v, 0, 0, {}, nullptr, -1, nullptr};
  }

  // Keys [begin, end), begin a multiple of kLeast; only the last of a tile's runs may end elsewhere.
  void Add(int64_t begin, int64_t end, bool masked) {
    if (masked != masked_) Close();
    masked_ = masked;
    while (begin < end) {
      Chunk& chunk = chunks_[current_];
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(end - begin, kChunk - chunk.columns));
      KeyRun* last = chunk.runs ? &chunk.run[chunk.runs - 1] : nullptr;
      if (last && last->key + last->count == begin) {
        last->count += count;
      } else {
        chunk.run[chunk.runs++] = {begin, chunk.columns, count};
      }
      chunk.columns += count;
      begin += count;
      if (chunk.columns == kChunk) Close();
    }
  }

  // One run with a bias of each column.
  void AddBiased(int64_t begin, int32_t count, const float* bias) {
    chunks_[current_].bias = bias;
    Add(begin, begin + count, false);
    Flush();
  }

  // Hands over what there is.
  void Flush() {
    Close();
    HandOver(-1);
  }

 private:
  Chunk& before() { return chunks_[1 - current_]; }

  // Ends the current chunk: the one before it goes to the kernels, and it takes that one's place.
  void Close() {
    Chunk& chunk = chunks_[current_];
    if (chunk.columns == 0) return;
    chunk.limit = masked_ ? Limits(chunk) : nullptr;
    HandOver(chunk.run[0].key);
    current_ = 1 - current_;
  }

  void HandOver(int64_t next) {
    Chunk& chunk = before();
    chunk.next = next;
    if (chunk.columns > 0) call_.kernels.attend(scratch_.state, chunk);
    chunk.columns = chunk.runs = 0;
  }

  // How many columns each row sees: the keys at or before its own position.
  const int32_t* Limits(const Chunk& chunk) {
    int32_t* limit = scratch_.limit + current_ * kTileRows;
    for (int32_t r = 0; r < rows_.count(); ++r) {
      const int64_t end = rows_.s.prefix + rows_.token(r) + 1;
      int64_t columns = 0;
      for (int32_t i = 0; i < chunk.runs; ++i) {
        columns += std::clamp<int64_t>(end - chunk.run[i].key, 0, chunk.run[i].count);
      }
      limit[r] = static_cast<int32_t>(columns);
    }
    return limit;
  }

  const AttendCall& call_;
  const TileRows& rows_;
  TileScratch& scratch_;
  Chunk chunks_[2];
  int current_ = 0;
  bool masked_ = false;
};

// Every kept block, in order.
void AddKeptBlocks(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const Packed& keys,
                   TileScratch& scratch) {
  const Sequence& s = rows.s;
  const int64_t block_size = call.g.block_size;
  const int64_t last_seen = call.p.causal ? s.prefix + rows.tile.end : s.k_len;
  ChunkBuilder chunks(call, rows, keys, scratch);
  for (int64_t w = 0; w < DivUp<int64_t>(rows.tile.visible, 64); ++w) {
    for (uint64_t word = VisibleWord(bits, w, rows.tile.visible); word != 0; word &= word - 1) {
      const int64_t block = w * 64 + std::countr_zero(word);
      chunks.Add(block * block_size, std::min((block + 1) * block_size, last_seen), block >= rows.tile.full);
    }
  }
  chunks.Flush();
}

// Every block that is left out and seen whole by all rows: its mean key and value, weighing as much as it has keys.
void AddMeans(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const Packed& means,
              TileScratch& scratch) {
  ChunkBuilder chunks(call, rows, means, scratch);
  for (int64_t first = 0; first < rows.tile.full; first += kChunk) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(rows.tile.full - first, kChunk));
    bool any = false;
    for (int32_t i = 0; i < kChunk; ++i) {
      const bool counts = i < count && !TestBit(bits, first + i);
      any |= counts;
      scratch.bias[i] = counts
                            ? std::log2(static_cast<float>(call.g.BlockKeys(rows.s, first + i))) / scratch.state.scale
                            : -kInfinity;
    }
    if (any) chunks.AddBiased(first, count, scratch.bias);
  }
}

} // namespace

TileScratch TileScratch::Take(Workspace& memory, int32_t head_dim) {
  TileScratch t{};
  t.state.q = memory.Take<float>(kTileRows * QueryStride(head_dim));
  t.state.o = memory.Take<float>(kTileRows * ValueWidth(head_dim));
  t.state.scores = memory.Take<float>(kMaxStrip * kScoreStride);
  t.state.sum = memory.Take<float>(kTileRows * kLeast);
  t.state.largest = memory.Take<float>(kTileRows);
  t.offset = memory.Take<int64_t>(kTileRows);
  t.limit = memory.Take<int32_t>(2 * kTileRows);
  t.bias = memory.Take<float>(kChunk);
  t.lse = memory.Take<float>(kTileRows);
  t.mean = memory.Take<float>(kMaxHeadDim);
  return t;
}

void AttendTile(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m, const Packed& keys,
                const Packed& means, TileScratch& scratch) {
  const Problem& p = call.p;
  const Geometry& g = call.g;
  const Tile tile = g.TileOf(p, s, m);
  const TileRows rows{g, s, tile, mask_head * g.heads_a_tile};
  const uint64_t* bits = call.mask.bits + g.Row(s, mask_head, m) * g.words;
  TileState& state = scratch.state;

  auto row_offsets = [&](const fp_tensor& tensor) {
    for (int32_t r = 0; r < state.rows; ++r) {
      scratch.offset[r] = RowOffset(p, tensor.stride, s, rows.token(r), rows.head(r));
    }
    return Rows{tensor.data, tensor.dtype, state.rows, tensor.stride[3], scratch.offset};
  };

  state.rows = rows.count();
  state.head_dim = p.head_dim;
  state.scale = p.softmax_scale * kLog2E;
  call.kernels.load_queries(row_offsets(p.q), p.head_dim, state.q);
  std::fill_n(state.o, state.rows * ValueWidth(p.head_dim), 0.0f);
  std::fill_n(state.sum, state.rows * kLeast, 0.0f);
  std::fill_n(state.largest, state.rows, -kInfinity);

  AddKeptBlocks(call, rows, bits, keys, scratch);
  if (call.mask.mean_correction) AddMeans(call, rows, bits, means, scratch);

  call.kernels.finish(state, row_offsets(call.output.out), scratch.lse);
  if (float* lse = call.output.lse) {
    for (int32_t r = 0; r < state.rows; ++r) {
      lse[LseOffset(p, call.output.lse_stride, s, rows.token(r), rows.head(r))] = scratch.lse[r];
    }
  }
}

} // namespace flashprefill::cpu
