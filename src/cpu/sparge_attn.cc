// SpargeAttn's first stage (arXiv 2502.18137) on the CPU. K is read twice more than FlashPrefill reads it: once for its
// mean over the sequence, and once for how much the keys of a block, less that mean, are alike. Scores need no such
// mean: it would add the same to all scores of a row.
#include "cpu/policies.h"
#include "cpu/pooled.h"
#include "cpu/similarity_kernels.h"
#include "cpu/strided_kernels.h"
#include "methods/sparge_attn/top_blocks.h"

namespace flashprefill::cpu {
namespace {

class SpargeSelection {
 public:
  SpargeSelection(const Problem& p, const Policy& policy, const Exec& exec, void* workspace)
      : p_(p),
        policy_(reinterpret_cast<const fp_sparge_attn&>(policy)),
        rows_(StridedKernelsFor(exec)),
        kernels_(SimilarityKernelsFor(exec)),
        parts_(workspace),
        pooled_(p, policy, exec, int64_t{std::max(policy.block_size, kTileRows) + 2} * p.head_dim, parts_),
        sums_(parts_.Take<float>(pooled_.blocks() * p.kv_heads * p.head_dim)),
        similar_(parts_.Take<uint8_t>(pooled_.blocks() * p.kv_heads)) {}

  size_t bytes() const { return parts_.used(); }

  void Run(BlockMask& mask) {
    pooled_.Describe();
    pooled_.ForRuns([&](const Pooled::Run& r, const Pooled::Scratch& scratch) { SumKeys(r, scratch); });
    pooled_.ForRuns([&](const Pooled::Run& r, const Pooled::Scratch& scratch) { JudgeKeys(r, scratch); });
    pooled_.ForTiles(mask, [&](const Pooled::Item& item, int head, const float* mean, const Pooled::Scratch& scratch,
                               uint64_t* row) { Choose(item, head, mean, scratch, row); });
  }

 private:
  // The policy's part of the scratch memory: rows, and behind them a center and a sum.
  float* CenterIn(const Pooled::Scratch& scratch) const {
    return scratch.own + int64_t{std::max(policy_.common.block_size, kTileRows)} * p_.head_dim;
  }

  int64_t LoadBlock(const Pooled::Run& r, int64_t block, float* rows) const {
    const int64_t begin = block * policy_.common.block_size, n = pooled_.plan().g.BlockKeys(r.s, block);
    rows_.load_keys(p_, r.s, r.kv_head, begin, begin + n, rows);
    return n;
  }

  float* SumsOf(const Pooled::Run& r) const { return sums_ + pooled_.BlocksOf(r.b, r.kv_head) * p_.head_dim; }

  void SumKeys(const Pooled::Run& r, const Pooled::Scratch& scratch) const {
    for (int64_t block = r.begin; block < r.end; ++block) {
      const int64_t n = LoadBlock(r, block, scratch.own);
      float* sum = SumsOf(r) + block * p_.head_dim;
      std::fill_n(sum, p_.head_dim, 0.f);
      kernels_.add_rows(scratch.own, n, p_.head_dim, sum);
    }
  }

  void JudgeKeys(const Pooled::Run& r, const Pooled::Scratch& scratch) const {
    float* center = CenterIn(scratch);
    const int64_t blocks = pooled_.plan().g.Blocks(r.s);
    for (int64_t d = 0; d < p_.head_dim; ++d) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += SumsOf(r)[block * p_.head_dim + d];
      center[d] = static_cast<float>(sum / static_cast<double>(r.s.k_len));
    }
    for (int64_t block = r.begin; block < r.end; ++block) {
      const int64_t n = LoadBlock(r, block, scratch.own);
      similar_[pooled_.BlocksOf(r.b, r.kv_head) + block] =
          kernels_.similarity(scratch.own, n, p_.head_dim, center, center + p_.head_dim) > policy_.similarity;
    }
  }

  void Choose(const Pooled::Item& item, int head, const float* mean, const Pooled::Scratch& scratch,
              uint64_t* row) const {
    const int64_t n = item.tile.end - item.tile.begin, visible = item.tile.visible;
    for (int64_t i = 0; i < n; ++i) {
      rows_.load_query(p_, item.s, item.tile.begin + i, head, 1, scratch.own + i * p_.head_dim);
    }
    float* center = CenterIn(scratch);
    std::fill_n(center, p_.head_dim, 0.f);
    if (!(kernels_.similarity(scratch.own, n, p_.head_dim, center, center + p_.head_dim) > policy_.similarity)) {
      return FillRow(row, pooled_.plan().g.words, visible);
    }
    const uint8_t* similar = similar_ + pooled_.BlocksOf(item.b, item.kv_head);
    pooled_.Score(item, mean, scratch, [&](int64_t block) { return similar[block] != 0; });
    for (int64_t block = 0; block < visible; ++block) {
      if (!similar[block]) scratch.energies[block] = kUnranked, SetBit(row, block);
    }
    if (std::isnan(policy_.cdf)) {
      TopK(scratch.energies, visible, methods::sparge_attn::TopBlocks(policy_, pooled_.plan().g.Blocks(item.s)),
           scratch.keys, row);
    } else {
      TopPExclusive(scratch.energies, visible, policy_.cdf, scratch.keys, row);
    }
  }

  const Problem& p_;
  const fp_sparge_attn& policy_;
  const StridedKernels& rows_;
  const SimilarityKernels& kernels_;
  Workspace parts_;
  Pooled pooled_;
  float* sums_;      // [blocks of all sequences][kv_heads][head_dim]
  uint8_t* similar_; // [blocks of all sequences][kv_heads]
};

} // namespace

size_t SpargeAttnWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return SpargeSelection(p, policy, exec, nullptr).bytes();
}

void SelectSpargeAttn(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  SpargeSelection(p, policy, exec, workspace).Run(mask);
}

} // namespace flashprefill::cpu
