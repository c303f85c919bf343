// Checks of all arguments: see validate.h. Index arrays are read only if they are in host memory; CUDA kernels clamp
// theirs.
#include "core/validate.h"

#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"
#include "core/method.h"

namespace flashprefill {
namespace {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxHeads = 65536;

void CheckSize(const std::string& name, uint32_t size, size_t least) {
  if (size < least || size > least + 4096)
    Refuse(name + ".struct_size", size, "the size of the struct: call fp_*_init first");
}

template <typename T>
void CheckRange(const std::string& name, T value, int64_t least, int64_t most) {
  if (static_cast<int64_t>(value) < least || static_cast<int64_t>(value) > most) {
    Refuse(name, value, "from " + std::to_string(least) + " to " + std::to_string(most));
  }
}

void CheckFlag(const std::string& name, int32_t value) {
  if (value != 0 && value != 1) Refuse(name, value, "0 or 1");
}

// Whether `count` elements, `stride` apart, fit into the address space.
bool Addressable(int64_t count, int64_t stride) {
  int64_t product;
  return !__builtin_mul_overflow(std::max<int64_t>(0, count - 1), stride, &product) && product > -(int64_t{1} << 59) &&
         product < (int64_t{1} << 59);
}

// `most`: the last of the dtypes that it may have.
void CheckTensor(const std::string& name, const Tensor& t, const int64_t (&extent)[4], int32_t most, bool stored) {
  if (t.dtype == FP_E4M3 && most < FP_E4M3) {
    Refuse(name + ".dtype", "FP_E4M3 (3)", "FP_F32 (0), FP_BF16 (1) or FP_F16 (2): only k and v may be FP8");
  }
  CheckRange(name + ".dtype", t.dtype, FP_F32, most);
  for (int axis = 0; axis < 4; ++axis) {
    if (!Addressable(extent[axis], t.stride[axis])) {
      Refuse(name + ".stride[" + std::to_string(axis) + "]", t.stride[axis],
             "small enough that " + std::to_string(extent[axis]) + " steps of it stay inside the address space");
    }
    if (stored && extent[axis] > 1 && t.stride[axis] == 0) {
      Refuse(name + ".stride[" + std::to_string(axis) + "]", 0, "other than 0: results would overwrite each other");
    }
  }
  const bool empty = extent[0] == 0 || extent[1] == 0;
  if (!empty && !t.data) Refuse(name + ".data", "NULL", "the address of the tensor");
  if (reinterpret_cast<uintptr_t>(t.data) % DtypeSize(t.dtype) != 0) {
    Refuse(name + ".data", t.data, "aligned to its dtype's " + std::to_string(DtypeSize(t.dtype)) + " bytes");
  }
}

// Scales of FP8 keys or values.
void CheckScales(const std::string& name, const float* scale, const int64_t (&stride)[2], int32_t dtype,
                 const Problem& p) {
  if (!scale) return;
  if (dtype != FP_E4M3) Refuse(name, scale, "NULL but where the dtype is FP_E4M3 (3)");
  if (reinterpret_cast<uintptr_t>(scale) % alignof(float) != 0) Refuse(name, scale, "aligned to 4 bytes");
  if (!Addressable(p.batch, stride[0]) || !Addressable(p.kv_heads, stride[1])) {
    Refuse(name + "_stride", stride[0], "inside the address space");
  }
  for (int64_t b = 0; p.device == FP_CPU && b < p.batch; ++b) {
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const float value = scale[b * stride[0] + h * stride[1]];
      if (value > 0 && std::isfinite(value)) continue;
      Refuse(name + "[" + std::to_string(b) + "][" + std::to_string(h) + "]", value, "finite and above 0");
    }
  }
}

void CheckCumulative(const std::string& name, const int32_t* cu, int batch, int64_t longest, const char* longest_name) {
  if (cu[0] != 0) Refuse(name + "[0]", cu[0], "0");
  for (int b = 0; b < batch; ++b) {
    const std::string entry = name + "[" + std::to_string(b + 1) + "]";
    if (cu[b + 1] < cu[b]) Refuse(entry, cu[b + 1], "at least the entry before it (" + std::to_string(cu[b]) + ")");
    if (cu[b + 1] - cu[b] > longest) {
      Refuse(entry, cu[b + 1],
             "at most " + std::string(longest_name) + " (" + std::to_string(longest) + ") above the entry before it");
    }
  }
}

// Host arrays: lengths that contradict each other, pages that are not there.
void CheckIndexArrays(const Problem& p) {
  if (p.cu_seqlens_q) {
    CheckCumulative("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.max_seqlen_q, "max_seqlen_q");
    if (p.cu_seqlens_q[p.batch] != p.total_q) {
      Refuse("cu_seqlens_q[" + std::to_string(p.batch) + "]", p.cu_seqlens_q[p.batch],
             "the number of rows of q (" + std::to_string(p.total_q) + ")");
    }
  }
  if (p.cu_seqlens_k) {
    CheckCumulative("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.max_seqlen_k, "max_seqlen_k");
    if (!p.block_table && p.cu_seqlens_k[p.batch] > p.total_k) {
      Refuse("cu_seqlens_k[" + std::to_string(p.batch) + "]", p.cu_seqlens_k[p.batch],
             "at most the number of keys (" + std::to_string(p.total_k) + ")");
    }
  }
  for (int b = 0; b < p.batch; ++b) {
    const std::string at = "[" + std::to_string(b) + "]";
    if (p.seqused_k) {
      int64_t room = p.max_seqlen_k;
      if (p.cu_seqlens_k && !p.block_table) {
        room = std::min<int64_t>(room, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
      }
      CheckRange("seqused_k" + at, p.seqused_k[b], 0, room);
    }
    const Sequence s = SequenceOf(p, b);
    if (p.causal && s.k_len < s.q_len) {
      Refuse("the number of keys of sequence " + std::to_string(b), s.k_len,
             "at least its number of query rows (" + std::to_string(s.q_len) + ") with causal=1");
    }
    if (p.block_table) {
      const int64_t pages = DivUp<int64_t>(s.k_len, p.page_size);
      if (pages > p.pages_per_seq) {
        Refuse("block_table's number of columns", p.pages_per_seq,
               "at least " + std::to_string(pages) + " for the " + std::to_string(s.k_len) + " keys of sequence " +
                   std::to_string(b));
      }
      for (int64_t page = 0; page < pages; ++page) {
        const int32_t entry = p.block_table[b * p.block_table_stride + page];
        if (entry < 0 || entry >= p.page_count) {
          Refuse("block_table" + at + "[" + std::to_string(page) + "]", entry,
                 "a page, from 0 to " + std::to_string(p.page_count - 1));
        }
      }
    }
  }
}

// The geometry of a mask's key lists.
void CheckKeyListRoom(const BlockMask& m, const Problem& p, bool needs_lists) {
  CheckRange("mask.max_keys", m.max_keys, 0, kMaxTokens);
  if (!HasKeyLists(m)) return;
  CheckRange("mask.segment_tiles", m.segment_tiles, 1, kMaxTokens);
  if (m.segment_rows != SegmentRows(p, m)) {
    Refuse("mask.segment_rows", m.segment_rows,
           std::to_string(SegmentRows(p, m)) + ", as fp_mask_describe says for this problem");
  }
  if (HasVerticalSlash(m)) Refuse("mask.max_keys", m.max_keys, "0 where the mask has verticals or slashes");
  if (!p.causal) Refuse("causal", 0, "1 where the mask has key lists");
  if (needs_lists && !m.key_lists && m.heads * m.segment_rows > 0)
    Refuse("mask.key_lists", "NULL", "the address of the mask's key lists");
}

// Where every query sees every key there is no diagonal, so nothing that is counted from it has a meaning.
void CheckWithoutCausal(const Method& method, const Policy& policy) {
  if (!method.without_causal) {
    std::string others = "dense";
    for (const Method* other : Methods()) others += other->without_causal ? std::string(", ") + other->name : "";
    Refuse("causal", 0, "1 for " + std::string(method.name) + ": without causality these select: " + others);
  }
  CheckRange("window_blocks with causal=0", policy.window_blocks, 0, 1);
  CheckRange("dense_tail_blocks with causal=0", policy.dense_tail_blocks, 0, 0);
}

} // namespace

void ValidateProblem(const Problem* problem) {
  if (!problem) Refuse("problem", "NULL", "a problem");
  const Problem& p = *problem;
  CheckSize("problem", p.struct_size, sizeof(Problem));
  CheckRange("device", p.device, FP_CPU, FP_CUDA);
  CheckRange("batch", p.batch, 0, kMaxTokens - 1);
  CheckRange("kv_heads", p.kv_heads, 1, kMaxHeads);
  CheckRange("q_heads", p.q_heads, 1, kMaxHeads);
  if (p.q_heads % p.kv_heads != 0) {
    Refuse("q_heads", p.q_heads, "a multiple of kv_heads (" + std::to_string(p.kv_heads) + ")");
  }
  CheckRange("head_dim", p.head_dim, 1, kMaxHeadDim);
  CheckFlag("causal", p.causal);
  CheckFlag("final_chunk", p.final_chunk);
  if (!(p.softmax_scale > 0) || !std::isfinite(p.softmax_scale)) {
    Refuse("softmax_scale", p.softmax_scale, "finite and above 0");
  }
  CheckRange("total_q", p.total_q, 0, kMaxTokens);
  CheckRange("max_seqlen_q", p.max_seqlen_q, 0, kMaxTokens);
  CheckRange("max_seqlen_k", p.max_seqlen_k, 0, kMaxTokens);
  if (!p.cu_seqlens_q && p.total_q != p.batch * p.max_seqlen_q) {
    Refuse("total_q", p.total_q,
           "batch * max_seqlen_q (" + std::to_string(p.batch * p.max_seqlen_q) + ") without cu_seqlens_q");
  }
  const bool rectangular_q = !p.cu_seqlens_q;
  const int64_t q_extent[4] = {rectangular_q ? p.batch : 1, rectangular_q ? p.max_seqlen_q : p.total_q, p.q_heads,
                               p.head_dim};
  CheckTensor("q", p.q, q_extent, FP_F16, false);

  int64_t k_extent[4] = {p.batch, p.max_seqlen_k, p.kv_heads, p.head_dim};
  if (p.block_table) {
    CheckRange("page_size", p.page_size, 1, 1 << 20);
    CheckRange("pages_per_seq", p.pages_per_seq, 0, kMaxTokens);
    CheckRange("page_count", p.page_count, 0, kMaxTokens);
    CheckRange("block_table_stride", p.block_table_stride, p.batch > 1 ? p.pages_per_seq : 0,
               std::numeric_limits<int64_t>::max() / kMaxTokens);
    if (!p.seqused_k && !p.cu_seqlens_k) {
      Refuse("seqused_k", "NULL",
             "given (or cu_seqlens_k) with a block_table: nothing else says how many keys there are");
    }
    k_extent[0] = p.page_count;
    k_extent[1] = p.page_size;
  } else if (p.cu_seqlens_k) {
    CheckRange("total_k", p.total_k, 0, kMaxTokens);
    k_extent[0] = 1;
    k_extent[1] = p.total_k;
  } else if (p.causal && !p.seqused_k && !p.cu_seqlens_q && p.max_seqlen_k < p.max_seqlen_q) {
    Refuse("max_seqlen_k", p.max_seqlen_k,
           "at least max_seqlen_q (" + std::to_string(p.max_seqlen_q) + ") with causal=1");
  }
  CheckTensor("k", p.k, k_extent, FP_E4M3, false);
  CheckTensor("v", p.v, k_extent, FP_E4M3, false);
  CheckScales("k_scale", p.k_scale, p.k_scale_stride, p.k.dtype, p);
  CheckScales("v_scale", p.v_scale, p.v_scale_stride, p.v.dtype, p);
  if (p.device == FP_CPU) CheckIndexArrays(p);
}

const Method* ValidatePolicyAlone(const Policy* policy) {
  if (!policy) Refuse("policy", "NULL", "a policy");
  const Method* method = FindMethod(policy->kind);
  if (!method) Refuse("policy.kind", policy->kind, "one of fp_policy_kind");
  CheckSize("policy", policy->struct_size, method->size);
  CheckFields(*method, *policy);
  return method;
}

void ValidatePolicy(const Policy* policy, const Problem& p) {
  const Method* method = ValidatePolicyAlone(policy);
  if (policy->share_heads && p.q_heads / p.kv_heads > kTileRows) {
    Refuse("share_heads", 1, "0 where more than " + std::to_string(kTileRows) + " query heads share a KV head");
  }
  if (!p.causal && method->selects) CheckWithoutCausal(*method, *policy);
  if (method->check_problem) method->check_problem(*policy, p);
}

void ValidateMask(const BlockMask* mask, const Problem& p, bool needs_bits) {
  if (!mask) Refuse("mask", "NULL", "a block mask");
  const BlockMask& m = *mask;
  CheckSize("mask", m.struct_size, sizeof(BlockMask));
  CheckRange("mask.block_size", m.block_size, 16, 1024);
  if (m.block_size % 16 != 0) Refuse("mask.block_size", m.block_size, "a multiple of 16");
  CheckFlag("mask.share_heads", m.share_heads);
  CheckRange("mask.mean_correction", m.mean_correction, FP_NO_CORRECTION, FP_SUMMARY_KEYS);
  if (m.share_heads && p.q_heads / p.kv_heads > kTileRows) {
    Refuse("mask.share_heads", 1, "0 where more than " + std::to_string(kTileRows) + " query heads share a KV head");
  }
  const Geometry g = Geometry::Of(p, m);
  const auto check = [](const char* name, int64_t is, int64_t must_be, const char* why) {
    if (is != must_be) Refuse(name, is, std::to_string(must_be) + ", " + why);
  };
  check("mask.heads", m.heads, g.mask_heads, m.share_heads ? "the problem's kv_heads" : "the problem's q_heads");
  check("mask.tile_tokens", m.tile_tokens, g.tile_tokens, "as fp_mask_describe says for this problem");
  check("mask.tile_rows", m.tile_rows, g.tile_rows, "as fp_mask_describe says for this problem");
  check("mask.words", m.words, g.words, "as fp_mask_describe says for this problem");
  CheckRange("mask.max_verticals", m.max_verticals, 0, kMaxTokens);
  CheckRange("mask.max_slashes", m.max_slashes, 0, kMaxTokens);
  if (HasVerticalSlash(m)) {
    if (m.share_heads) Refuse("mask.share_heads", 1, "0 where the mask has verticals or slashes");
    if (m.mean_correction)
      Refuse("mask.mean_correction", m.mean_correction, "0 where the mask has verticals or slashes");
    if (!p.causal) Refuse("causal", 0, "1 where the mask has verticals or slashes");
    if (needs_bits && !m.vertical_slash && p.batch > 0)
      Refuse("mask.vertical_slash", "NULL", "the address of the mask's verticals and slashes");
  }
  CheckKeyListRoom(m, p, needs_bits);
  if (!(m.skip >= 0 && m.skip < 1)) Refuse("mask.skip", m.skip, "at least 0 and below 1");
  if (m.skip > 0 && (HasVerticalSlash(m) || HasKeyLists(m))) {
    Refuse("mask.skip", m.skip, "0 where the mask has verticals, slashes or key lists");
  }
  if (needs_bits && !m.bits && m.heads * m.tile_rows * m.words > 0)
    Refuse("mask.bits", "NULL", "the address of the mask's words");
  if (reinterpret_cast<uintptr_t>(m.bits) % alignof(uint64_t) != 0) Refuse("mask.bits", m.bits, "aligned to 8 bytes");
}

void ValidateVerticalSlash(const BlockMask& m, const Problem& p) {
  if (!HasVerticalSlash(m) || p.device != FP_CPU) return;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < m.heads; ++h) {
      const int32_t* at = VerticalSlashAt(m, b, h);
      const std::string name = "mask.vertical_slash[" + std::to_string(b) + "][" + std::to_string(h) + "]";
      CheckRange(name + "[0]", at[0], 0, m.max_verticals);
      CheckRange(name + "[1]", at[1], 0, m.max_slashes);
      const auto check_list = [&](const char* what, const int32_t* list, int32_t count) {
        for (int32_t i = 0; i < count; ++i) {
          if (list[i] < 0 || (i > 0 && list[i] <= list[i - 1])) {
            Refuse(name + "'s " + what + " " + std::to_string(i), list[i], "at least 0, and above the one before it");
          }
        }
      };
      check_list("vertical", at + 2, at[0]);
      check_list("slash", at + 2 + m.max_verticals, at[1]);
    }
  }
}

void ValidateKeyLists(const BlockMask& m, const Problem& p) {
  if (!HasKeyLists(m) || p.device != FP_CPU) return;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    for (int h = 0; h < m.heads; ++h) {
      for (int64_t i = 0; i < Segments(m, s); ++i) {
        const int32_t* at = KeyListAt(m, s, h, i);
        const auto name = [&] {
          return "mask.key_lists[" + std::to_string(h) + "][" + std::to_string(SegmentBase(m, s) + i) + "]";
        };
        if (at[0] < 0 || at[0] > m.max_keys) CheckRange(name() + "[0]", at[0], 0, m.max_keys);
        if (at[1] < at[0])
          Refuse(name() + "[1]", at[1], "at least the keys in the list (" + std::to_string(at[0]) + ")");
        const int32_t* keys = at + 2;
        for (int32_t k = 0, least = 0; k < at[0]; least = keys[k++] + 1) {
          if (keys[k] >= least && keys[k] < s.k_len) continue;
          Refuse(name() + "'s key " + std::to_string(k), keys[k],
                 "above the one before it, and from 0 to " + std::to_string(s.k_len - 1));
        }
      }
    }
  }
}

void ValidateMaskOf(const BlockMask& mask, const Policy& policy, const Problem& p) {
  const auto check = [](const char* name, int32_t is, int32_t must_be) {
    if (is != must_be) Refuse(name, is, "the policy's (" + std::to_string(must_be) + ")");
  };
  check("mask.block_size", mask.block_size, policy.block_size);
  check("mask.share_heads", mask.share_heads, policy.share_heads);
  check("mask.mean_correction", mask.mean_correction, policy.mean_correction);
  const VerticalSlashRoom room = VerticalSlashRoomOf(p, policy);
  check("mask.max_verticals", mask.max_verticals, static_cast<int32_t>(room.verticals));
  check("mask.max_slashes", mask.max_slashes, static_cast<int32_t>(room.slashes));
  const KeyListRoom lists = KeyListRoomOf(p, policy);
  check("mask.max_keys", mask.max_keys, static_cast<int32_t>(lists.keys));
  if (lists.keys > 0) check("mask.segment_tiles", mask.segment_tiles, static_cast<int32_t>(lists.segment_tiles));
  if (mask.skip != SkipOf(policy)) Refuse("mask.skip", mask.skip, "the policy's");
}

void ValidateOutput(const Output* output, const Problem& p) {
  if (!output) Refuse("output", "NULL", "an output");
  CheckSize("output", output->struct_size, sizeof(Output));
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t extent[4] = {packed ? 1 : p.batch, packed ? p.total_q : p.max_seqlen_q, p.q_heads, p.head_dim};
  CheckTensor("out", output->out, extent, FP_F16, true);
  if (output->out.dtype != p.q.dtype) {
    Refuse("out.dtype", output->out.dtype, "q's dtype (" + std::to_string(p.q.dtype) + ")");
  }
  if (output->lse) {
    const int64_t lse_extent[3] = {packed ? 1 : p.batch, p.q_heads, packed ? p.total_q : p.max_seqlen_q};
    for (int axis = 0; axis < 3; ++axis) {
      if (lse_extent[axis] > 1 && output->lse_stride[axis] == 0) {
        Refuse("lse_stride[" + std::to_string(axis) + "]", 0, "other than 0: results would overwrite each other");
      }
      if (!Addressable(lse_extent[axis], output->lse_stride[axis])) {
        Refuse("lse_stride[" + std::to_string(axis) + "]", output->lse_stride[axis], "inside the address space");
      }
    }
    if (reinterpret_cast<uintptr_t>(output->lse) % alignof(float) != 0)
      Refuse("lse", output->lse, "aligned to 4 bytes");
  }
}

void ValidateExec(const Exec* exec) {
  if (!exec) return;
  CheckSize("exec", exec->struct_size, sizeof(Exec));
  CheckRange("exec.threads", exec->threads, 0, 4096);
  CheckRange("exec.math", exec->math, FP_MATH_INPUT, FP_MATH_8BIT);
}

void ValidateGuard(const fp_guard* guard, const Problem& p) {
  if (!guard) return;
  CheckSize("guard", guard->struct_size, sizeof(fp_guard));
  CheckRange("guard.mode", guard->mode, FP_GUARD_OBSERVE, FP_GUARD_STRICT);
  CheckRange("guard.rows", guard->rows, 0, kMaxTokens);
  if (!(guard->target > 0 && guard->target <= 1)) Refuse("guard.target", guard->target, "above 0 and at most 1");
  if (!(guard->risk > 0 && guard->risk < 1)) Refuse("guard.risk", guard->risk, "above 0 and below 1");
  for (int32_t h = 0; guard->levels && p.device == FP_CPU && h < p.q_heads; ++h) {
    if (guard->levels[h] >= 0 && guard->levels[h] <= 16) continue;
    Refuse("guard.levels[" + std::to_string(h) + "]", guard->levels[h], "from 0 to 16");
  }
}

void ValidateWorkspace(const void* workspace, size_t bytes, size_t needed) {
  if (bytes < needed) {
    Refuse("workspace_bytes", bytes, "at least " + std::to_string(needed) + ", as fp_*_workspace says for this call");
  }
  if (needed > 0 && !workspace) Refuse("workspace", "NULL", "the address of " + std::to_string(needed) + " bytes");
  if (reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlign != 0) {
    Refuse("workspace", workspace, "aligned to " + std::to_string(kWorkspaceAlign) + " bytes");
  }
}

} // namespace flashprefill
