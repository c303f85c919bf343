// The vertical-slash family: methods that look at a few of a head's last query rows, or at pooled blocks of all rows,
// and select for the whole head at once (FlexPrefill and MInference). The head's verticals, slashes or (query block,
// key block) pairs determine what each tile keeps.
#ifndef FLASHPREFILL_REFERENCE_VERTICAL_SLASH_H_
#define FLASHPREFILL_REFERENCE_VERTICAL_SLASH_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// The softmax of the last `rows` query rows over all keys that they see, averaged over the rows: by key, and by how far
// the key lies behind the row. Both sum to 1 where every row has a finite score.
struct VerticalSlashSums {
  std::vector<double> column, diagonal; // [k_len]: by key; by distance
};
VerticalSlashSums SumVerticalSlash(const HeadView& head, int64_t rows);

// Softmax logits of pooled blocks: element (r, c) is softmax_scale times the mean of query rows [r B, (r + 1) B) times
// the mean of key block c, both means of as many tokens as there are. -inf where no row of r sees a token of c, and
// where the product is not finite.
Matrix PooledLogits(const HeadView& head, const Matrix& key_means);

// Blocks of query rows that a tile overlaps: [first, last].
struct QueryBlocks {
  int64_t first, last;
  QueryBlocks(const Geometry& g, const Tile& tile)
      : first(tile.begin / g.block_size), last((tile.end - 1) / g.block_size) {}
};

// A set of items, and its bounds within the scores' tolerance: `least` is surely in it, `most` may be in it.
struct Chosen {
  std::vector<uint8_t> kept, least, most;
  explicit Chosen(size_t n) : kept(n), least(n), most(n) {}
};

// How many items to take, and the bounds of that number.
struct Count {
  int64_t is, least, most;
};

// The count largest values, equal ones by index. Values are known to within the relative error `tolerance`, and below
// 1e-35 not at all: fp32 ends there. -inf is never chosen, +inf always ranks first.
Chosen Largest(const std::vector<double>& values, const Count& count, double tolerance);

// What a tile keeps by a head's verticals and slashes: with FP_ROUND_BLOCKS the blocks that hold a vertical, or that a
// slash crosses inside the tile; with FP_ROUND_TOKENS none.
TileChoice ChooseBlocks(const HeadView& head, const Tile& tile, int32_t rounding, const Chosen& verticals,
                        const Chosen& slashes);

// The numbers of what is kept, ascending.
void List(const Chosen& chosen, std::vector<int32_t>& numbers);

// Relative error of fp32 scores of single tokens.
constexpr double kTokenTolerance = 2e-4;

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_VERTICAL_SLASH_H_
