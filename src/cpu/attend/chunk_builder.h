// Runs of packed keys become chunks, which the kernels add to a tile.
#ifndef FLASHPREFILL_CPU_ATTEND_CHUNK_BUILDER_H_
#define FLASHPREFILL_CPU_ATTEND_CHUNK_BUILDER_H_

#include "cpu/attend/tile.h"

namespace flashprefill::cpu {

// The tile's rows: token begin + r / heads_per_tile, and the heads of a token side by side.
struct TileRows {
  const Geometry& g;
  const Sequence& s;
  const Tile& tile;
  int64_t first_head;

  int32_t count() const { return static_cast<int32_t>((tile.end - tile.begin) * g.heads_per_tile); }
  int64_t token(int64_t r) const { return tile.begin + r / g.heads_per_tile; }
  int64_t head(int64_t r) const { return first_head + r % g.heads_per_tile; }
};

// Collects runs of packed keys and hands them to the kernels a chunk at a time. It stays one chunk behind, so that the
// kernels know which keys come next. limit: scratch memory, [2][kTileRows].
class ChunkBuilder {
 public:
  ChunkBuilder(const AttendKernels& kernels, const TileState& state, const TileRows& rows, const Packed& packed,
               int32_t* limit)
      : kernels_(kernels), state_(state), rows_(rows), limit_(limit) {
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

  // Hands over what there is. `next` is a key that will be wanted after it.
  void Flush(int64_t next = -1) {
    Close();
    HandOver(next);
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
    if (chunk.columns > 0) kernels_.attend(state_, chunk);
    chunk.columns = chunk.runs = 0;
  }

  // How many columns each row sees: the keys at or before its own position.
  const int32_t* Limits(const Chunk& chunk) {
    int32_t* limit = limit_ + current_ * kTileRows;
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

  const AttendKernels& kernels_;
  const TileState& state_;
  const TileRows& rows_;
  int32_t* const limit_;
  Chunk chunks_[2];
  int current_ = 0;
  bool masked_ = false;
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_CHUNK_BUILDER_H_
