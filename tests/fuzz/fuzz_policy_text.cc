// Fuzzes the text form of policies. A text that is accepted must fill exactly the memory that was asked for, print as a
// text that reads back as the same policy, and select on a small problem; one that is refused must write nothing.
#include <vector>

#include "fuzz.h"
#include "policy.h"
#include "text_mutator.h"

namespace flashprefill::test {

std::string FreshText(std::mt19937& random) { return RandomPolicyText(random); }
std::vector<std::string> TargetWords() { return PolicyWords(); }

namespace {

constexpr int kRows = 40, kKeys = 70, kDim = 8;

int QueryHeads(const AnyPolicy& policy) {
  int32_t rows = 0;
  for (const fp_policy_field& field : FieldsOf(policy.common.kind)) {
    if (IsTable(field)) std::memcpy(&rows, policy.bytes + field.count_offset, sizeof rows);
  }
  return rows > 0 && rows < 8 ? rows : 2;
}

// Runs the policy; refusals are those that need a problem.
void Prefill(const AnyPolicy& policy) {
  const int heads = QueryHeads(policy);
  std::vector<float> q(static_cast<size_t>(kRows * heads * kDim), 0.5f), k(static_cast<size_t>(kKeys * kDim)), out(q);
  for (size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(i % 13) / 13;
  const auto tensor = [](std::vector<float>& data, int64_t tokens, int64_t tensor_heads) {
    fp_tensor t{};
    t.data = data.data();
    t.dtype = FP_F32;
    t.stride[0] = tokens * tensor_heads * kDim;
    t.stride[1] = tensor_heads * kDim;
    t.stride[2] = kDim;
    t.stride[3] = 1;
    return t;
  };
  fp_problem p;
  fp_problem_init(&p);
  p.batch = p.kv_heads = 1;
  p.q_heads = heads;
  p.head_dim = kDim;
  p.softmax_scale = 0.3f;
  p.total_q = p.max_seqlen_q = kRows;
  p.max_seqlen_k = kKeys;
  p.q = tensor(q, kRows, heads);
  p.k = p.v = tensor(k, kKeys, 1);
  fp_output output;
  fp_output_init(&output);
  output.out = tensor(out, kRows, heads);
  fp_exec exec;
  fp_exec_init(&exec);
  exec.threads = 1;
  size_t bytes = 0;
  if (fp_prefill_workspace(&p, policy.get(), &exec, &bytes) != FP_OK) return;
  const Buffer workspace(bytes);
  if (fp_prefill(&p, policy.get(), &exec, nullptr, &output, workspace.data, bytes) != FP_OK) Finding("prefill refuses");
  ++accepted;
}

void Run(const std::string& text) {
  size_t needed = 0;
  std::vector<uint64_t> memory(64, 0x3c3c3c3c3c3c3c3cu);
  if (fp_policy_parse(text.c_str(), nullptr, 0, &needed) != FP_OK) {
    if (fp_last_error()[0] == 0) Finding("a refusal without a message");
    if (fp_policy_parse(text.c_str(), memory.data(), memory.size() * 8, nullptr) == FP_OK)
      Finding("accepted with memory");
    for (const uint64_t word : memory) {
      if (word != 0x3c3c3c3c3c3c3c3cu) Finding("a refused text was written");
    }
    return;
  }
  const Buffer exact(needed), small(needed);
  if (fp_policy_parse(text.c_str(), exact.data, needed, nullptr) != FP_OK) Finding("refused with memory");
  if (fp_policy_parse(text.c_str(), small.data, needed - 1, nullptr) == FP_OK)
    Finding("accepted with too little memory");
  const AnyPolicy policy = Parse(text);
  const std::string printed = Name(policy);
  if (printed.empty() || Name(Parse(printed)) != printed) Finding("'" + printed + "' reads back as another policy");
  const AnyPolicy again = Parse(printed);
  for (const fp_policy_field& field : FieldsOf(policy.common.kind)) {
    if (IsTable(field)) continue;
    const double a = policy.Get(field), b = again.Get(field);
    if (a != b && (a == a || b == b))
      Finding(std::string(field.name) + " of '" + printed + "' reads back as another value");
  }
  Prefill(policy);
}

} // namespace
} // namespace flashprefill::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashprefill::test::Run(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
