// Policies by the C ABI's rows and text: see policy.h.
#include "policy.h"

#include <cstring>

namespace flashprefill::test {

AnyPolicy::AnyPolicy(int32_t kind) {
  if (fp_policy_init(kind, this, sizeof bytes) != FP_OK) throw std::runtime_error(fp_last_error());
}

double AnyPolicy::Get(const fp_policy_field& field) const {
  if (field.type == FP_FIELD_FLOAT) {
    float value;
    std::memcpy(&value, bytes + field.offset, sizeof value);
    return value;
  }
  int32_t value;
  std::memcpy(&value, bytes + field.offset, sizeof value);
  return value;
}

void AnyPolicy::Set(const fp_policy_field& field, double value) {
  if (field.type == FP_FIELD_FLOAT) {
    const auto number = static_cast<float>(value);
    std::memcpy(bytes + field.offset, &number, sizeof number);
  } else {
    const auto number = static_cast<int32_t>(value);
    std::memcpy(bytes + field.offset, &number, sizeof number);
  }
}

AnyPolicy Parse(const std::string& text, int block_size) {
  size_t size = 0;
  if (fp_policy_parse(text.c_str(), nullptr, 0, &size) != FP_OK) throw std::runtime_error(fp_last_error());
  const auto memory = std::make_shared<std::vector<uint64_t>>((size + 7) / 8);
  if (fp_policy_parse(text.c_str(), memory->data(), size, nullptr) != FP_OK) throw std::runtime_error(fp_last_error());
  const auto& parsed = *reinterpret_cast<const fp_policy*>(memory->data());
  AnyPolicy policy(parsed.kind);
  std::memcpy(policy.bytes, &parsed, parsed.struct_size);
  policy.tables = memory;
  if (block_size > 0) policy.common.block_size = block_size;
  if (Name(policy).empty()) throw std::runtime_error(fp_last_error());
  return policy;
}

std::string Name(const AnyPolicy& policy) {
  std::string text(fp_policy_print(policy.get(), nullptr, 0), ' ');
  fp_policy_print(policy.get(), text.data(), text.size() + 1);
  return text;
}

std::vector<MethodName> AllMethods() {
  std::vector<MethodName> methods;
  int32_t kind = 0;
  for (int32_t i = 0; const char* name = fp_policy_name(i, &kind); ++i) methods.push_back({name, kind});
  return methods;
}

std::vector<fp_policy_field> FieldsOf(int32_t kind) {
  std::vector<fp_policy_field> fields;
  fp_policy_field field;
  while (fp_policy_field_at(kind, static_cast<int32_t>(fields.size()), &field) == FP_OK) fields.push_back(field);
  return fields;
}

fp_policy_field FieldOf(int32_t kind, const std::string& name) {
  for (const fp_policy_field& field : FieldsOf(kind)) {
    if (name == field.name) return field;
  }
  throw std::logic_error("there is no field " + name);
}

bool HasField(int32_t kind, const std::string& name) {
  for (const fp_policy_field& field : FieldsOf(kind)) {
    if (name == field.name) return true;
  }
  return false;
}

AnyPolicy Dense(int block_size) { return Parse("dense", block_size); }

AnyPolicy Streaming(int block_size, int sink, int window, int tail) {
  return WithForced(Parse("streaming", block_size), sink, window, tail);
}

AnyPolicy WithForced(AnyPolicy policy, int sink, int window, int tail) {
  policy.common.sink_blocks = sink;
  policy.common.window_blocks = window;
  policy.common.dense_tail_blocks = tail;
  return policy;
}

AnyPolicy Shared(AnyPolicy policy) {
  policy.common.share_heads = 1;
  return policy;
}

AnyPolicy Corrected(AnyPolicy policy, int32_t how) {
  policy.common.mean_correction = how;
  return policy;
}

} // namespace flashprefill::test
