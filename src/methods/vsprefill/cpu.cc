// VSPrefill (arXiv 2603.04460) on the CPU: see reference.cc for the rules, docs/methods/vsprefill.md for why. Logits
// are made first, for runs of keys of all KV heads, by the family's product with hidden units as its lanes: 4 head_dim
// hidden operations per key and KV head. Then a mask head finds its masses without sorting, by radix, and its best
// tokens by a partial sort.
//
// Keys whose logits the caller has kept cost a hash each: 2 head_dim integer steps in place of the product.
#include <cmath>
#include <cstring>

#include "cpu/vertical_slash/lanes.h"
#include "cpu/vertical_slash/radix_threshold.h"
#include "cpu/vertical_slash/vertical_slash.h"

namespace flashprefill::methods::vsprefill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kLogits = 2; // of a token: its vertical's and its slash's

// A hash of numbers by their bits, never 0. Four chains, since each step waits for the one before it.
uint64_t HashOf(const float* key, const float* value, int64_t depth) {
  uint64_t chains[4] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93};
  const auto add = [&](const float* row) {
    for (int64_t i = 0; i < depth; ++i) {
      uint64_t& chain = chains[i % 4];
      chain = (chain ^ std::bit_cast<uint32_t>(row[i])) * 0x2545f4914f6cdd1d;
      chain ^= chain >> 29;
    }
  };
  add(key);
  add(value);
  uint64_t hash = 0;
  for (const uint64_t chain : chains) hash = (hash ^ chain) * 0xff51afd7ed558ccd, hash ^= hash >> 32;
  return hash == 0 ? 1 : hash;
}

class Selection {
 public:
  struct Scratch : cpu::VerticalSlashScratch {};

  explicit Selection(const cpu::SelectCall& call)
      : call_(call),
        policy_(reinterpret_cast<const fp_vsprefill&>(call.policy)),
        kernels_(cpu::VerticalSlashKernelsFor(call.exec)),
        lanes_(DivUp<int64_t>(policy_.hidden, cpu::kPanelRows) * cpu::kPanelRows) {}

  cpu::ItemShape Shape() const { return {.units = call_.MaxRuns()}; }

  void Take(Workspace& memory, int64_t panels) {
    const int64_t heads = call_.p.kv_heads, depth = call_.p.head_dim;
    up_ = memory.Take<float>(heads * 2 * lanes_ * depth);
    bias_ = memory.Take<float>(heads * lanes_);
    weights_ = memory.Take<float>(heads * kLogits * lanes_);
    logits_ = memory.Take<float>(panels * heads * PanelLogits());
    seen_ = memory.Take<int32_t>(lanes_);
  }

  Scratch TakeScratch(Workspace& memory) const {
    Scratch t{cpu::VerticalSlashScratch::Take(memory, call_, {.last_rows = 0, .tokens = true, .pooled_logits = false})};
    t.panels = memory.Take<float>(2 * cpu::kChunkKeys * call_.p.head_dim); // keys, values
    t.scores = memory.Take<float>(2 * cpu::kChunkKeys * lanes_);           // the same
    t.sums = memory.Take<float>(kLogits * cpu::kChunkKeys);
    return t;
  }

  void Describe(const cpu::SelectFrame& frame) {
    if (policy_.hidden == 0) return;
    if (!packed_) Pack();
    packed_ = true;
    frame.ForRuns([&](const cpu::BlockRun& run, Workspace scratch) {
      const Scratch t = TakeScratch(scratch);
      const int64_t size = call_.g.block_size, end = std::min(run.end * size, run.s.k_len);
      float* logits = LogitsOf(frame, run.s, run.kv_head);
      for (int64_t first = run.begin * size; first < end; first += cpu::kChunkKeys) {
        Predict(run, first, std::min<int64_t>(cpu::kChunkKeys, end - first), t, logits);
      }
    });
  }

  void Choose(const cpu::Item& item, const Scratch& t) const {
    if (policy_.hidden == 0) return;
    const cpu::HeadCall call{call_.p, call_.policy, call_.g, kernels_, item.s, item.rows[0].head, item.frame.mask(), t};
    const float* logits = LogitsOf(item.frame, item.s, item.kv_head);
    cpu::KeepVerticals(call, Fewest(call, logits, policy_.vertical_mass), policy_.rounding);
    cpu::KeepSlashes(call, Fewest(call, logits + 1, policy_.slash_mass), policy_.rounding);
  }

 private:
  int64_t PanelLogits() const { return int64_t{cpu::kPanelBlocks} * call_.g.block_size * kLogits; }
  float* LogitsOf(const cpu::SelectFrame& frame, const Sequence& s, int64_t kv_head) const {
    return logits_ + frame.Panel(s, kv_head, call_.p.kv_heads) * PanelLogits();
  }

  // The weights as panels of 32 units: of keys, then of values. Units that fill the last panel up are 0.
  void Pack() {
    const int64_t depth = call_.p.head_dim, heads = call_.p.kv_heads, hidden = policy_.hidden;
    std::fill_n(up_, heads * 2 * lanes_ * depth, 0.f);
    std::fill_n(bias_, heads * lanes_, 0.f);
    std::fill_n(weights_, heads * kLogits * lanes_, 0.f);
    std::fill_n(seen_, lanes_, std::numeric_limits<int32_t>::max());
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t u = 0; u < hidden; ++u) {
        const float* row = policy_.up + (head * hidden + u) * 2 * depth;
        for (int half = 0; half < 2; ++half) {
          cpu::PutLane(row + half * depth, depth, 1, u, up_ + (head * 2 + half) * lanes_ * depth);
        }
      }
      std::copy_n(policy_.bias + head * hidden, hidden, bias_ + head * lanes_);
      std::copy_n(policy_.vertical + head * hidden, hidden, weights_ + head * kLogits * lanes_);
      std::copy_n(policy_.slash + head * hidden, hidden, weights_ + (head * kLogits + 1) * lanes_);
    }
  }

  // Where the caller keeps the logits of a sequence's key, or null.
  fp_vsprefill_logits* Kept(const cpu::BlockRun& run, int64_t token) const {
    if (!policy_.logits || token >= policy_.logit_tokens) return nullptr;
    return policy_.logits + (int64_t{run.s.index} * call_.p.kv_heads + run.kv_head) * policy_.logit_tokens + token;
  }

  // Logits of keys [first, first + count): those that are kept, or made from keys and values.
  void Predict(const cpu::BlockRun& run, int64_t first, int64_t count, const Scratch& t, float* logits) const {
    const int64_t depth = call_.p.head_dim;
    float* keys = t.panels;
    float* values = t.panels + cpu::kChunkKeys * depth;
    kernels_.load_keys(call_.p, run.s, first, first + count, run.kv_head, keys);
    kernels_.load_values(call_.p, run.s, first, first + count, run.kv_head, values);
    int64_t tokens[cpu::kChunkKeys];
    uint64_t hashes[cpu::kChunkKeys] = {};
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const fp_vsprefill_logits* kept = Kept(run, first + i);
      if (kept) {
        hashes[left] = HashOf(keys + i * depth, values + i * depth, depth);
        if (kept->of == hashes[left]) {
          logits[(first + i) * kLogits] = kept->vertical;
          logits[(first + i) * kLogits + 1] = kept->slash;
          continue;
        }
      }
      if (left < i) { // those before are known
        std::copy_n(keys + i * depth, depth, keys + left * depth);
        std::copy_n(values + i * depth, depth, values + left * depth);
      }
      tokens[left++] = first + i;
    }
    if (left == 0) return;
    Compute(run.kv_head, keys, values, left, t);
    for (int64_t i = 0; i < left; ++i) {
      float* to = logits + tokens[i] * kLogits;
      for (int64_t l = 0; l < kLogits; ++l) to[l] = std::isfinite(t.sums[i * 2 + l]) ? t.sums[i * 2 + l] : -kInfinity;
      if (fp_vsprefill_logits* kept = Kept(run, tokens[i])) *kept = {hashes[i], to[0], to[1]};
    }
  }

  // Leaves the logits of `count` rows in t.sums.
  void Compute(int64_t kv_head, const float* keys, const float* values, int64_t count, const Scratch& t) const {
    const int64_t depth = call_.p.head_dim;
    float* parts[2] = {t.scores, t.scores + cpu::kChunkKeys * lanes_};
    const float* rows[2] = {keys, values};
    for (int half = 0; half < 2; ++half) {
      const float* up = up_ + (kv_head * 2 + half) * lanes_ * depth;
      kernels_.score({up, rows[half], seen_, depth, 0, count, lanes_, parts[half]});
    }
    kernels_.activate(
        {parts[0], parts[1], bias_ + kv_head * lanes_, weights_ + kv_head * kLogits * lanes_, count, lanes_, t.sums});
  }

  // Leaves the fewest tokens with the mass p of the softmax of some logits in ranks. Returns how many they are.
  int64_t Fewest(const cpu::HeadCall& call, const float* logits, double p) const {
    const cpu::VerticalSlashScratch& t = call.scratch;
    const int64_t keys = call.s.k_len;
    float largest = -kInfinity;
    for (int64_t i = 0; i < keys; ++i) largest = std::max(largest, logits[i * kLogits]);
    if (largest == -kInfinity) return 0;
    double total = 0;
    for (int64_t i = 0; i < keys; ++i) {
      t.verticals[i] = std::exp(logits[i * kLogits] - largest);
      total += t.verticals[i];
    }
    // The token that reaches the mass is in: one more than stay below it.
    const cpu::RadixThreshold threshold =
        cpu::FindRadixThreshold(std::nextafter(p * total, 0.0), [&](const auto& visit) {
          for (int64_t i = 0; i < keys; ++i) visit(t.verticals[i]);
        });
    for (int64_t i = 0; i < keys; ++i) {
      if (logits[i * kLogits] == -kInfinity) t.verticals[i] = -kInfinity;
    }
    const int64_t count = threshold.crosses ? threshold.count() + 1 : keys;
    return cpu::Best(t.verticals, 1, keys, 0, count, t.ranks);
  }

  const cpu::SelectCall& call_;
  const fp_vsprefill& policy_;
  const cpu::VerticalSlashKernels& kernels_;
  const int64_t lanes_; // hidden units, in whole panels
  bool packed_ = false;
  float* up_ = nullptr;      // [kv_heads][2][lanes / 32][head_dim][32]
  float* bias_ = nullptr;    // [kv_heads][lanes]
  float* weights_ = nullptr; // [kv_heads][2][lanes]
  float* logits_ = nullptr;  // [panels of the wave, times kv_heads][32 blocks of keys][2]
  int32_t* seen_ = nullptr;  // [lanes]: every lane sees every key
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::vsprefill
