// Dense: everything is kept. Its masks say so, and its attention may be without causal. `skip` is BLASST's threshold
// (arXiv 2512.12087), which attend goes by.
#include "core/method.h"

#include <cstddef>

namespace flashprefill::methods::dense {
namespace {

constexpr Field kFields[] = {SkipField(offsetof(fp_dense, skip))};

float Skip(const Policy& policy) { return reinterpret_cast<const fp_dense&>(policy).skip; }

} // namespace

extern const Method kMethod = {
    .kind = FP_DENSE, .name = "dense", .size = sizeof(fp_dense), .selects = false, .fields = kFields, .skip = Skip};

} // namespace flashprefill::methods::dense
