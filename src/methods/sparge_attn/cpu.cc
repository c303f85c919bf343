// SpargeAttn's first stage (arXiv 2502.18137) on the CPU. K is read twice more than FlashPrefill reads it: once for its
// mean over the sequence, and once for how similar the keys of a block, less that mean, are. Scores need no such mean:
// it would add the same to all scores of a row.
#include <cmath>

#include "cpu/energies/pooled.h"
#include "cpu/energies/similarity_kernels.h"
#include "cpu/strided/kernels.h"
#include "cpu/top_p.h"
#include "methods/sparge_attn/rules.h"

namespace flashprefill::methods::sparge_attn {
namespace {

class Selection : public cpu::PooledSelection {
 public:
  struct Scratch : PooledSelection::Scratch {
    float* rows;   // [a block's keys or a tile's queries][head_dim]
    float* center; // [head_dim]
    float* sum;    // [head_dim]
  };

  explicit Selection(const cpu::SelectCall& call)
      : PooledSelection(call),
        policy_(reinterpret_cast<const fp_sparge_attn&>(call.policy)),
        rows_(cpu::StridedKernelsFor(call.exec)),
        kernels_(cpu::SimilarityKernelsFor(call.exec)) {}

  void Take(Workspace& memory, int64_t panels) {
    PooledSelection::Take(memory, panels);
    const int64_t blocks = panels * cpu::kPanelBlocks * call_.p.kv_heads;
    sums_ = memory.Take<float>(blocks * call_.p.head_dim);
    similar_ = memory.Take<uint8_t>(blocks);
  }

  Scratch TakeScratch(Workspace& memory) const {
    const int64_t d = call_.p.head_dim;
    return {PooledSelection::TakeScratch(memory), memory.Take<float>(std::max(call_.g.block_size, kTileRows) * d),
            memory.Take<float>(d), memory.Take<float>(d)};
  }

  void Describe(const cpu::SelectFrame& frame) const {
    PooledSelection::Describe(frame);
    frame.ForRuns([&](const cpu::BlockRun& run, Workspace own) { SumKeys(frame, run, TakeScratch(own)); });
    frame.ForRuns([&](const cpu::BlockRun& run, Workspace own) { JudgeKeys(frame, run, TakeScratch(own)); });
  }

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    ForRows(item, scratch, [&](const cpu::MaskRow& row, const float* mean) { ChooseRow(item, row, mean, scratch); });
  }

 private:
  bool AreSimilar(int64_t n, const Scratch& scratch) const {
    return kernels_.similarity(scratch.rows, n, call_.p.head_dim, scratch.center, scratch.sum) > SimilarityOf(policy_);
  }

  int64_t LoadBlock(const cpu::BlockRun& run, int64_t block, float* rows) const {
    const int64_t begin = block * call_.g.block_size, n = call_.g.BlockKeys(run.s, block);
    rows_.load_keys(call_.p, run.s, run.kv_head, begin, begin + n, rows);
    return n;
  }

  float* SumsOf(const cpu::SelectFrame& frame, const cpu::BlockRun& run) const {
    return sums_ + BlockBegin(frame, run.s, run.kv_head) * call_.p.head_dim;
  }

  void SumKeys(const cpu::SelectFrame& frame, const cpu::BlockRun& run, const Scratch& scratch) const {
    for (int64_t block = run.begin; block < run.end; ++block) {
      const int64_t n = LoadBlock(run, block, scratch.rows);
      float* sum = SumsOf(frame, run) + block * call_.p.head_dim;
      std::fill_n(sum, call_.p.head_dim, 0.f);
      kernels_.add_rows(scratch.rows, n, call_.p.head_dim, sum);
    }
  }

  void JudgeKeys(const cpu::SelectFrame& frame, const cpu::BlockRun& run, const Scratch& scratch) const {
    const int64_t blocks = call_.g.Blocks(run.s), depth = call_.p.head_dim;
    const float* sums = SumsOf(frame, run);
    for (int64_t d = 0; d < depth; ++d) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums[block * depth + d];
      scratch.center[d] = static_cast<float>(sum / static_cast<double>(run.s.k_len));
    }
    uint8_t* similar = similar_ + BlockBegin(frame, run.s, run.kv_head);
    for (int64_t block = run.begin; block < run.end; ++block) {
      const int64_t n = LoadBlock(run, block, scratch.rows);
      similar[block] = AreSimilar(n, scratch);
    }
  }

  void ChooseRow(const cpu::Item& item, const cpu::MaskRow& row, const float* mean, const Scratch& scratch) const {
    const int64_t n = row.tile.end - row.tile.begin, visible = row.tile.visible, depth = call_.p.head_dim;
    const int head = static_cast<int>(row.head);
    for (int64_t i = 0; i < n; ++i) {
      rows_.load_query(call_.p, item.s, row.tile.begin + i, head, 1, scratch.rows + i * depth);
    }
    std::fill_n(scratch.center, depth, 0.f);
    if (!AreSimilar(n, scratch)) return FillRow(row.bits, call_.g.words, visible);
    const uint8_t* similar = similar_ + BlockBegin(item.frame, item.s, item.kv_head);
    Score(item, row.tile, mean, scratch, [&](int64_t block) { return similar[block] != 0; });
    for (int64_t block = 0; block < visible; ++block) {
      if (!similar[block]) scratch.energies[block] = cpu::kUnranked, SetBit(row.bits, block);
    }
    if (std::isnan(policy_.cdf)) {
      const int64_t count = TopBlocks(policy_, call_.g.Blocks(item.s));
      cpu::TopK(scratch.energies, visible, count, scratch.keys, row.bits);
    } else {
      cpu::TopPExclusive(scratch.energies, visible, policy_.cdf, scratch.keys, row.bits);
    }
  }

  const fp_sparge_attn& policy_;
  const cpu::StridedKernels& rows_;
  const cpu::SimilarityKernels& kernels_;
  float* sums_ = nullptr;      // [blocks][head_dim]
  uint8_t* similar_ = nullptr; // [blocks]
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::sparge_attn
