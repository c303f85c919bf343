// Any policy, by value, for tests of the library, of its ABI and for fuzzing. Everything follows from the methods' rows
// and their text form, so that only a method's own test names its struct. Uses the C ABI alone.
#ifndef FLASHPREFILL_TESTS_POLICY_H_
#define FLASHPREFILL_TESTS_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace flashprefill::test {

struct AnyPolicy {
  union {
    fp_policy common;
    alignas(8) std::byte bytes[256] = {}; // room for every method's struct
  };
  std::shared_ptr<const void> tables; // what a parsed policy's pointers lead to

  explicit AnyPolicy(int32_t kind); // with its published defaults

  const fp_policy* get() const { return &common; }

  // The method's own struct.
  template <typename Struct>
  Struct& As() {
    if (common.struct_size != sizeof(Struct)) throw std::logic_error("a policy is taken for one of another method");
    return reinterpret_cast<Struct&>(common);
  }

  // A field that is no table.
  double Get(const fp_policy_field& field) const;
  void Set(const fp_policy_field& field, double value);
};

// The policy of a text such as "sketch(mass=0.6)", at this block size; 0: at the text's, or the method's default.
AnyPolicy Parse(const std::string& text, int block_size = 0);

// The policy as text.
std::string Name(const AnyPolicy& policy);

// ---------------------------------------------------------------- methods and fields

struct MethodName {
  std::string name; // in text
  int32_t kind;
};

std::vector<MethodName> AllMethods();
std::vector<fp_policy_field> FieldsOf(int32_t kind);            // the method's own, then those of fp_policy that it has
fp_policy_field FieldOf(int32_t kind, const std::string& name); // throws for a name that is not there
bool HasField(int32_t kind, const std::string& name);

inline bool IsTable(const fp_policy_field& field) {
  return field.type == FP_FIELD_INT_TABLE || field.type == FP_FIELD_FLOAT_TABLE;
}

// ---------------------------------------------------------------- makers

AnyPolicy Dense(int block_size = 128);
AnyPolicy Streaming(int block_size, int sink, int window, int tail);
AnyPolicy WithForced(AnyPolicy policy, int sink, int window, int tail);
AnyPolicy Shared(AnyPolicy policy);
AnyPolicy Corrected(AnyPolicy policy, int32_t how = FP_BLOCK_MEANS);

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_POLICY_H_
