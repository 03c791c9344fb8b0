// What a plan of blocks that wait for each other must know of the device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace weft {

struct GridFacts {
  int64_t multiprocessors = 0;
  int64_t shared_bytes = 0;        // of a multiprocessor
  int64_t block_shared_bytes = 0;  // that one block may ask for

  // Blocks that run at once: those that may wait for each other. Registers are left to the launch,
  // which is refused where they do not do.
  constexpr int64_t resident_blocks(int threads, int64_t shared) const {
    constexpr int64_t kThreads = 2048, kBlocks = 32, kReserved = 1024;
    const int64_t by_shared = shared_bytes / (shared + kReserved);
    return multiprocessors * std::min({kThreads / threads, by_shared, kBlocks});
  }
};

// Of sm_90, with that many multiprocessors.
constexpr GridFacts grid_facts_of(int64_t multiprocessors) {
  return {multiprocessors, 228 * 1024, 227 * 1024};
}

}  // namespace weft
