// Policies from the bytes of an input, mostly sane and often not. Every field of every method is met by its row.
#ifndef FLASHPREFILL_TESTS_RANDOM_POLICY_H_
#define FLASHPREFILL_TESTS_RANDOM_POLICY_H_

#include <cmath>
#include <cstring>
#include <vector>

#include "fuzz.h"
#include "policy.h"

namespace flashprefill::test {

// A value inside the field's range, near its lower end: problems are small.
inline double SaneValue(Bytes& in, const fp_policy_field& f) {
  if (f.type == FP_FIELD_FLOAT) return f.least + std::min(f.most - f.least, 2.0) * in.Upto(20) / 20;
  double value = f.least;
  switch (in.Upto(3)) {
    case 0:
      value = f.initial;
      break;
    case 1:
      value = f.least * (1 << in.Upto(3)); // strides are powers of two
      break;
    case 2:
      value = f.least + in.Upto(3);
      break;
    case 3:
      value = f.least + in.Upto(40);
      break;
  }
  return std::min(std::max(value, f.least), f.most);
}

// A table for so many query heads, and its memory.
inline std::vector<int32_t> SaneTable(Bytes& in, const fp_policy_field& f, int q_heads) {
  std::vector<int32_t> cells(static_cast<size_t>(q_heads * f.columns));
  for (size_t i = 0; i < cells.size(); ++i) {
    if (f.type == FP_FIELD_FLOAT_TABLE) {
      const float value = in.Mostly(static_cast<float>(in.Upto(10)) / 10);
      std::memcpy(&cells[i], &value, sizeof value);
    } else {
      cells[i] = in.Mostly(i % f.columns == 0 ? in.Upto(2) : in.Upto(40)); // the first column is often a choice
    }
  }
  return cells;
}

struct RandomPolicy {
  AnyPolicy policy{FP_DENSE};
  std::vector<std::vector<int32_t>> tables;

  RandomPolicy(Bytes& in, int q_heads) {
    const std::vector<MethodName> methods = AllMethods();
    const int32_t kind = methods[in.Upto(static_cast<int>(methods.size()) - 1)].kind;
    policy = AnyPolicy(kind);
    fp_policy& common = policy.common;
    common.block_size = in.Mostly(16 * (1 + in.Upto(4)));
    common.sink_blocks = in.Mostly(in.Upto(2));
    common.window_blocks = in.Mostly(in.Upto(2));
    common.dense_tail_blocks = in.Mostly(in.Upto(1));
    common.share_heads = in.Mostly(HasField(kind, "share_heads") ? in.Upto(1) : 0);
    common.mean_correction = in.Mostly(in.Upto(2));
    int alternatives = 0;
    for (const fp_policy_field& f : FieldsOf(kind)) alternatives += (f.flags & FP_FIELD_ALTERNATIVE) != 0;
    int decides = alternatives > 0 ? in.Upto(alternatives - 1) : 0;
    for (const fp_policy_field& f : FieldsOf(kind)) {
      if (f.offset < sizeof(fp_policy)) continue;
      if (IsTable(f)) {
        AddTable(in, f, q_heads);
      } else if (f.flags & FP_FIELD_ALTERNATIVE) {
        SetRaw(in, f, decides-- == 0 ? SaneValue(in, f) : NAN);
      } else {
        SetRaw(in, f, SaneValue(in, f));
      }
    }
    common.struct_size = in.Mostly(common.struct_size);
    // Another method's pointers may stand where this struct has none, so only kinds that don't exist are tried.
    const auto other = in.Mostly(kind);
    fp_policy_field field;
    if (fp_policy_field_at(other, 0, &field) != FP_OK) common.kind = other;
  }

 private:
  void SetRaw(Bytes& in, const fp_policy_field& f, double value) {
    policy.Set(f, value);
    int32_t bits;
    std::memcpy(&bits, policy.bytes + f.offset, sizeof bits);
    bits = in.Mostly(bits);
    std::memcpy(policy.bytes + f.offset, &bits, sizeof bits);
  }

  void AddTable(Bytes& in, const fp_policy_field& f, int q_heads) {
    tables.push_back(SaneTable(in, f, q_heads));
    const int32_t rows = in.Mostly(in.OneIn(2) ? q_heads : 0); // any other number is refused before a row is read
    const void* address = in.OneIn(64) ? nullptr : tables.back().data();
    std::memcpy(policy.bytes + f.offset, &address, sizeof address);
    std::memcpy(policy.bytes + f.count_offset, &rows, sizeof rows);
  }
};

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_RANDOM_POLICY_H_
