// Scores of a few rows against many keys, and their sums by vertical and slash, compiled once for each instruction
// set. The product holds R keys x 2 vectors of query rows in registers, as in energies/kernels.cc: of R + 2 loads for 2
// R multiply-adds, R are broadcasts from L1.
#include "cpu/simd/targets.h"
// foreach_target.h reads all that follows it again for each target, so it comes before everything per-target.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/vertical_slash/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "core/half.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/input_rows.h"
#include "cpu/simd/rows.h"
#include "cpu/vertical_slash/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace {

constexpr int kKeysPerStep =
    HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 8 : 4; // 2 sums per key, of 32 or 16 registers

// Loading the keys of one head of three took as long as 32 products with each before rows were asked for ahead.
HWY_INLINE void PrefetchRowOf(const fp_tensor& tensor, int64_t offset, int64_t n) {
  const int64_t size = static_cast<int64_t>(DtypeSize(tensor.dtype));
  if (tensor.stride[3] == 1) PrefetchRow(static_cast<const char*>(tensor.data) + offset * size, n * size);
}

void LoadQueries(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t head, float* rows) {
  for (int64_t i = begin; i < end; ++i, rows += p.head_dim) {
    if (i + kAhead < s.q_len) PrefetchRowOf(p.q, RowOffset(p, p.q.stride, s, i + kAhead, head), p.head_dim);
    LoadRow(p.q.data, p.q.dtype, RowOffset(p, p.q.stride, s, i, head), p.q.stride[3], p.head_dim, p.head_dim, rows);
  }
}

void LoadKeys(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t kv_head, float* rows) {
  const float scale = KeyScale(p, s, kv_head);
  for (int64_t t = begin; t < end; ++t, rows += p.head_dim) {
    if (t + kAhead < s.k_len) PrefetchRowOf(p.k, KeyOffset(p, p.k.stride, s, t + kAhead, kv_head), p.head_dim);
    LoadRow(p.k.data, p.k.dtype, KeyOffset(p, p.k.stride, s, t, kv_head), p.k.stride[3], p.head_dim, p.head_dim, rows,
            scale);
  }
}

void LoadValues(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t kv_head, float* rows) {
  const float scale = ValueScale(p, s, kv_head);
  for (int64_t t = begin; t < end; ++t, rows += p.head_dim) {
    LoadRow(p.v.data, p.v.dtype, KeyOffset(p, p.v.stride, s, t, kv_head), p.v.stride[3], p.head_dim, p.head_dim, rows,
            scale);
  }
}

void AddRows(const float* HWY_RESTRICT rows, int64_t n, int64_t depth, float* HWY_RESTRICT sum) {
  for (int64_t r = 0; r < n; ++r, rows += depth) {
    int64_t i = 0;
    for (; i + kLanes <= depth; i += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(f, sum + i), hn::LoadU(f, rows + i)), f, sum + i);
    }
    for (; i < depth; ++i) sum[i] += rows[i];
  }
}

// R keys by 2 vectors of rows.
template <int R>
HWY_INLINE void ScoreBlock(const ScoreChunk& c, const float* HWY_RESTRICT panel, int64_t key, int64_t lane) {
  constexpr int kVectors = 2;
  const float* HWY_RESTRICT keys = c.keys + key * c.depth;
  VF z[R][kVectors];
  for (int r = 0; r < R; ++r) z[r][0] = z[r][1] = hn::Zero(f);
  for (int64_t i = 0; i < c.depth; ++i, panel += kPanelRows) {
    const VF a = hn::Load(f, panel), b = hn::Load(f, panel + kLanes);
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const VF x = hn::Set(f, keys[r * c.depth + i]);
      z[r][0] = hn::MulAdd(x, a, z[r][0]);
      z[r][1] = hn::MulAdd(x, b, z[r][1]);
    }
  }
  const DI di;
  const VF finite = hn::Set(f, 3.4028235e38f), never = hn::Set(f, -INFINITY);
  for (int v = 0; v < kVectors; ++v) {
    const auto seen = hn::LoadU(di, c.seen + lane + v * kLanes);
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const auto sees = hn::RebindMask(f, hn::Gt(seen, hn::Set(di, static_cast<int32_t>(c.first + key + r))));
      const auto counts = hn::And(sees, hn::Le(hn::Abs(z[r][v]), finite));
      hn::Store(hn::IfThenElse(counts, z[r][v], never), f, c.scores + (key + r) * c.lanes + lane + v * kLanes);
    }
  }
}

void Score(const ScoreChunk& c) {
  for (int64_t lane = 0; lane < c.lanes; lane += 2 * kLanes) {
    const float* panel = c.panels + lane / kPanelRows * kPanelRows * c.depth + lane % kPanelRows;
    int64_t key = 0;
    for (; key + kKeysPerStep <= c.count; key += kKeysPerStep) ScoreBlock<kKeysPerStep>(c, panel, key, lane);
    for (; key < c.count; ++key) ScoreBlock<1>(c, panel, key, lane);
  }
}

template <bool kRaise>
HWY_INLINE void Accumulate(const ScoreChunk& c, float* HWY_RESTRICT largest, float* HWY_RESTRICT sums) {
  for (int64_t lane = 0; lane < c.lanes; lane += kLanes) {
    float* HWY_RESTRICT z = c.scores + lane;
    const VF before = hn::Load(f, largest + lane);
    VF top = before;
    for (int64_t t = 0; t < c.count; ++t) top = hn::Max(top, hn::Load(f, z + t * c.lanes));
    VF sum = hn::Mul(hn::Load(f, sums + lane), Exp2(hn::Sub(before, top)));
    for (int64_t t = 0; t < c.count; ++t) {
      const VF power = Exp2(hn::Sub(hn::Load(f, z + t * c.lanes), top));
      if constexpr (kRaise) hn::Store(power, f, z + t * c.lanes);
      sum = hn::Add(sum, power);
    }
    hn::Store(top, f, largest + lane);
    hn::Store(sum, f, sums + lane);
  }
}

void AddToSums(const ScoreChunk& c, float* largest, float* sums) { Accumulate<false>(c, largest, sums); }
void Raise(const ScoreChunk& c, float* largest, float* sums) { Accumulate<true>(c, largest, sums); }

// A group's lanes begin anywhere, and what is read beyond its end is computed and not looked at.
void RootMeanSquares(const LaneGroups& g, const float* HWY_RESTRICT powers, int64_t count,
                     float* HWY_RESTRICT energies) {
  const VF each = hn::Set(f, 1.f / static_cast<float>(g.groups));
  for (int64_t t = 0; t < count; ++t, powers += g.lanes, energies += g.stride) {
    for (int64_t i = 0; i < g.size; i += kLanes) {
      VF squares = hn::Zero(f);
      for (int64_t lane = i; lane < g.groups * g.size; lane += g.size) {
        const VF share = hn::Mul(hn::LoadU(f, powers + lane), hn::LoadU(f, g.factors + lane));
        squares = hn::MulAdd(share, share, squares);
      }
      hn::StoreU(hn::Sqrt(hn::Mul(squares, each)), f, energies + i);
    }
  }
}

void Share(const ScoreChunk& c, const float* HWY_RESTRICT reference) {
  for (int64_t t = 0; t < c.count; ++t) {
    float* HWY_RESTRICT z = c.scores + t * c.lanes;
    for (int64_t lane = 0; lane < c.lanes; lane += kLanes) {
      hn::Store(Exp2(hn::Sub(hn::Load(f, z + lane), hn::Load(f, reference + lane))), f, z + lane);
    }
  }
}

// All lanes of a key before the next key: a diagonal's next vector overlaps this key's by all but one lane, and has to
// wait until it is stored.
void AddVerticalSlash(const ScoreChunk& c, float* HWY_RESTRICT column, float* HWY_RESTRICT diagonal) {
  for (int64_t t = 0; t < c.count; ++t) {
    const float* HWY_RESTRICT z = c.scores + t * c.lanes;
    float* HWY_RESTRICT line = diagonal + t;
    VF sum = hn::Zero(f);
    for (int64_t lane = 0; lane < c.lanes; lane += kLanes) {
      const VF share = hn::Load(f, z + lane);
      sum = hn::Add(sum, share);
      hn::StoreU(hn::Add(hn::LoadU(f, line + lane), share), f, line + lane);
    }
    column[t] = hn::GetLane(hn::SumOfLanes(f, sum));
  }
}

// SiLU(z) = z / (1 + 2^-y) with y = z log2(e). Of a power whose exponent is never above 0 both signs are made.
HWY_INLINE VF Silu(VF z) {
  const VF one = hn::Set(f, 1.f);
  const VF power = Exp2(hn::Neg(hn::Abs(hn::Mul(z, hn::Set(f, static_cast<float>(kLog2E))))));
  const VF positive = hn::Div(z, hn::Add(one, power));
  return hn::IfThenElse(hn::Lt(z, hn::Zero(f)), hn::Mul(positive, power), positive);
}

void Activate(const Activation& a) {
  for (int64_t t = 0; t < a.count; ++t) {
    const float* HWY_RESTRICT keys = a.of_keys + t * a.lanes;
    const float* HWY_RESTRICT values = a.of_values + t * a.lanes;
    VF vertical = hn::Zero(f), slash = hn::Zero(f);
    for (int64_t lane = 0; lane < a.lanes; lane += kLanes) {
      const VF z = hn::Add(hn::Add(hn::Load(f, keys + lane), hn::Load(f, values + lane)), hn::Load(f, a.bias + lane));
      const VF unit = Silu(z);
      vertical = hn::MulAdd(unit, hn::Load(f, a.weights + lane), vertical);
      slash = hn::MulAdd(unit, hn::Load(f, a.weights + a.lanes + lane), slash);
    }
    a.sums[2 * t] = hn::GetLane(hn::SumOfLanes(f, vertical));
    a.sums[2 * t + 1] = hn::GetLane(hn::SumOfLanes(f, slash));
  }
}

} // namespace

static_assert(kLanes <= kVectorPad);

constexpr VerticalSlashKernels kVerticalSlashKernels = {
    .load_queries = LoadQueries,
    .load_keys = LoadKeys,
    .load_values = LoadValues,
    .add_rows = AddRows,
    .score = Score,
    .add_to_sums = AddToSums,
    .raise = Raise,
    .share = Share,
    .root_mean_squares = RootMeanSquares,
    .add_vertical_slash = AddVerticalSlash,
    .activate = Activate,
};

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
FLASHPREFILL_EXPORT_KERNELS(VerticalSlashKernels)
#endif
