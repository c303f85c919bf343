// Masks that the library makes for itself: their geometry, and their memory in a workspace.
#ifndef FLASHPREFILL_CORE_MASK_MEMORY_H_
#define FLASHPREFILL_CORE_MASK_MEMORY_H_

#include "core/backend.h"
#include "core/types.h"

namespace flashprefill {

// The mask that a policy makes for a problem, without memory.
BlockMask DescribeMask(const Problem& p, const Policy& policy);

// The same, with all its arrays taken from a workspace.
BlockMask MaskIn(Workspace& workspace, const Problem& p, const Policy& policy);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_MASK_MEMORY_H_
