// Select for a whole head at once, by a few of its query rows: FlexPrefill and MInference. What such methods have at
// hand: sums of the last rows' softmax by vertical and by slash, and scores of pooled blocks. A head is one item, one
// thread's from beginning to end: its choice needs a look at all of K, and the bits of its tiles follow from it. K
// passes by twice for the sums (first for each row's softmax denominator, then for its shares), and no score is kept:
// memory is that of some vectors over keys.
#ifndef FLASHPREFILL_CPU_VERTICAL_SLASH_VERTICAL_SLASH_H_
#define FLASHPREFILL_CPU_VERTICAL_SLASH_VERTICAL_SLASH_H_

#include "core/backend.h"
#include "core/half.h"
#include "core/types.h"
#include "cpu/frame.h"
#include "cpu/vertical_slash/kernels.h"

namespace flashprefill::cpu {

// The scratch memory that a method needs.
struct VerticalSlashNeeds {
  int64_t last_rows;  // query rows whose softmax is summed, at most
  bool tokens;        // it ranks tokens; else blocks
  bool pooled_logits; // it keeps the logits of a panel of pooled rows
};

// A thread's own memory, for the longest sequence.
struct VerticalSlashScratch {
  float* verticals;          // [keys]
  float* slashes;            // [keys + lanes]: of key t and the row r before the last one: at t + r
  float* key_means;          // [blocks][head_dim]
  float* query_panels;       // means of blocks of query rows, as panels
  float* query_reference;    // [blocks of query rows, in whole panels]: log2 of their softmax denominators
  int32_t* query_seen;       // the same: key blocks that they see
  int32_t* query_left;       // the same: for the policy
  float* logits;             // [blocks][32]: of one panel
  float* rows;               // [rows at a time][head_dim]
  float* panels;             // of the last rows
  float* scores;             // [kChunkKeys][lanes]
  float* largest;            // [lanes]
  float* sums;               // [lanes]
  int32_t* seen;             // [lanes]
  uint64_t* ranks;           // [keys or blocks]
  int32_t* counts;           // [keys + 1]
  uint64_t* vertical_blocks; // [words]

  static VerticalSlashScratch Take(Workspace& memory, const SelectCall& call, const VerticalSlashNeeds& needs);
};

// One head of one sequence, and its rows of the mask.
struct HeadCall {
  const Problem& p;
  const Policy& policy;
  const Geometry& g;
  const VerticalSlashKernels& kernels;
  const Sequence& s;
  int64_t head; // of the mask
  BlockMask& mask;
  VerticalSlashScratch scratch;

  int64_t kv_head() const { return head * g.heads_per_tile / g.group; }
  int64_t block_size() const { return g.block_size; }
  int64_t blocks() const { return g.Blocks(s); }
  int64_t query_blocks() const { return DivUp<int64_t>(s.q_len, g.block_size); }
  uint64_t* Row(int64_t m) const { return mask.bits + g.Row(s, head, m) * g.words; }
  float exponent_scale() const { return ExponentScale(p); }
};

// A method that chooses by head, choose(head), as the frame has it.
class HeadSelection {
 public:
  using Scratch = VerticalSlashScratch;
  HeadSelection(const SelectCall& call, const VerticalSlashNeeds& needs, void (*choose)(const HeadCall&))
      : call_(call), needs_(needs), choose_(choose), kernels_(VerticalSlashKernelsFor(call.exec)) {}

  ItemShape Shape() const { return {}; }
  void Take(Workspace&, int64_t) {}
  Scratch TakeScratch(Workspace& memory) const { return Scratch::Take(memory, call_, needs_); }
  void Describe(const SelectFrame&) const {}
  void Choose(const Item& item, const Scratch& scratch) const {
    choose_({call_.p, call_.policy, call_.g, kernels_, item.s, item.rows[0].head, item.frame.mask(), scratch});
  }

 private:
  const SelectCall& call_;
  const VerticalSlashNeeds needs_;
  void (*const choose_)(const HeadCall&);
  const VerticalSlashKernels& kernels_;
};

// Fills verticals and slashes from the last `rows` query rows: means over the rows. key_means too, where asked for.
void SumVerticalSlash(const HeadCall& call, int64_t rows, bool with_means);

// Fills key_means alone.
void MeanKeys(const HeadCall& call);

// The mean of query rows [begin, end), at most as many as a block or last_rows has, rounded to q's dtype.
void MeanQueries(const HeadCall& call, int64_t begin, int64_t end, float* mean);

// Fills query_panels and query_seen. Needs nothing.
void PoolQueries(const HeadCall& call);

// Scores of 32 pooled blocks of query rows against all pooled keys that some of them sees, a chunk at a time. Needs
// PoolQueries and key_means.
template <typename Body>
void ForPooledScores(const HeadCall& call, int64_t panel, const Body& body) {
  const VerticalSlashScratch& t = call.scratch;
  const int64_t depth = call.p.head_dim, last = std::min((panel + 1) * kPanelRows, call.query_blocks()) - 1;
  const int64_t most = t.query_seen[last];
  for (int64_t first = 0; first < most; first += kChunkKeys) {
    const ScoreChunk chunk{t.query_panels + panel * kPanelRows * depth,
                           t.key_means + first * depth,
                           t.query_seen + panel * kPanelRows,
                           depth,
                           first,
                           std::min<int64_t>(kChunkKeys, most - first),
                           kPanelRows,
                           t.scores};
    call.kernels.score(chunk);
    body(chunk);
  }
}

// Puts the `count` best of n values first, equal ones by index: ranks[i] for i < count, in no order, are their indices.
// Those below `forced` come before all others; NaN and -inf are never among them. Returns how many there are.
int64_t Best(const float* values, int64_t stride, int64_t n, int64_t forced, int64_t count, uint64_t* ranks);

// The head keeps the `count` keys in ranks, and of its distances the `count` in ranks: as a list of the mask
// (FP_ROUND_TOKENS), or as the blocks that hold some of them. Verticals come first; ranks may be sorted.
void KeepVerticals(const HeadCall& call, int64_t count, int32_t rounding);
void KeepSlashes(const HeadCall& call, int64_t count, int32_t rounding);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_VERTICAL_SLASH_VERTICAL_SLASH_H_
