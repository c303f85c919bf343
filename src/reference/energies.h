// The energies family: methods that describe each key block by a few points and sum exponentials over them
// (FlashPrefill and Sketch). A method says what the points of a block are. Everything else (the rows of a tile, which
// of them see a block, the tile's energy) is shared and lives in energies.cc.
#ifndef FLASHPREFILL_REFERENCE_ENERGIES_H_
#define FLASHPREFILL_REFERENCE_ENERGIES_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// A row q has the energy weight * exp(s q.center + s^2/2 sum_d q_d^2 variance_d) at a point.
struct Point {
  double weight = 1;
  std::vector<double> center;
  std::vector<double> variance; // empty: zero
};

class EnergySelector : public HeadSelector {
 public:
  // blocks[b] describes key block b. query_pool consecutive tokens of a head are replaced by their mean.
  EnergySelector(const HeadView& head, std::vector<std::vector<Point>> blocks, int64_t query_pool, KeepRule rule);
  TileChoice Choose(const Tile& tile) const override;

 private:
  struct Row {
    int64_t position; // of its last token
    std::vector<double> q;
  };
  std::vector<Row> RowsOf(const Tile& tile) const;
  bool Sees(const Tile& tile, int64_t position, int64_t block) const;

  HeadView head_;
  std::vector<std::vector<Point>> blocks_;
  int64_t query_pool_;
  KeepRule rule_;
};

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_ENERGIES_H_
