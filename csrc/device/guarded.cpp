// Guarded memory of host execution: see guarded.h; allocate_guarded and release_guarded are
// host.h's.
#include "device/guarded.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "device/device.h"

namespace weft::device {
namespace {

std::mutex allocations_mutex;
std::map<const unsigned char*, int64_t> allocations;  // payload -> bytes

}  // namespace

namespace host {

// 0x7FF4 repeated is NaN as float64, float32, bfloat16 and float16, and a huge integer.
void poison(void* memory, int64_t bytes) {
  auto* out = static_cast<unsigned char*>(memory);
  for (int64_t i = 0; i < bytes; ++i) out[i] = i % 2 ? 0x7F : 0xF4;
}

bool guards_intact(const unsigned char* payload, int64_t bytes) {
  static const auto expected = [] {
    std::array<unsigned char, kGuardBytes> band;
    band.fill(kGuardByte);
    return band;
  }();
  return memcmp(payload - kGuardBytes, expected.data(), kGuardBytes) == 0 &&
         memcmp(payload + bytes, expected.data(), kGuardBytes) == 0;
}

void restore_guards(unsigned char* payload, int64_t bytes) {
  std::fill_n(payload - kGuardBytes, kGuardBytes, kGuardByte);
  std::fill_n(payload + bytes, kGuardBytes, kGuardByte);
}

Allocation allocation_of(const void* memory, const char* kernel) {
  const auto* address = static_cast<const unsigned char*>(memory);
  std::lock_guard lock(allocations_mutex);
  auto next = allocations.upper_bound(address);
  if (next != allocations.begin()) {
    const auto& [payload, bytes] = *std::prev(next);
    if (address < payload + std::max<int64_t>(bytes, 1))
      return {const_cast<unsigned char*>(payload), bytes};
  }
  throw KernelFault(std::string("kernel ") + kernel +
                    " is given an output that weft did not allocate");
}

}  // namespace host

using host::kGuardByte;
using host::kGuardBytes;

void* allocate_guarded(int64_t bytes) {
  const int64_t padded = (bytes + 63) / 64 * 64;
  auto* base = static_cast<unsigned char*>(std::aligned_alloc(64, padded + 2 * kGuardBytes));
  if (base == nullptr) throw std::bad_alloc();
  std::fill(base, base + padded + 2 * kGuardBytes, kGuardByte);
  unsigned char* payload = base + kGuardBytes;
  host::poison(payload, bytes);
  std::lock_guard lock(allocations_mutex);
  allocations.emplace(payload, bytes);
  return payload;
}

void release_guarded(void* memory) {
  auto* payload = static_cast<unsigned char*>(memory);
  {
    std::lock_guard lock(allocations_mutex);
    allocations.erase(payload);
  }
  std::free(payload - kGuardBytes);
}

}  // namespace weft::device
