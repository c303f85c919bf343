// Dense: everything is kept. Its masks say so, and its attention may be without causal.
#include "core/method.h"

namespace flashprefill::methods::dense {

extern const Method kMethod = {.kind = FP_DENSE, .name = "dense", .size = sizeof(fp_dense), .selects = false};

} // namespace flashprefill::methods::dense
