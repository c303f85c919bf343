// Comparisons: see compare.h.
#include "compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/key_list.h"

namespace flashprefill::test {
namespace {

// The first row at which two results differ, for people.
testing::AssertionResult Differs(const fp_problem& p, const char* what, int64_t row, int64_t dim, float expected,
                                 float actual, int64_t how_many) {
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    const int64_t token = row / p.q_heads - s.q_begin;
    if (token < 0 || token >= s.q_len) continue;
    return testing::AssertionFailure() << what << " of sequence " << b << ", token " << token << ", head "
                                       << row % p.q_heads << ", dim " << dim << " is " << actual << ", expected "
                                       << expected << " (and " << how_many - 1 << " others differ)";
  }
  return testing::AssertionFailure() << what << ": row " << row << " differs";
}

template <typename Equal>
testing::AssertionResult CompareRows(const fp_problem& p, const Attended& expected, const Attended& actual,
                                     const Equal& equal) {
  if (expected.out.size() != actual.out.size() || expected.lse.size() != actual.lse.size()) {
    return testing::AssertionFailure() << "results of different sizes";
  }
  const auto compare = [&](const char* what, const std::vector<float>& want, const std::vector<float>& have,
                           int64_t dims) {
    int64_t wrong = 0, first = -1;
    for (size_t i = 0; i < want.size(); ++i) {
      if (equal(want[i], have[i])) continue;
      if (wrong++ == 0) first = static_cast<int64_t>(i);
    }
    if (wrong == 0) return testing::AssertionSuccess();
    return Differs(p, what, first / dims, first % dims, want[first], have[first], wrong);
  };
  const testing::AssertionResult out = compare("out", expected.out, actual.out, p.head_dim);
  return out ? compare("lse", expected.lse, actual.lse, 1) : out;
}

bool BitEqual(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

} // namespace

double Tolerance(const fp_problem& p) {
  double most = 0;
  for (const int32_t dtype : {p.q.dtype, p.k.dtype, p.v.dtype}) {
    most = std::max(most, dtype == FP_F32 ? 2e-5 : dtype == FP_BF16 ? 1.5e-2 : 3e-3);
  }
  return most;
}

testing::AssertionResult Close(const fp_problem& p, const Attended& expected, const Attended& actual) {
  const double tolerance = Tolerance(p);
  return CompareRows(p, expected, actual, [&](float want, float have) {
    if (want == have) return true; // infinities too
    return std::abs(double{want} - have) <= tolerance * std::max(1.0, std::abs(double{want}));
  });
}

testing::AssertionResult SameBits(const fp_problem& p, const Attended& expected, const Attended& actual) {
  return CompareRows(p, expected, actual, BitEqual);
}

// A block is in for sure if one rule takes it even where all that may rank before it does, and out for sure if
// each rule leaves it even where only those rank before it that must.
std::vector<uint8_t> Undecided(const reference::TileChoice& choice, double tolerance) {
  if (!choice.near_tie.empty()) return choice.near_tie;
  const reference::KeepRule& rule = choice.rule;
  const size_t blocks = choice.energy.size();
  double total = 0, largest = 0;
  for (size_t b = 0; b < blocks; ++b) {
    if (choice.scored[b]) total += choice.energy[b], largest = std::max(largest, choice.energy[b]);
  }
  std::vector<uint8_t> open(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    if (!choice.scored[b]) continue;
    const double energy = choice.energy[b];
    double sum_before = 0, sum_perhaps = 0;
    int64_t before = 0, perhaps = 0;
    for (size_t other = 0; other < blocks; ++other) {
      if (other == b || !choice.scored[other]) continue;
      const double e = choice.energy[other];
      if (e > energy * (1 + tolerance)) sum_before += e, ++before;
      if (e >= energy * (1 - tolerance)) sum_perhaps += e, ++perhaps;
    }
    bool in = perhaps < rule.min_blocks, out = before >= rule.min_blocks;
    if (!std::isnan(rule.alpha)) {
      const double threshold = rule.alpha * largest;
      in |= energy > threshold * (1 + tolerance) || threshold == 0;
      out &= energy < threshold * (1 - tolerance);
    }
    if (!std::isnan(rule.mass)) {
      in |= sum_perhaps < (rule.mass - tolerance) * total;
      out &= sum_before >= (rule.mass + tolerance) * total;
    }
    if (!std::isnan(rule.gain)) {
      const auto worth = [&](double before) { return energy / total * std::sqrt(std::max(0.0, 1 - before)); };
      in |= worth(sum_perhaps / total + tolerance) > rule.gain * (1 + tolerance);
      out &= worth(sum_before / total - tolerance) < rule.gain * (1 - tolerance);
    }
    open[b] = !in && !out;
  }
  return open;
}

void TieCount::Print() const {
  std::printf("[   TIES   ] %.3f%% of %lld bits are near a tie\n", 100 * share(), static_cast<long long>(bits));
  testing::Test::RecordProperty("near_tie_share", std::to_string(share()));
  EXPECT_LT(share(), 0.1) << "so many bits are near a tie that the comparison says little";
}

ExpectedMask::ExpectedMask(const fp_problem& problem, const AnyPolicy& policy)
    : problem_(problem), policy_(policy), mask_(problem, policy.get()) {
  reference::Select(
      problem, *policy.get(), mask_.view,
      [&](const Sequence& s, int64_t head, int64_t m, const reference::TileChoice& choice) {
        choices_[{s.index, head, m}] = choice;
      },
      [&](const Sequence& s, int64_t head, int64_t i, const reference::KeyChoice& choice) {
        keys_[{s.index, head, i}] = choice;
      });
}

// Lists hold the same keys but for those near a tie, ascending, and as many were wanted.
testing::AssertionResult ExpectedMask::ListsAgree(const Mask& actual, TieCount& ties) const {
  const auto list_agrees = [&](const Sequence& s, int64_t head, int64_t i) {
    const auto where = [&] {
      return testing::AssertionFailure() << "list of sequence " << s.index << ", mask head " << head << ", segment "
                                         << i << ": ";
    };
    const KeyList want = KeyList::Of(mask_.view, s, head, i), have = KeyList::Of(actual.view, s, head, i);
    const auto found = keys_.find({s.index, head, i});
    const size_t keys = found == keys_.end() ? 0 : found->second.kept.size();
    std::vector<uint8_t> is_kept(keys);
    if (have.count < 0 || have.count > actual.view.max_keys) return where() << have.count << " keys";
    for (int64_t k = 0; k < have.count; ++k) {
      const int32_t key = have.keys[k];
      if (key < 0 || key >= static_cast<int64_t>(keys)) return where() << "key " << key << " is none of its " << keys;
      if (k > 0 && key <= have.keys[k - 1]) return where() << "key " << key << " after " << have.keys[k - 1];
      is_kept[key] = 1;
    }
    int64_t open = 0;
    for (size_t key = 0; key < keys; ++key) {
      open += found->second.near_tie[key];
      ties.bits += found->second.energy[key] > 0;
      ties.near_ties += found->second.near_tie[key] && found->second.energy[key] > 0;
      if (is_kept[key] == found->second.kept[key] || found->second.near_tie[key]) continue;
      return where() << "key " << key << " is " << int{is_kept[key]} << ", expected " << int{!is_kept[key]}
                     << "; its energy is " << found->second.energy[key];
    }
    if (std::abs(want.wanted - have.wanted) > open && want.wanted <= want.count) {
      return where() << have.wanted << " keys are wanted, expected " << want.wanted;
    }
    if (want.overflows() != have.overflows() && open == 0) return where() << "it overflows, or not";
    return testing::AssertionSuccess();
  };
  for (int b = 0; b < problem_.batch; ++b) {
    const Sequence s = SequenceOf(problem_, b);
    for (int64_t h = 0; h < mask_.view.heads; ++h) {
      for (int64_t i = 0; i < Segments(mask_.view, s); ++i) {
        if (auto result = list_agrees(s, h, i); !result) return result;
      }
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult ExpectedMask::Agrees(const Mask& actual, TieCount& ties) const {
  const fp_problem& p = problem_;
  const Geometry g = Geometry::Of(p, *policy_.get());
  const double tolerance = reference::ScoreTolerance(p);

  const auto tile_agrees = [&](const Sequence& s, int64_t head, int64_t m) {
    const Tile tile = g.TileOf(p, s, m);
    const int64_t row = g.Row(s, head, m);
    const auto found = choices_.find({s.index, head, m});
    const reference::TileChoice* choice = found == choices_.end() ? nullptr : &found->second;
    const std::vector<uint8_t> undecided = choice ? Undecided(*choice, tolerance) : std::vector<uint8_t>();
    int32_t count = 0;
    for (int64_t block = 0; block < g.words * 64; ++block) {
      const bool want = TestBit(mask_.Row(row), block), have = TestBit(actual.Row(row), block);
      count += have;
      const bool open =
          block < static_cast<int64_t>(undecided.size()) && undecided[block] && !IsForced(*policy_.get(), tile, block);
      ties.bits += block < tile.visible;
      ties.near_ties += open;
      if (open || want == have) continue;
      auto failure = testing::AssertionFailure();
      failure << "bit of sequence " << s.index << ", mask head " << head << ", tile " << m << ", block " << block
              << " is " << have << ", expected " << want << "; " << tile.visible << " blocks are visible";
      if (choice && block < tile.visible) failure << ", its energy is " << choice->energy[block];
      return failure;
    }
    const KeyList list = KeyList::OfTile(actual.view, s, head, m);
    count += static_cast<int32_t>(ListedBlocks(g, s, tile, list, actual.Row(row)));
    if (actual.counts[row] == count) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "count of sequence " << s.index << ", mask head " << head << ", tile " << m
                                       << " is " << actual.counts[row] << ", what it keeps is " << count;
  };

  if (auto result = ListsAgree(actual, ties); !result) return result;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    if (actual.fallback[b] != mask_.fallback[b]) {
      return testing::AssertionFailure() << "fallback of sequence " << b << " is " << actual.fallback[b]
                                         << ", expected " << mask_.fallback[b];
    }
    for (int64_t h = 0; h < g.mask_heads; ++h) {
      for (int64_t m = 0; m < g.Tiles(s); ++m) {
        if (auto result = tile_agrees(s, h, m); !result) return result;
      }
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult SameMask(const fp_problem& p, const Mask& expected, const Mask& actual) {
  const Geometry g = Geometry::Of(p, expected.view);
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    if (expected.fallback[b] != actual.fallback[b]) return testing::AssertionFailure() << "fallback of sequence " << b;
    for (int64_t h = 0; h < g.mask_heads; ++h) {
      for (int64_t m = 0; m < g.Tiles(s); ++m) {
        const int64_t row = g.Row(s, h, m);
        if (expected.counts[row] != actual.counts[row] ||
            std::memcmp(expected.Row(row), actual.Row(row), static_cast<size_t>(g.words) * 8) != 0) {
          return testing::AssertionFailure() << "mask of sequence " << b << ", mask head " << h << ", tile " << m;
        }
      }
      for (int64_t i = 0; i < Segments(expected.view, s); ++i) {
        const KeyList want = KeyList::Of(expected.view, s, h, i), have = KeyList::Of(actual.view, s, h, i);
        if (want.wanted != have.wanted || expected.Keys(s, h, i) != actual.Keys(s, h, i)) {
          return testing::AssertionFailure() << "keys of sequence " << b << ", mask head " << h << ", segment " << i;
        }
      }
    }
  }
  return testing::AssertionSuccess();
}

} // namespace flashprefill::test
