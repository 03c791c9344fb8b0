// Memory that kernels executed on the host write: poisoned at first, between guard bands.
#pragma once

#include <cstdint>

namespace weft::device::host {

constexpr int64_t kGuardBytes = 256;
constexpr unsigned char kGuardByte = 0xFB;

void poison(void* memory, int64_t bytes);
// Two guard bands are intact around [payload, payload + bytes).
bool guards_intact(const unsigned char* payload, int64_t bytes);
void restore_guards(unsigned char* payload, int64_t bytes);

struct Allocation {
  unsigned char* payload;
  int64_t bytes;
};

// The allocation of `allocate_guarded` that `memory` lies in; a fault of `kernel` if there is none.
Allocation allocation_of(const void* memory, const char* kernel);

}  // namespace weft::device::host
