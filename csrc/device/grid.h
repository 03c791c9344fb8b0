// A barrier of blocks: of the whole grid, or of sets of neighbouring blocks of it.
//
//   GridBarrier meet(flags, members);  blocks 0 .. members - 1 are a set, the next ones another
//   meet.wait()                        all threads of all blocks of the set
//
// What a block stored before the barrier, the others load after it. The launch is `cooperative`,
// unless each block is a set of its own: the hardware then runs all blocks at once or refuses.
// `flags` [grid_size()] is zeroed before the launch by `clear_flags`. A block raises its own flag
// and watches those of its set, so that a barrier costs one store and one load's way through the L2
// cache, and no atomics.
//
// Why that is enough, by PTX's memory model: `barrier` orders what all threads of the block stored
// before the flag's release, which is of the gpu's scope and cumulative; the acquire that sees the
// flag, and the `barrier` after it, order it before what any thread loads (an acquire drops the
// lines of the L1 cache). No wait can be endless for want of room: the hardware refuses a
// cooperative launch whose blocks do not all fit at once, and plans ask for one block of 256
// threads a multiprocessor at most, which any number of registers admits.
#pragma once

#include "device/device.h"

#include <cstring>

namespace weft::device {

#if defined(__CUDACC__)

class GridBarrier {
 public:
  WEFT_DEVICE GridBarrier(uint32_t* flags, int64_t members)
      : flags_(flags + block_index() / members * members),
        own_(flags + block_index()),
        members_(static_cast<int>(members)) {}

  WEFT_DEVICE void wait() {
    ++round_;
    barrier();
    if (members_ == 1) return;
    if (thread_index() == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(own_), "r"(round_) : "memory");
    const long long start = clock64();
    for (int i = thread_index(); i < members_; i += block_size()) {
      uint32_t seen;
      do {
        stop_if_stuck(start);
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(flags_ + i)
                     : "memory");
      } while (seen < round_);
    }
    barrier();
  }

 private:
  uint32_t* flags_;
  uint32_t* own_;
  int members_;
  uint32_t round_ = 0;
};

inline void clear_flags(uint32_t* flags, int64_t count, const Launch& launch) {
  check(cudaMemsetAsync(flags, 0, static_cast<size_t>(count) * sizeof(uint32_t),
                        static_cast<cudaStream_t>(launch.stream)),
        launch.kernel);
}

// Of the current device; all zero where blocks cannot wait for each other.
inline GridFacts grid_facts() {
  int device = 0;
  check(cudaGetDevice(&device), "grid_facts");
  const auto fact = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "grid_facts");
    return static_cast<int64_t>(value);
  };
  if (fact(cudaDevAttrCooperativeLaunch) == 0) return {};
  return {fact(cudaDevAttrMultiProcessorCount), fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          fact(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

#else

class GridBarrier {
 public:
  GridBarrier(uint32_t*, int64_t members) : members_(members) {}
  void wait(host::Site site = host::Site::current()) {
    if (members_ == 1) return host::barrier(site);
    host::grid_barrier(members_, site);
  }

 private:
  int64_t members_;
};

inline void clear_flags(uint32_t* flags, int64_t count, const Launch&) {
  memset(flags, 0, static_cast<size_t>(count) * sizeof(uint32_t));
}

#endif

}  // namespace weft::device
