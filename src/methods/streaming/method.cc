// Streaming (StreamingLLM, arXiv 2309.17453): the forced blocks and nothing else.
#include "core/method.h"

namespace flashprefill::methods::streaming {

extern const Method kMethod = {.kind = FP_STREAMING, .name = "streaming", .size = sizeof(fp_streaming)};

} // namespace flashprefill::methods::streaming
