// The guard's run over one mask: see guard.h. What it costs is one pass over the keys for a few rows of each head. It
// runs between select and attend, so that a repair costs a selection and no attention: what is attended to is the
// repaired mask, once.
#include "core/guard.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/mask_memory.h"
#include "core/mask_stats.h"
#include "core/method.h"

namespace flashprefill {
namespace {

constexpr float kMostLevel = 4, kSinks = 0.9f, kLeastLevel = 0.1f;

// The problem of one KV head and its query heads.
Problem OneKvHead(const Problem& p, int64_t kv_head) {
  const int32_t group = p.q_heads / p.kv_heads;
  Problem one = p;
  one.q_heads = group;
  one.kv_heads = 1;
  const auto skip = [](Tensor& t, int64_t heads) {
    if (t.data)
      t.data = static_cast<std::byte*>(t.data) + heads * t.stride[2] * static_cast<int64_t>(DtypeSize(t.dtype));
  };
  skip(one.q, kv_head * group);
  skip(one.k, kv_head);
  skip(one.v, kv_head);
  if (one.k_scale) one.k_scale += kv_head * one.k_scale_stride[1];
  if (one.v_scale) one.v_scale += kv_head * one.v_scale_stride[1];
  return one;
}

// Rows that all heads together may need.
int64_t MostRows(const Problem& p, const fp_guard& guard) {
  int64_t rows = 0;
  for (int b = 0; b < p.batch; ++b) rows += GuardRows(p, guard, SequenceOf(p, b)) * p.q_heads;
  return rows;
}

bool Repairs(const fp_guard& guard) { return guard.mode != FP_GUARD_OBSERVE; }
bool Reselects(const fp_guard& guard, const Policy* policy) {
  return Repairs(guard) && policy && !KeepsEverything(*policy);
}

class GuardRun {
 public:
  GuardRun(const Backend& backend, const Problem& p, const Policy* policy, BlockMask& mask, const Exec& exec,
           void* workspace);
  size_t bytes() const { return bytes_; }
  void Run();

 private:
  float& Wanted(int64_t b, int64_t mask_head) { return wanted_[b * g_.mask_heads + mask_head]; }
  void UseLevels();
  void Audit(int draw);
  void Decide();
  bool Repair();
  void JoinMissed();
  void Reselect();
  void Adopt(const Sequence& s, int64_t mask_head, int64_t own_head);
  void KeepAll(const Sequence& s, int64_t mask_head);
  void Count(const Sequence& s, int64_t mask_head);
  void Learn();
  void Report();

  const Backend& backend_;
  const Problem& p_;
  const Policy* policy_;
  BlockMask& mask_;
  const Exec& exec_;
  fp_guard& guard_;
  const Geometry g_;
  const int64_t heads_; // query heads of all sequences
  AuditRow* rows_;      // by sequence and head
  float* recalls_;      // scratch
  HeadAudit* audits_;   // [batch, q_heads]
  int32_t* outcomes_;   // [batch, q_heads]
  float* wanted_;       // [batch, mask_heads]: the level to select again with; 0: leave the head alone
  int32_t* tables_ = nullptr;
  BlockMask own_{}; // of one KV head
  Workspace scratch_{nullptr};
  int64_t count_ = 0;
  size_t bytes_;
};

GuardRun::GuardRun(const Backend& backend, const Problem& p, const Policy* policy, BlockMask& mask, const Exec& exec,
                   void* workspace)
    : backend_(backend),
      p_(p),
      policy_(policy),
      mask_(mask),
      exec_(exec),
      guard_(*exec.guard),
      g_(Geometry::Of(p, mask)),
      heads_(int64_t{p.batch} * p.q_heads) {
  Workspace memory(workspace);
  const int64_t rows = MostRows(p, guard_);
  rows_ = memory.Take<AuditRow>(rows);
  recalls_ = memory.Take<float>(rows);
  audits_ = memory.Take<HeadAudit>(heads_);
  outcomes_ = memory.Take<int32_t>(heads_);
  wanted_ = memory.Take<float>(int64_t{p.batch} * g_.mask_heads);
  size_t most = backend.audit_workspace(p, mask, exec, rows);
  if (Reselects(guard_, policy)) {
    const Problem one = OneKvHead(p, 0);
    tables_ = memory.Take<int32_t>(TableWords(*policy, g_.group));
    own_ = MaskIn(memory, one, *policy);
    most = std::max(most, backend.select_workspace(one, *policy, exec));
  }
  scratch_ = memory;
  memory.Take<std::byte>(static_cast<int64_t>(most));
  bytes_ = memory.used();
}

void GuardRun::Run() {
  UseLevels();
  Audit(0);
  Decide();
  // Rows drawn afresh: those that led to a repair were looked at, and would flatter it.
  if (Repairs(guard_) && Repair()) Audit(1);
  Learn();
  Report();
}

// Selects again for heads that have learned to want more, where they leave something out.
void GuardRun::UseLevels() {
  std::fill_n(wanted_, p_.batch * g_.mask_heads, 0.f);
  if (!guard_.levels || !Reselects(guard_, policy_)) return;
  for (int b = 0; b < p_.batch; ++b) {
    for (int64_t h = 0; h < p_.q_heads; ++h) {
      const int64_t mask_head = h / g_.heads_per_tile;
      if (guard_.levels[h] == 0 || SparseRows(p_, mask_, SequenceOf(p_, b), mask_head) == 0) continue;
      Wanted(b, mask_head) = std::max(Wanted(b, mask_head), guard_.levels[h]);
    }
  }
  Reselect();
}

// Draws rows of all heads and computes what the mask keeps of them.
void GuardRun::Audit(int draw) {
  count_ = 0;
  for (int b = 0; b < p_.batch; ++b) {
    const Sequence s = SequenceOf(p_, b);
    for (int32_t h = 0; h < p_.q_heads; ++h) {
      HeadAudit& head = audits_[b * p_.q_heads + h];
      head = {};
      head.rows = DrawRows(p_, mask_, guard_, s, h, draw, rows_ + count_, &head.sparse);
      count_ += head.rows;
    }
  }
  if (count_ == 0) return;
  Workspace scratch = scratch_;
  backend_.audit(p_, mask_, exec_, {rows_, static_cast<size_t>(count_)}, scratch.Take<std::byte>(0));
  const AuditRow* begin = rows_;
  for (int64_t i = 0; i < heads_; ++i) {
    const std::span<const AuditRow> own(begin, static_cast<size_t>(audits_[i].rows));
    begin += own.size();
    audits_[i] = Summarise(own, audits_[i].sparse, guard_.target, recalls_);
  }
}

void GuardRun::Decide() {
  for (int64_t b = 0; b < p_.batch; ++b) {
    for (int64_t h = 0; h < p_.q_heads; ++h) {
      const HeadAudit& head = audits_[b * p_.q_heads + h];
      // A head that its level made whole holds: else it would never sink.
      const bool whole = head.rows == 0 && Wanted(b, h / g_.heads_per_tile) == 0;
      outcomes_[b * p_.q_heads + h] = whole ? FP_GUARD_WHOLE : head.is_low ? FP_GUARD_LOW : FP_GUARD_HELD;
    }
  }
}

// Makes heads that keep too little keep more. Returns whether there were any.
bool GuardRun::Repair() {
  bool any = false;
  std::fill_n(wanted_, p_.batch * g_.mask_heads, 0.f);
  alignas(Policy) std::byte bytes[kMostPolicyBytes];
  const bool reselects = guard_.mode == FP_GUARD_REPAIR && Reselects(guard_, policy_) &&
                         WithBudget(*policy_, 0, g_.group, 1, reinterpret_cast<Policy&>(bytes), tables_);
  for (int64_t b = 0; b < p_.batch; ++b) {
    for (int64_t h = 0; h < p_.q_heads; ++h) {
      int32_t& outcome = outcomes_[b * p_.q_heads + h];
      if (outcome != FP_GUARD_LOW) continue;
      outcome = reselects ? FP_GUARD_REPAIRED : FP_GUARD_DENSE;
      const float level = guard_.levels ? guard_.levels[h] : 0;
      float& wanted = Wanted(b, h / g_.heads_per_tile);
      wanted = std::max(wanted, std::min(level + 1, kMostLevel));
      any = true;
    }
  }
  if (!any) return false;
  if (reselects) {
    JoinMissed();
    Reselect();
    return true;
  }
  for (int b = 0; b < p_.batch; ++b) {
    for (int64_t h = 0; h < g_.mask_heads; ++h) {
      if (Wanted(b, h) > 0) KeepAll(SequenceOf(p_, b), h);
    }
  }
  return true;
}

// Keeps the block that an audited row misses most in its tile.
void GuardRun::JoinMissed() {
  for (const AuditRow& row : std::span(rows_, static_cast<size_t>(count_))) {
    const int64_t mask_head = row.head / g_.heads_per_tile;
    if (row.missed_block < 0 || Wanted(row.sequence, mask_head) == 0) continue;
    const Sequence s = SequenceOf(p_, row.sequence);
    SetBit(mask_.bits + g_.Row(s, mask_head, row.row / g_.tile_tokens) * g_.words, row.missed_block);
  }
}

// Selects again with a larger budget for the heads that are wanted. A KV head is selected for as a whole, since a
// method may describe its keys by all of its queries; of its lists only those that are wanted are taken.
void GuardRun::Reselect() {
  const int64_t lists = g_.group / g_.heads_per_tile; // of a KV head
  for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
    float most = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t i = 0; i < lists; ++i) most = std::max(most, Wanted(b, kv_head * lists + i));
    }
    if (most == 0) continue;
    alignas(Policy) std::byte bytes[kMostPolicyBytes];
    Policy& policy = reinterpret_cast<Policy&>(bytes);
    const bool has_budget = WithBudget(*policy_, kv_head * g_.group, g_.group, std::pow(4.0, most), policy, tables_);
    Workspace scratch = scratch_;
    if (has_budget) {
      backend_.select(OneKvHead(p_, kv_head), policy, exec_, own_, scratch.Take<std::byte>(0));
    }
    for (int b = 0; b < p_.batch; ++b) {
      for (int64_t i = 0; i < lists; ++i) {
        if (Wanted(b, kv_head * lists + i) == 0) continue;
        if (has_budget) {
          Adopt(SequenceOf(p_, b), kv_head * lists + i, i);
        } else {
          KeepAll(SequenceOf(p_, b), kv_head * lists + i);
        }
      }
    }
  }
}

// Takes what own_ keeps for a head, besides what the mask keeps already.
void GuardRun::Adopt(const Sequence& s, int64_t mask_head, int64_t own_head) {
  for (int64_t m = 0; m < g_.Tiles(s); ++m) {
    uint64_t* bits = mask_.bits + g_.Row(s, mask_head, m) * g_.words;
    const uint64_t* more = own_.bits + (own_head * own_.tile_rows + g_.TileBase(s) + m) * g_.words;
    for (int64_t w = 0; w < g_.words; ++w) bits[w] |= more[w];
  }
  for (int64_t i = 0; i < Segments(mask_, s); ++i) {
    std::copy_n(KeyListAt(own_, s, own_head, i), KeyListStride(own_), KeyListAt(mask_, s, mask_head, i));
  }
  if (HasVerticalSlash(mask_)) {
    std::copy_n(VerticalSlashAt(own_, s.index, own_head), VerticalSlashStride(own_),
                VerticalSlashAt(mask_, s.index, mask_head));
  }
  Count(s, mask_head);
}

void GuardRun::KeepAll(const Sequence& s, int64_t mask_head) {
  for (int64_t m = 0; m < g_.Tiles(s); ++m) {
    FillRow(mask_.bits + g_.Row(s, mask_head, m) * g_.words, g_.words, g_.TileOf(p_, s, m).visible);
  }
  Count(s, mask_head);
}

void GuardRun::Count(const Sequence& s, int64_t mask_head) {
  for (int64_t m = 0; mask_.counts && m < g_.Tiles(s); ++m) {
    mask_.counts[g_.Row(s, mask_head, m)] = static_cast<int32_t>(KeptBlocks(p_, g_, mask_, s, mask_head, m));
  }
}

void GuardRun::Learn() {
  if (!guard_.levels || !policy_ || !Repairs(guard_)) return;
  for (int64_t h = 0; h < p_.q_heads; ++h) {
    bool audited = false, repaired = false;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int32_t outcome = outcomes_[b * p_.q_heads + h];
      audited |= outcome != FP_GUARD_WHOLE;
      repaired |= outcome == FP_GUARD_REPAIRED || outcome == FP_GUARD_DENSE;
    }
    float& level = guard_.levels[h];
    if (repaired) {
      level = std::min(level + 1, kMostLevel);
    } else if (audited) {
      level = level * kSinks < kLeastLevel ? 0 : level * kSinks;
    }
  }
}

void GuardRun::Report() {
  const AuditRow* begin = rows_;
  for (int64_t b = 0; b < p_.batch; ++b) {
    int64_t rows = 0;
    for (int64_t i = b * p_.q_heads; i < (b + 1) * p_.q_heads; ++i) {
      const HeadAudit& head = audits_[i];
      rows += head.rows;
      if (guard_.recall) guard_.recall[i] = static_cast<float>(head.recall);
      if (guard_.recall_low) guard_.recall_low[i] = static_cast<float>(head.low);
      if (guard_.recall_p05) guard_.recall_p05[i] = static_cast<float>(head.p05);
      if (guard_.rows_audited) guard_.rows_audited[i] = static_cast<int32_t>(head.rows);
      if (guard_.missed_block) guard_.missed_block[i] = head.missed_block;
      if (guard_.outcome) guard_.outcome[i] = outcomes_[i];
    }
    const Moments moments = MomentsOf({begin, static_cast<size_t>(rows)});
    if (guard_.certificate) guard_.certificate[b] = static_cast<float>(Certificate(moments, guard_.risk));
    if (guard_.moments) {
      guard_.moments[3 * b] = moments.count;
      guard_.moments[3 * b + 1] = moments.sum;
      guard_.moments[3 * b + 2] = moments.squares;
    }
    begin += rows;
  }
}

} // namespace

size_t GuardWorkspace(const Backend& backend, const Problem& p, const Policy* policy, const BlockMask& mask,
                      const Exec& exec) {
  if (backend.guard) return backend.guard_workspace(p, mask, exec);
  BlockMask described = mask;
  return GuardRun(backend, p, policy, described, exec, nullptr).bytes();
}

void RunGuard(const Backend& backend, const Problem& p, const Policy* policy, BlockMask& mask, const Exec& exec,
              void* workspace) {
  if (backend.guard) return backend.guard(p, mask, exec, workspace);
  GuardRun(backend, p, policy, mask, exec, workspace).Run();
}

} // namespace flashprefill
