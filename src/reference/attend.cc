// Attend: softmax over the keys that a row's kept blocks hold, in two passes over a list of them. With the mean
// correction the blocks left out join the list, each as one key (its mean) that weighs as much as it has tokens, or
// many as one summary key. A mask that skips takes chunks of keys off the list again.
#include <algorithm>
#include <cmath>

#include "core/key_list.h"
#include "core/skip.h"
#include "core/vertical_slash.h"
#include "reference/reference.h"

namespace flashprefill::reference {
namespace {

// One entry of a row's softmax.
struct Entry {
  double z, weight;
  const double* value;
  int64_t chunk = -1; // of the tile's kept keys; -1: never skipped
};

// The keys and values of one KV head of one sequence.
struct KeyValues {
  Matrix keys, values;
};

// What stands for each block where it is left out: the means of its keys that are in no list, and how many these are.
struct Means {
  Matrix keys, values;
  std::vector<int64_t> count;
};

Means MeansOf(const Problem& p, const Geometry& g, const Sequence& s, const KeyValues& kv, const KeyList& list) {
  std::vector<uint8_t> listed(static_cast<size_t>(s.k_len));
  for (int64_t i = 0; i < list.count; ++i) listed[list.keys[i]] = 1;
  Means means{Matrix(g.Blocks(s), p.head_dim), Matrix(g.Blocks(s), p.head_dim), {}};
  for (int64_t b = 0; b < g.Blocks(s); ++b) {
    std::vector<int64_t> rest;
    for (int64_t t = b * g.block_size; t < b * g.block_size + g.BlockKeys(s, b); ++t) {
      if (!listed[t]) rest.push_back(t);
    }
    means.count.push_back(static_cast<int64_t>(rest.size()));
    for (int64_t d = 0; d < p.head_dim && !rest.empty(); ++d) {
      double key = 0, value = 0;
      for (const int64_t t : rest) key += kv.keys[t][d], value += kv.values[t][d];
      means.keys[b][d] = Rounded(p.k.dtype, key / static_cast<double>(rest.size()));
      means.values[b][d] = Rounded(p.v.dtype, value / static_cast<double>(rest.size()));
    }
  }
  return means;
}

// Summary keys: what stands for the blocks that a tile leaves out of FP_SUMMARY_BLOCKS neighbouring ones.
struct Summaries {
  Matrix keys, values;
  std::vector<double> bias; // added to a row's scores
};

// With q the mean of the head's query rows in the tile, and n, k, v the count and means of a block, a block weighs
// w = n exp(s q.k). The summary's key and value are the means by these weights, rounded once, and its bias is such that
// a row that equals q gives it the weight that it gives all of them: log(sum of w) - s q.key.
Summaries SummariesOf(const Problem& p, const Tile& tile, const uint64_t* bits, const Matrix& queries,
                      const Means& means) {
  const int64_t d = p.head_dim;
  std::vector<double> query(static_cast<size_t>(d));
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t row = tile.begin; row < tile.end; ++row) query[i] += queries[row][i];
    query[i] /= static_cast<double>(tile.end - tile.begin);
  }
  const auto finite = [](double x) { return std::isfinite(x); };
  if (!std::all_of(query.begin(), query.end(), finite)) std::fill(query.begin(), query.end(), 0.0); // plain means
  const int64_t most = DivUp<int64_t>(tile.full, FP_SUMMARY_BLOCKS);
  Summaries all{Matrix(most, d), Matrix(most, d), {}};
  for (int64_t first = 0; first < tile.full; first += FP_SUMMARY_BLOCKS) {
    std::vector<int64_t> left;
    std::vector<double> energy;
    for (int64_t b = first; b < std::min<int64_t>(first + FP_SUMMARY_BLOCKS, tile.full); ++b) {
      if (TestBit(bits, b) || means.count[b] == 0) continue;
      left.push_back(b);
      energy.push_back(p.softmax_scale * Dot(query.data(), means.keys[b], d) +
                       std::log(static_cast<double>(means.count[b])));
    }
    if (left.empty()) continue;
    const double largest = *std::max_element(energy.begin(), energy.end());
    double sum = 0;
    for (double& e : energy) sum += e = std::exp(e - largest);
    const int64_t at = static_cast<int64_t>(all.bias.size());
    double *key = all.keys[at], *value = all.values[at];
    for (int64_t i = 0; i < d; ++i) {
      for (size_t j = 0; j < left.size(); ++j) {
        key[i] += energy[j] / sum * means.keys[left[j]][i];
        value[i] += energy[j] / sum * means.values[left[j]][i];
      }
      key[i] = Rounded(p.k.dtype, key[i]);
      value[i] = Rounded(p.v.dtype, value[i]);
    }
    all.bias.push_back(largest + std::log(sum) - p.softmax_scale * Dot(query.data(), key, d));
  }
  return all;
}

// What row `q` at `position` attends to, without summary keys.
void ListEntries(const Problem& p, const BlockMask& mask, const Geometry& g, const Sequence& s, const Tile& tile,
                 const uint64_t* bits, const std::vector<uint8_t>& on_extra, const KeyValues& kv, const Means& means,
                 const double* q, int64_t position, std::vector<Entry>& entries) {
  entries.clear();
  const double scale = p.softmax_scale;
  int64_t taken = 0, first_chunk = 0; // the tile's kept keys before the block, from this chunk on
  for (int64_t b = 0; b < tile.visible; ++b) {
    const int64_t begin = b * g.block_size;
    if (b == tile.full) first_chunk = DivUp(taken, kSkipKeys), taken = 0;
    if (TestBit(bits, b)) {
      int64_t end = begin + g.BlockKeys(s, b);
      if (p.causal) end = std::min(end, position + 1);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t chunk = first_chunk + (taken + t - begin) / kSkipKeys;
        entries.push_back({scale * Dot(q, kv.keys[t], p.head_dim), 1, kv.values[t], chunk});
      }
      taken += g.BlockKeys(s, b);
      continue;
    }
    if (mask.mean_correction == FP_BLOCK_MEANS && b < tile.full && means.count[b] > 0) {
      const double weight = static_cast<double>(means.count[b]);
      entries.push_back({scale * Dot(q, means.keys[b], p.head_dim), weight, means.values[b]});
    }
    if (HasVerticalSlash(mask) || HasKeyLists(mask)) {
      const int64_t end = std::min(begin + g.BlockKeys(s, b), position + 1);
      for (int64_t t = begin; t < end; ++t) {
        if (on_extra[t]) entries.push_back({scale * Dot(q, kv.keys[t], p.head_dim), 1, kv.values[t]});
      }
    }
  }
}

// Takes off the list what a row skips: chunks of which no entry reaches `skip` times the heaviest before. Returns how
// many entries those were.
int64_t Skip(double skip, std::vector<Entry>& entries) {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  std::vector<double> largest; // of each chunk
  for (const Entry& e : entries) {
    if (e.chunk < 0) continue;
    largest.resize(std::max(largest.size(), static_cast<size_t>(e.chunk) + 1), kLowest);
    if (e.z > largest[e.chunk]) largest[e.chunk] = e.z;
  }
  std::vector<uint8_t> skipped;
  double heaviest = kLowest;
  for (const double z : largest) {
    skipped.push_back(z < heaviest + std::log(skip));
    heaviest = std::max(heaviest, z);
  }
  return static_cast<int64_t>(std::erase_if(entries, [&](const Entry& e) { return e.chunk >= 0 && skipped[e.chunk]; }));
}

// Softmax of the entries: the weighted sum of their values into out[head_dim]; returns the log of the denominator.
double Softmax(const std::vector<Entry>& entries, std::vector<double>& out) {
  std::fill(out.begin(), out.end(), 0.0);
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  if (entries.empty()) return largest;
  for (const Entry& e : entries) largest = std::max(largest, e.z);
  for (const Entry& e : entries) {
    const double weight = e.weight * std::exp(e.z - largest);
    sum += weight;
    for (size_t d = 0; d < out.size(); ++d) out[d] += weight * e.value[d];
  }
  for (double& x : out) x /= sum;
  return largest + std::log(sum);
}

} // namespace

std::vector<uint8_t> ExtraKeys(const Sequence& s, const Tile& tile, const VerticalSlash& extra, const KeyList& list) {
  std::vector<uint8_t> on_extra(static_cast<size_t>(s.k_len));
  for (int64_t i = 0; i < list.count; ++i) on_extra[list.keys[i]] = 1;
  for (int64_t i = 0; i < extra.vertical_count; ++i) {
    if (extra.verticals[i] < s.k_len) on_extra[extra.verticals[i]] = 1;
  }
  for (int64_t i = 0; i < extra.slash_count; ++i) {
    for (int64_t row = tile.begin; row < tile.end; ++row) {
      const int64_t key = s.prefix + row - extra.slashes[i];
      if (key >= 0) on_extra[key] = 1;
    }
  }
  return on_extra;
}

void Attend(const Problem& p, const BlockMask& mask, const Output& output) {
  const Geometry g = Geometry::Of(p, mask);
  std::vector<Entry> entries;
  std::vector<double> out(static_cast<size_t>(p.head_dim));
  std::vector<int64_t> skipped(static_cast<size_t>(g.mask_heads * g.tile_rows)); // pairs of a row and a key

  auto attend_head = [&](const Sequence& s, int64_t head, const KeyValues& kv) {
    const Matrix queries = LoadQueries(p, s, head);
    const VerticalSlash extra = VerticalSlash::Of(mask, s.index, head);
    Means means; // of a segment; without key lists of all tiles
    for (int64_t m = 0; m < g.Tiles(s); ++m) {
      const Tile tile = g.TileOf(p, s, m);
      const uint64_t* bits = mask.bits + g.Row(s, head / g.heads_per_tile, m) * g.words;
      const KeyList list = KeyList::OfTile(mask, s, head / g.heads_per_tile, m);
      const std::vector<uint8_t> on_extra = ExtraKeys(s, tile, extra, list);
      const bool begins = m == 0 || (HasKeyLists(mask) && m % mask.segment_tiles == 0);
      if (mask.mean_correction && begins) means = MeansOf(p, g, s, kv, list);
      Summaries summaries;
      if (mask.mean_correction == FP_SUMMARY_KEYS) summaries = SummariesOf(p, tile, bits, queries, means);
      for (int64_t i = tile.begin; i < tile.end; ++i) {
        ListEntries(p, mask, g, s, tile, bits, on_extra, kv, means, queries[i], s.prefix + i, entries);
        if (Skips(p, mask, s)) skipped[g.Row(s, head / g.heads_per_tile, m)] += Skip(mask.skip, entries);
        for (size_t j = 0; j < summaries.bias.size(); ++j) {
          const double z = p.softmax_scale * Dot(queries[i], summaries.keys[j], p.head_dim) + summaries.bias[j];
          entries.push_back({z, 1, summaries.values[j]});
        }
        const double lse = Softmax(entries, out);
        const int64_t row = RowOffset(p, output.out.stride, s, i, head);
        for (int64_t d = 0; d < p.head_dim; ++d) {
          StoreElement(output.out.data, output.out.dtype, row + d * output.out.stride[3], static_cast<float>(out[d]));
        }
        if (output.lse) output.lse[LseOffset(p, output.lse_stride, s, i, head)] = static_cast<float>(lse);
      }
    }
  };

  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      const KeyValues kv{LoadKeys(p, s, kv_head), LoadValues(p, s, kv_head)};
      for (int64_t h = kv_head * g.group; h < (kv_head + 1) * g.group; ++h) attend_head(s, h, kv);
    }
    for (int64_t h = 0; mask.skip > 0 && mask.skipped && h < g.mask_heads; ++h) {
      for (int64_t m = 0; m < g.Tiles(s); ++m) {
        const Tile tile = g.TileOf(p, s, m);
        const int64_t row = g.Row(s, h, m);
        mask.skipped[row] = SkippedBlocks(skipped[row], (tile.end - tile.begin) * g.heads_per_tile, g.block_size);
      }
    }
  }
}

} // namespace flashprefill::reference
