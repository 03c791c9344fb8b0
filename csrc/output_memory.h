// The memory of CPU outputs: large ones are kept from one call for the next (core/kept_memory.h).
#pragma once

#include <c10/core/Allocator.h>

namespace weft {

// For at::detail::empty_generic and the like.
c10::Allocator* output_memory();

}  // namespace weft
