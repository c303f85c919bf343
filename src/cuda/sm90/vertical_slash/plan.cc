// Select for FlexPrefill and MInference, host side: what a policy asks of each launch, and where its scratch memory
// lies. docs/hopper-select.md says what the launches do; nothing is read back between them.
#include "cuda/select_vertical_slash.h"

#include <limits>
#include <numeric>

#include "core/minference.h"
#include "cuda/attend.h"
#include "cuda/sm90/lines.h"

namespace flashprefill::cuda {
namespace {

constexpr int64_t kKeyStep = 64;      // keys a product
constexpr int64_t kLeastChunk = 256;  // keys a CTA: below this its rows' loading shows
constexpr int64_t kMostChunks = 128;  // of a sequence: each CTA of the second launch reads all their denominators
constexpr int64_t kWantedCtas = 2112; // eight for each of 132 multiprocessors with room for two
constexpr int64_t kMapRows = 64;      // of a CTA

const fp_flexprefill* FlexOf(const Policy& policy) {
  return policy.kind == FP_FLEXPREFILL ? &reinterpret_cast<const fp_flexprefill&>(policy) : nullptr;
}

const fp_minference& MInferenceOf(const Policy& policy) { return reinterpret_cast<const fp_minference&>(policy); }

bool HasMap(const Policy& policy) { return FlexOf(policy) && FlexOf(policy)->tau > 0; }

int ToInt(int64_t x) { return static_cast<int>(std::min<int64_t>(x, std::numeric_limits<int32_t>::max())); }

// Heads that a table names one by one, or one that stands for all.
int PatternCount(const Problem& p, const fp_minference& m) { return m.head_count > 0 ? p.q_heads : 1; }

// The most keys that a sequence may have and be too short to select for (core/fallback.h).
int ShortKeys(const Problem& p, const Policy& policy) {
  const int64_t size = policy.block_size;
  if (const fp_flexprefill* f = FlexOf(policy))
    return ToInt(std::max(2 * size, DivUp<int64_t>(f->min_budget, size) * size));
  const fp_minference& m = MInferenceOf(policy);
  int64_t least = std::numeric_limits<int32_t>::max();
  for (int h = 0; h < PatternCount(p, m); ++h) {
    const fp_minference_head head = MInferenceHead(m, h);
    const int64_t all =
        head.pattern == FP_A_SHAPE
            ? int64_t{head.a} + head.b
            : std::max({int64_t{head.a}, int64_t{head.b}, kMInferenceColumns, kMInferenceLeastDistances});
    least = std::min(least, all);
  }
  return ToInt(least);
}

bool NothingToChoose(const Problem& p, const Policy& policy) {
  return p.total_q == 0 || p.max_seqlen_q <= 1 || p.max_seqlen_k <= ShortKeys(p, policy);
}

VerticalSlashShape ShapeOf(const Problem& p, const Policy& policy) {
  VerticalSlashShape a{};
  a.d = DeviceProblem::Of(p);
  a.rules = TileRules::Of(p, policy);
  a.scale_log2 = p.softmax_scale * 1.44269504f;
  a.short_keys = ShortKeys(p, policy);
  a.rows = FlexOf(policy) ? policy.block_size : static_cast<int>(kMInferenceRows);
  a.columns = a.rows <= 64 ? 64 : 128;
  a.parts = DivUp(a.rows, a.columns);
  const int64_t keys = a.packed_keys() ? p.total_k : p.batch * p.max_seqlen_k;
  const int64_t wanted =
      std::max({int64_t{p.q_heads} * a.parts * keys / kWantedCtas, p.max_seqlen_k / kMostChunks, kLeastChunk});
  a.chunk = static_cast<int>(DivUp(std::min(wanted, std::max(p.max_seqlen_k, kLeastChunk)), kKeyStep) * kKeyStep);
  a.slot_count = static_cast<int>(MeanRows(p, a.chunk));
  a.slots_per_batch = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, a.chunk));
  a.by_chunk = Divider::Of(a.chunk);
  a.by_slots = Divider::Of(std::max(1, a.slots_per_batch));
  a.by_page = Divider::Of(std::max(1, p.page_size));
  a.by_kv = Divider::Of(p.kv_heads);
  a.by_units = Divider::Of(p.q_heads / p.kv_heads * a.parts);
  return a;
}

int64_t BlockRoom(const Problem& p, const Policy& policy) { return DivUp<int64_t>(p.max_seqlen_k, policy.block_size); }

// MInference: block sizes that are no divisors of a tile's meet it in several ways.
int PhaseStep(const Policy& policy) { return std::gcd(kTileRows, policy.block_size); }

LineChoice ChoiceOf(const Problem& p, const Policy& policy, const VerticalSlashScratch& scratch) {
  const int64_t distances = BlockRoom(p, policy) + (FlexOf(policy) ? 0 : kCrossingsBefore);
  return {scratch.columns, scratch.distances, Geometry::Of(p, policy).words, DivUp<int64_t>(distances, 32)};
}

int64_t TokenWords(const Problem& p) { return DivUp<int64_t>(p.max_seqlen_k, 32); }

int64_t MapRowRoom(const Problem& p, const Policy& policy) { return p.total_q / policy.block_size + p.batch; }

cudaError_t ChooseFlex(const Problem& p, const fp_flexprefill& f, const VerticalSlashShape& shape,
                       const BlockMask& mask, const void* k_means, const VerticalSlashScratch& scratch,
                       cudaStream_t stream) {
  const Policy& policy = f.common;
  const int64_t mean_rows = MeanRows(p, policy.block_size);
  FlexArgs flex{};
  flex.shape = shape;
  flex.column = scratch.column;
  flex.diagonal = scratch.diagonal;
  flex.gamma = f.gamma;
  flex.tau = f.tau;
  flex.least_blocks = ToInt(std::max<int64_t>(1, DivUp<int64_t>(f.min_budget, policy.block_size)));
  flex.most_blocks = ToInt(DivUp<int64_t>(f.max_budget, policy.block_size));
  flex.cover_both = f.cover == FP_COVER_BOTH;
  flex.k_means = k_means;
  flex.mean_rows = mean_rows;
  flex.pitch = p.head_dim;
  flex.block_room = BlockRoom(p, policy);
  flex.by_block = scratch.by_block;
  flex.budget = scratch.budget;
  flex.aware = scratch.aware;
  flex.choice = ChoiceOf(p, policy, scratch);
  if (cudaError_t error = LaunchFlexChoice(flex, stream)) return error;
  if (!HasMap(policy)) return cudaSuccess;

  MapArgs map{};
  map.shape = shape;
  map.gamma = f.gamma;
  map.aware = scratch.aware;
  map.k_means = k_means;
  map.mean_rows = mean_rows;
  map.pitch = p.head_dim;
  map.row_room = MapRowRoom(p, policy);
  map.panel_room = static_cast<int>(p.total_q / (kMapRows * policy.block_size) + p.batch);
  map.by_panel = Divider::Of(kMapRows * policy.block_size);
  map.q_means = scratch.q_means;
  map.lse = scratch.map_lse;
  map.equal = scratch.map_equal;
  map.state = static_cast<MapState*>(scratch.map_states);
  map.counts = scratch.map_counts;
  map.rests = scratch.map_rests;
  map.bits = mask.bits;
  map.words = mask.words;
  return LaunchMap(map, stream);
}

cudaError_t ChooseTokens(const Problem& p, const fp_minference& m, const LineSumsArgs& sums,
                         const VerticalSlashScratch& scratch, cudaStream_t stream) {
  TokenArgs tokens{};
  tokens.shape = sums.shape;
  tokens.column = sums.column;
  tokens.diagonal = sums.diagonal;
  std::copy(std::begin(sums.skipped), std::end(sums.skipped), tokens.skipped);
  tokens.table = m.head_count > 0;
  for (int h = 0; h < PatternCount(p, m); ++h) {
    const fp_minference_head head = MInferenceHead(m, h);
    tokens.columns[h] = ToInt(std::max<int64_t>(head.a, kMInferenceColumns));
    tokens.distances[h] = ToInt(std::max<int64_t>(head.b, kMInferenceLeastDistances));
  }
  tokens.column_tokens = scratch.column_tokens;
  tokens.distance_tokens = scratch.distance_tokens;
  tokens.token_words = TokenWords(p);
  tokens.phase_step = PhaseStep(m.common);
  tokens.choice = ChoiceOf(p, m.common, scratch);
  return LaunchTokenChoice(tokens, stream);
}

} // namespace

bool ChoosesByHead(const Policy& policy) { return policy.kind == FP_FLEXPREFILL || policy.kind == FP_MINFERENCE; }

bool VerticalSlashNeedsMeans(const Policy& policy) { return HasMap(policy); }

const char* SelectVerticalSlashUnsupported(const Problem& p, const Policy& policy) {
  if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  if (p.total_q > kMost || p.total_k > kMost || p.max_seqlen_k > kMost) return "fewer than 2^30 tokens on CUDA";
  if (p.batch > 65535) return "at most 65535 sequences with this policy on CUDA";
  const auto aligned = [](const Tensor& t) {
    bool is = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[3] == 1;
    for (int axis = 0; axis < 3; ++axis) is &= t.stride[axis] >= 0 && t.stride[axis] % 8 == 0;
    return is;
  };
#define FLASHPREFILL_ALIGNMENT \
  " must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative"
  if (!aligned(p.q)) return "q" FLASHPREFILL_ALIGNMENT;
  if (!aligned(p.k)) return "k" FLASHPREFILL_ALIGNMENT;
#undef FLASHPREFILL_ALIGNMENT
  if (FlexOf(policy)) return nullptr;
  const fp_minference& m = MInferenceOf(policy);
  if (m.rounding == FP_ROUND_TOKENS) return "MInference's rounding by tokens is for the CPU: give blocks";
  if (m.head_count > kMaxLineHeads) return "MInference takes a list of at most 256 heads on CUDA";
  for (int h = 0; h < PatternCount(p, m); ++h) {
    if (MInferenceHead(m, h).pattern == FP_BLOCK_SPARSE) {
      return "MInference's block_sparse heads select on the CPU only";
    }
  }
  return nullptr;
}

VerticalSlashScratch VerticalSlashScratch::Take(Workspace& workspace, const Problem& p, const Policy& policy) {
  VerticalSlashScratch s{};
  if (!ChoosesByHead(policy) || NothingToChoose(p, policy)) return s;
  const VerticalSlashShape a = ShapeOf(p, policy);
  const int64_t units = int64_t{p.q_heads} * a.parts * a.slot_count, heads = int64_t{p.batch} * p.q_heads;
  const LineChoice choice = ChoiceOf(p, policy, s);
  s.lse = workspace.Take<float>(units * a.columns);
  s.column = workspace.Take<float>(units * a.chunk);
  s.diagonal = workspace.Take<float>(units * (a.chunk + a.columns));
  s.columns = workspace.Take<uint32_t>(heads * 2 * choice.words);
  const int phases = FlexOf(policy) ? 1 : policy.block_size / PhaseStep(policy);
  s.distances = workspace.Take<uint32_t>(heads * phases * choice.distance_words);
  if (FlexOf(policy)) {
    s.by_block = workspace.Take<float>(heads * 3 * BlockRoom(p, policy));
    s.budget = workspace.Take<int>(heads * 2);
    s.aware = workspace.Take<int>(heads);
  } else {
    s.column_tokens = workspace.Take<uint32_t>(heads * TokenWords(p));
    s.distance_tokens = workspace.Take<uint32_t>(heads * TokenWords(p));
  }
  if (HasMap(policy)) {
    const int64_t rows = p.q_heads * MapRowRoom(p, policy);
    s.q_means = workspace.Take<uint16_t>(rows * p.head_dim);
    s.map_lse = workspace.Take<float>(rows);
    s.map_equal = workspace.Take<uint32_t>(rows);
    s.map_states = workspace.Take<MapState>(heads);
    s.map_counts = workspace.Take<uint32_t>(heads * kRadixBins);
    s.map_rests = workspace.Take<uint64_t>(heads * kRadixBins);
  }
  return s;
}

cudaError_t LaunchSelectVerticalSlash(const Problem& p, const Policy& policy, const BlockMask& mask,
                                      const void* k_means, const VerticalSlashScratch& scratch, int* zeroed,
                                      cudaStream_t stream) {
  const fp_flexprefill* const flex = FlexOf(policy);
  LineMaskArgs bits{};
  bits.shape = ShapeOf(p, policy);
  bits.nothing_chosen = NothingToChoose(p, policy);
  bits.choice = ChoiceOf(p, policy, scratch);
  bits.distance_tokens = scratch.distance_tokens;
  bits.token_words = TokenWords(p);
  bits.phase_step = PhaseStep(policy);
  bits.cover_both = flex && flex->cover == FP_COVER_BOTH;
  bits.aware = HasMap(policy) ? scratch.aware : nullptr;
  bits.bits = mask.bits;
  bits.counts = mask.counts;
  bits.fallback = mask.fallback;
  bits.words = mask.words;
  bits.zeroed = zeroed;

  LineSumsArgs sums{};
  sums.shape = bits.shape;
  sums.lse = scratch.lse;
  sums.column = scratch.column;
  sums.diagonal = scratch.diagonal;
  bool any_lines = true;
  if (!flex) {
    const fp_minference& m = MInferenceOf(policy);
    bits.table = m.head_count > 0;
    any_lines = false;
    for (int h = 0; h < PatternCount(p, m); ++h) {
      const fp_minference_head head = MInferenceHead(m, h);
      const bool lines = head.pattern == FP_VERTICAL_SLASH;
      any_lines |= lines;
      bits.pattern[h] = lines ? kLines : kNearAndFirst;
      bits.first[h] = head.a;
      bits.nearest[h] = head.b;
      if (!lines && bits.table) sums.skipped[h / 64] |= uint64_t{1} << (h % 64);
    }
  }
  if (!bits.nothing_chosen && any_lines) {
    if (cudaError_t error = LaunchLineSums(sums, stream)) return error;
    const cudaError_t error = flex ? ChooseFlex(p, *flex, sums.shape, mask, k_means, scratch, stream)
                                   : ChooseTokens(p, MInferenceOf(policy), sums, scratch, stream);
    if (error) return error;
  }
  return LaunchLineMask(bits, stream);
}

} // namespace flashprefill::cuda
