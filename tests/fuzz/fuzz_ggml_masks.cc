// Fuzzes what the llama.cpp plugin reads besides its options: masks, the ranks of keys, and the names of caches. The
// input becomes a mask of a few sequences whose cells lie anywhere, with some of its numbers changed. Whatever it
// holds, runs must be all rows, each once; a causal run must show each row just what the mask shows it, in an order in
// which known keys come by their ranks.
#include <set>
#include <vector>

#include "fuzz.h"
#include "key_order.h"
#include "mask_runs.h"

namespace flashprefill::test {
namespace {

using ggml::kNoCell;
using ggml::kUnknown;
using ggml::Rank;
using ggml::Run;

constexpr uint16_t kSeen = 0, kHidden = 0xfc00;

struct Mask {
  int64_t rows, cells, stride;
  Buffer data;

  explicit Mask(Bytes& in)
      : rows(1 + in.Upto(20)),
        cells(1 + in.Upto(150)),
        stride(cells + in.Upto(8)),
        data(static_cast<size_t>(((rows - 1) * stride + cells) * 2)) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(at(r), cells, kHidden);
    for (int64_t first = 0; first < rows;) first = AddSequence(in, first);
    for (int i = in.OneIn(4) ? in.Upto(3) : 0; i > 0; --i) {
      at(in.Upto(255) % rows)[in.Upto(255) % cells] = in.OneIn(2) ? in.Raw<uint16_t>() : in.OneIn(2) ? kSeen : kHidden;
    }
  }
  uint16_t* at(int64_t row) { return reinterpret_cast<uint16_t*>(data.data) + row * stride; }
  const uint16_t* at(int64_t row) const { return reinterpret_cast<const uint16_t*>(data.data) + row * stride; }
  std::set<int32_t> SeenBy(int64_t row) const {
    std::set<int32_t> seen;
    for (int64_t i = 0; i < cells; ++i) {
      if (at(row)[i] == kSeen) seen.insert(static_cast<int32_t>(i));
    }
    return seen;
  }

 private:
  // Rows of one sequence, which sees some earlier cells and adds one per row: neighbours, or any.
  int64_t AddSequence(Bytes& in, int64_t first) {
    const int64_t end = std::min<int64_t>(rows, first + 1 + in.Upto(11));
    const bool neighbours = in.OneIn(2);
    int64_t cell = in.Upto(255) % cells;
    std::vector<int64_t> seen;
    for (int i = in.Upto(20); i > 0; --i) seen.push_back(in.Upto(255) % cells);
    for (int64_t r = first; r < end; ++r) {
      seen.push_back(cell);
      cell = neighbours ? (cell + 1) % cells : in.Upto(255) % cells;
      for (const int64_t each : seen) at(r)[each] = kSeen;
    }
    return end;
  }
};

void CheckOrder(Bytes& in, const Run& found, ggml::RankLog& log) {
  Run run = found;
  const auto seen = std::vector<int32_t>(run.cells.begin(), run.cells.begin() + run.seen());
  std::vector<Rank> ranks;
  for (size_t i = 0; i < seen.size(); ++i) ranks.push_back(in.OneIn(3) ? kUnknown : log.Find(in.Raw<uint8_t>()));
  if (in.OneIn(3)) ranks.clear();
  const int64_t own = in.OneIn(2) ? kNoCell : seen[in.Raw<uint8_t>() % seen.size()];
  ggml::OrderKeys(run, ranks, own, in.Upto(30));

  auto sorted = std::vector<int32_t>(run.cells.begin(), run.cells.begin() + run.seen());
  if (own != kNoCell && sorted.back() != own) Finding("a run's own cell is not its first row's last");
  if (run.known < 0 || run.known > run.seen()) Finding("more keys are known than there are");
  Rank last = ggml::kNoRank;
  for (int64_t i = 0; i < run.known; ++i) {
    const auto at = std::lower_bound(seen.begin(), seen.end(), sorted[i]) - seen.begin();
    if (ranks[at] == kUnknown || ranks[at] < last) Finding("known keys are not in the order of their ranks");
    last = ranks[at];
  }
  if (last != run.last_known) Finding("the last known rank is another");
  std::sort(sorted.begin(), sorted.end());
  if (sorted != seen) Finding("other cells after ordering");
  if (!std::equal(run.cells.begin() + run.seen(), run.cells.end(), found.cells.begin() + found.seen()))
    Finding("ordering moved the later rows' cells");
}

void CheckMask(Bytes& in) {
  const Mask mask(in);
  const int64_t least = 1 + in.Upto(6);
  ggml::RankLog log(1 + in.Upto(15));
  for (int i = in.Upto(30); i > 0; --i) {
    if (in.OneIn(8)) log.BeginBatch();
    const uint64_t print = in.Raw<uint8_t>();
    const Rank rank = log.Note(print, in.Upto(40) - 1);
    if (log.Find(print) != rank) Finding("a rank that was noted is another");
  }
  int64_t next = 0;
  bool causal = false;
  for (const Run& run : ggml::FindRuns(mask.at(0), mask.rows, mask.cells, mask.stride, least, 1)) {
    if (run.first != next || run.rows < 1) Finding("rows are left out, or twice there");
    next += run.rows;
    if (!run.causal()) continue;
    causal = true;
    if (run.rows < least || run.seen() < 1) Finding("a causal run that is too short");
    for (int64_t r = run.rows - 1; r >= 0; --r) {
      const std::set<int32_t> seen(run.cells.begin(), run.cells.end() - (run.rows - 1 - r));
      if (static_cast<int64_t>(seen.size()) != run.seen() + r) Finding("a cell is twice in a run");
      if (seen != mask.SeenBy(run.first + r)) Finding("a row sees other cells than its mask shows");
    }
    CheckOrder(in, run, log);
  }
  if (next != mask.rows) Finding("the last rows are left out");
  if (causal) ++accepted;
}

// A name as llama.cpp gives one, or any.
void CheckName(Bytes& in) {
  std::string name = in.OneIn(4) ? "" : "cache_k_l";
  for (int i = in.Upto(24); i > 0; --i) name += in.OneIn(4) ? in.Raw<char>() : static_cast<char>('0' + in.Upto(9));
  const int64_t layer = ggml::LayerOfCache(name.c_str());
  if (layer < -1 || layer > 1 << 20) Finding("a layer that no model has: " + name);
  if (layer >= 0) ++accepted;
  const int64_t whole = in.Raw<uint16_t>();
  if (ggml::LayerOfCache(("cache_k_l" + std::to_string(whole)).c_str()) != whole) Finding("a layer is not read");
}

} // namespace
} // namespace flashprefill::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashprefill::test::Bytes in(data, size);
  if (in.OneIn(8)) {
    flashprefill::test::CheckName(in);
  } else {
    flashprefill::test::CheckMask(in);
  }
  return 0;
}
