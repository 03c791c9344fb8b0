// Large blocks of CPU memory, kept from one call for the next: outputs (output_memory.h) and a
// kernel's own (core/scratch.h).
//
// Blocks above malloc's largest threshold (32 MB) go back to the system when they are freed, and so
// does what is free at the end of malloc's heap, so a call would get fresh memory again and again,
// whose first touch the system fills with zeros: up to a fifth of a small layer's time. So a freed
// block waits for the next need of about its size: for ten seconds of weft's calls, and never more
// of them than an eighth of the machine's memory (WEFT_KEPT_OUTPUTS_MB says otherwise). Blocks of
// 2 MiB and more are whole huge pages, asked for as such; malloc serves what is below 256 KiB.
//
// Marking what waits as free to take (MADV_FREE) cost more than it was worth: the system interrupts
// every core for each huge page.
#pragma once

#include <cstddef>

namespace weft {

struct KeptBlock {
  void* memory = nullptr;
  size_t bytes = 0;
};

// Of `bytes` or up to a quarter more, aligned for vectors; null where malloc should serve: `bytes`
// are few, nothing may be kept, or the system has no more.
KeptBlock take_block(size_t bytes);
void give_back(KeptBlock block);
// Bytes that wait.
size_t kept_bytes();
// Gives them back to the system.
void release_kept();

}  // namespace weft
