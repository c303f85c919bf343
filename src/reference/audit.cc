// Audit: the softmax of single rows over all keys that they see, and the part of it that lies on keys which the mask
// keeps. What attend obeys, and nothing else: bits, then verticals, slashes or lists in the blocks without a bit.
#include <cmath>

#include "core/key_list.h"
#include "core/vertical_slash.h"
#include "reference/reference.h"

namespace flashprefill::reference {
namespace {

// One row of queries, at its position.
void AuditOne(const Problem& p, const BlockMask& mask, const Sequence& s, const Matrix& keys, const double* q,
              AuditRow& row) {
  const Geometry g = Geometry::Of(p, mask);
  const int64_t mask_head = row.head / g.heads_per_tile, m = row.row / g.tile_tokens;
  const uint64_t* bits = mask.bits + g.Row(s, mask_head, m) * g.words;
  const int64_t end = p.causal ? s.prefix + row.row + 1 : s.k_len;
  const std::vector<uint8_t> on_extra = ExtraKeys(s, g.TileOf(p, s, m), VerticalSlash::Of(mask, s.index, mask_head),
                                                  KeyList::OfTile(mask, s, mask_head, m));

  std::vector<double> z;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t t = 0; t < end; ++t) {
    z.push_back(p.softmax_scale * Dot(q, keys[t], p.head_dim));
    if (std::isfinite(z[t])) largest = std::max(largest, z[t]);
  }
  double total = 0, kept = 0, most = 0;
  int64_t heaviest = -1;
  for (int64_t block = 0; block * g.block_size < end; ++block) {
    double missed = 0;
    for (int64_t t = block * g.block_size; t < std::min(end, (block + 1) * g.block_size); ++t) {
      const double weight = std::isfinite(z[t]) ? std::exp(z[t] - largest) : 0; // a score that is none counts nothing
      total += weight;
      (TestBit(bits, block) || on_extra[t] ? kept : missed) += weight;
    }
    if (missed > most) most = missed, heaviest = block;
  }
  row.recall = total > 0 ? static_cast<float>(kept / total) : 1;
  row.missed = total > 0 ? static_cast<float>(most / total) : 0;
  row.missed_block = static_cast<int32_t>(heaviest);
}

} // namespace

void Audit(const Problem& p, const BlockMask& mask, std::span<AuditRow> rows) {
  const int64_t group = p.q_heads / p.kv_heads;
  Matrix keys, queries;
  for (size_t i = 0; i < rows.size(); ++i) {
    AuditRow& row = rows[i];
    const Sequence s = SequenceOf(p, row.sequence);
    const bool other_sequence = i == 0 || rows[i - 1].sequence != row.sequence;
    if (other_sequence || rows[i - 1].head / group != row.head / group) keys = LoadKeys(p, s, row.head / group);
    if (other_sequence || rows[i - 1].head != row.head) queries = LoadQueries(p, s, row.head);
    AuditOne(p, mask, s, keys, queries[row.row], row);
  }
}

} // namespace flashprefill::reference
