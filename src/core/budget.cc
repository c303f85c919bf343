// A policy with a larger budget, for the heads that a guard found to keep too little. What the budget is, each method's
// fields say themselves (FP_FIELD_KEEPS_FROM and its neighbours), so nothing here names a method.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "core/method.h"

namespace flashprefill {
namespace {

constexpr int32_t kIsBudget = FP_FIELD_KEEPS_FROM | FP_FIELD_KEEPS_MASS | FP_FIELD_KEEPS_SHARE;

double Enlarged(int32_t flags, double value, double factor) {
  if (std::isnan(value)) return value; // another field decides
  if (flags & FP_FIELD_KEEPS_FROM) return value / factor;
  if (flags & FP_FIELD_KEEPS_MASS) return 1 - (1 - value) / factor;
  if (flags & FP_FIELD_KEEPS_SHARE) return std::min(1.0, value * std::sqrt(factor));
  return value;
}

template <typename Body>
void ForFields(const Policy& policy, const Body& body) {
  const Method& method = MethodOf(policy);
  for (int32_t i = 0; const Field* field = FieldAt(method, i); ++i) body(*field);
}

template <typename T>
T& At(Policy& policy, size_t offset) {
  return *reinterpret_cast<T*>(reinterpret_cast<std::byte*>(&policy) + offset);
}

// A table's rows of the heads, copied to `to`.
void CopyRows(const Field& field, int64_t first, int64_t heads, double factor, Policy& policy, int32_t* to) {
  const int64_t words = heads * field.columns;
  std::memcpy(to, At<const int32_t*>(policy, field.offset) + first * field.columns, words * sizeof(int32_t));
  if (field.type == FP_FIELD_FLOAT_TABLE && field.flags & kIsBudget) {
    float* values = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < words; ++i) values[i] = static_cast<float>(Enlarged(field.flags, values[i], factor));
  }
  At<const int32_t*>(policy, field.offset) = to;
  At<int32_t>(policy, field.count_offset) = static_cast<int32_t>(heads);
}

} // namespace

int64_t TableWords(const Policy& policy, int64_t heads) {
  int64_t words = 0;
  ForFields(policy, [&](const Field& field) {
    if (IsTable(field) && TableRows(policy, field) > 0) words += heads * field.columns;
  });
  return words;
}

bool WithBudget(const Policy& policy, int64_t first, int64_t heads, double factor, Policy& to, int32_t* tables) {
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&policy), policy.struct_size);
  bool has_budget = false;
  ForFields(policy, [&](const Field& field) {
    if (IsTable(field)) {
      if (TableRows(policy, field) == 0) return;
      CopyRows(field, first, heads, factor, to, tables);
      tables += heads * field.columns;
    } else if (field.flags & kIsBudget) {
      SetField(to, field, Enlarged(field.flags, FieldValue(policy, field), factor));
    } else {
      return;
    }
    has_budget |= (field.flags & kIsBudget) != 0;
  });
  return has_budget;
}

} // namespace flashprefill
