// Memory of large CPU outputs, kept from one call for the next.
//
// Blocks above malloc's largest threshold (32 MB) go back to the system when they are freed, and so
// does what is free at the end of malloc's heap, so an output would be fresh memory again and
// again, whose first touch the system fills with zeros: up to a fifth of a small layer's time. So a
// freed block waits for the next output of about its size: for ten seconds of weft's calls, and
// never more of them than an eighth of the machine's memory (WEFT_KEPT_OUTPUTS_MB says otherwise).
// Blocks are whole huge pages, asked for as such; malloc serves what is small.
//
// Marking what waits as free to take (MADV_FREE) cost more than it was worth: the system interrupts
// every core for each huge page.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace weft {

// For at::detail::empty_generic and the like.
c10::Allocator* output_memory();
// Bytes that wait for the next output.
size_t kept_output_bytes();
// Gives them back to the system.
void release_kept_outputs();

}  // namespace weft
