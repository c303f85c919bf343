// The order of keys: what the log of ranks says, and what is taken for granted where it says nothing.
#include "key_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace flashprefill::ggml {
namespace {

std::vector<int32_t> Range(int32_t begin, int32_t end) {
  std::vector<int32_t> cells(static_cast<size_t>(end - begin));
  std::iota(cells.begin(), cells.end(), begin);
  return cells;
}

std::vector<int32_t> Joined(std::initializer_list<std::vector<int32_t>> parts) {
  std::vector<int32_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// A cache whose cells hold texts, as a plugin meets it: each token's fingerprint is its place in its text.
struct Cache {
  std::vector<uint64_t> prints;
  RankLog log;
  uint64_t next = 0; // token of any text

  explicit Cache(size_t cells, size_t most = 1000) : prints(cells), log(most) {}

  // Puts tokens [begin, ...) of a text there, unseen.
  void Put(uint64_t text, uint64_t begin, const std::vector<int32_t>& cells) {
    for (int32_t cell : cells) prints[static_cast<size_t>(cell)] = text * 1'000'000 + begin++;
  }

  // A micro-batch over these cells, of which `rows` are its own: the order in which its keys are taken.
  std::vector<int32_t> Order(std::vector<int32_t> cells, int64_t rows, bool own_known = true, int64_t sink_keys = 0) {
    Run run;
    run.rows = rows;
    run.cells = cells;
    const int32_t own = cells[static_cast<size_t>(run.seen() - 1)];
    std::sort(run.cells.begin(), run.cells.begin() + run.seen()); // as FindRuns has them
    std::vector<Rank> ranks;
    log.BeginBatch();
    for (int64_t i = 0; i < run.seen(); ++i) ranks.push_back(log.Find(Print(run.cells[static_cast<size_t>(i)])));
    OrderKeys(run, ranks, own_known ? own : kNoCell, sink_keys);
    Rank last = run.last_known;
    for (size_t i = static_cast<size_t>(run.known); i < run.cells.size(); ++i)
      last = std::max(last, log.Note(Print(run.cells[i]), last));
    return run.cells;
  }
  uint64_t Print(int32_t cell) const { return prints[static_cast<size_t>(cell)]; }

  // A micro-batch of a text is written to `own`, after what lies in `before`.
  void Read(uint64_t text, const std::vector<int32_t>& before, const std::vector<int32_t>& own, bool guessed = true) {
    Put(text, next, own);
    next += own.size();
    const auto cells = Joined({before, own});
    EXPECT_EQ(Order(cells, static_cast<int64_t>(own.size()), true), cells);
    if (guessed) EXPECT_EQ(Order(cells, static_cast<int64_t>(own.size()), false), cells);
  }
};

TEST(KeyOrder, ASequenceThatReadsOnWhereAnotherHasEnded) {
  Cache cache(1024);
  cache.Read(1, {}, Range(0, 600));
  cache.Read(2, {}, Range(600, 856));
  cache.Read(2, Range(600, 856), Range(0, 256));
  const auto before = Joined({Range(600, 856), Range(0, 256)});
  cache.Read(2, before, Range(256, 512));
  cache.Read(2, Joined({before, Range(256, 512)}), Joined({Range(512, 600), Range(856, 1000)}));
}

TEST(KeyOrder, AContextShift) {
  Cache cache(512);
  cache.Read(1, {}, Range(0, 256));
  cache.Read(1, Range(0, 256), Range(256, 512));
  const auto left = Joined({Range(0, 64), Range(300, 512)}); // the others are free
  cache.Read(1, left, Range(64, 200));
  cache.Read(1, Joined({left, Range(64, 200)}), Range(200, 300));
}

TEST(KeyOrder, WhatWasMovedOrRestored) {
  Cache cache(2048);
  cache.Read(1, {}, Range(600, 856));
  cache.Read(1, Range(600, 856), Range(0, 256));
  cache.Read(2, {}, Range(300, 600)); // another sequence
  // Saved by the numbers of its cells, overwritten, and put elsewhere.
  cache.Read(3, {}, Joined({Range(0, 256), Range(600, 856)}));
  cache.Put(1, 256, Range(1000, 1256));
  cache.Put(1, 0, Range(1256, 1512));
  cache.Read(1, Joined({Range(1256, 1512), Range(1000, 1256)}), Range(256, 300));
}

TEST(KeyOrder, DecodedTokensAreNewerThanWhatIsKnown) {
  Cache cache(1024);
  cache.Read(1, {}, Range(600, 856));
  cache.Put(1, 5000, Range(0, 50)); // decode steps
  cache.Read(1, Joined({Range(600, 856), Range(0, 50)}), Range(50, 200));
  // Once seen they are known, also beside cells behind the run's own that are not.
  cache.Put(1, 6000, Joined({Range(900, 930), Range(200, 210)}));
  cache.Read(1, Joined({Range(600, 856), Range(0, 200), Range(900, 930), Range(200, 210)}), Range(210, 300));
}

TEST(KeyOrder, ACellThatWasOverwrittenIsAnother) {
  Cache cache(512);
  cache.Read(1, {}, Range(0, 300));
  cache.Put(1, 5000, Range(0, 20)); // removed, and decoded tokens in their place
  cache.Read(1, Joined({Range(20, 300), Range(0, 20)}), Range(300, 400));
}

// The second reading differs from the first in the last bits of some tokens, and another sequence goes on from it.
TEST(KeyOrder, TwoSequencesThatBeginAlike) {
  Cache cache(2048);
  cache.Read(1, {}, Range(0, 300));
  const auto again = Range(1000, 1300);
  cache.Put(1, 0, again);
  for (int32_t cell : again) {
    if (cell % 7 == 0) cache.prints[static_cast<size_t>(cell)] += 500'000;
  }
  EXPECT_EQ(cache.Order(again, 300), again);
  cache.Put(2, 300, Range(400, 700));
  const auto all = Joined({again, Range(400, 700)});
  EXPECT_EQ(cache.Order(all, 300), all);
  cache.Read(1, Range(0, 300), Range(1300, 1400));
}

TEST(KeyOrder, TheFirstRowsOwnCellIsTheLast) {
  Cache cache(256);
  cache.Read(1, {}, Range(100, 164));
  cache.Read(1, Range(100, 164), Range(20, 90));                                           // in front
  cache.Read(1, Joined({Range(100, 164), Range(20, 90)}), {99, 164, 165}, false);          // older ones in between
  cache.Read(1, Joined({Range(100, 164), Range(20, 90), {99, 164, 165}}), {255, 0, 1, 2}); // over the cache's end
}

TEST(KeyOrder, WithoutALogTheSinkComesFirst) {
  Cache cache(256);
  const auto cells = Joined({Range(0, 40), Range(100, 200), Range(40, 60), Range(60, 90)});
  cache.Put(1, 0, cells);
  EXPECT_EQ(cache.Order(cells, 30, true, 40), cells);
}

TEST(KeyOrder, WhatIsInUseIsNotForgotten) {
  Cache cache(4096, 600);
  cache.Read(1, {}, Range(600, 856));
  cache.Read(1, Range(600, 856), Range(0, 256));
  for (uint64_t text = 2; text < 20; ++text) { // long texts of other sequences, between which the first is used
    cache.Read(text, {}, Range(1000, 1500));
    const auto cells = Joined({Range(600, 856), Range(0, 256), {256, 257}});
    cache.Put(1, 100'000 + 2 * text, {256, 257});
    EXPECT_EQ(cache.Order(cells, 2), cells);
  }
}

} // namespace
} // namespace flashprefill::ggml
