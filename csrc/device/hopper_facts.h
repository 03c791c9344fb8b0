// What a plan must know of Hopper's copies of windows.
#pragma once

#include <cstdint>

namespace weft::device {

// The corners of a window's walk lie in [-limit, limit - 1], a place at most 2 limit - 1 from the
// base; by the rank of the tensor.
constexpr int64_t window_box_limit(int rank) {
  return rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
}
inline constexpr int kMostWindowStride = 8;

inline constexpr int kBoxRowBytes = 128;    // of every box, in shared memory
inline constexpr int kBoxAlignment = 1024;  // after which the swizzle begins anew
inline constexpr int kWarpgroup = 128;      // threads

}  // namespace weft::device
