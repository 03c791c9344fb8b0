// Where threads of a team meet after each step.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace weft {

// The threads look at one number until it changes: a step takes microseconds, and OpenMP's own
// barrier asks the system to wake whoever sleeps, each time. Where cores are fewer than threads,
// one that has waited long lets others run.
class Meeting {
 public:
  // Returns once `size` threads have called it; what they wrote before is seen after.
  void wait(int64_t size) {
    if (size <= 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
      if (looks > kLooks) {
        std::this_thread::yield();
        continue;
      }
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int64_t kLooks = 1 << 12;
  alignas(64) std::atomic<int64_t> arrived_ = 0;
  alignas(64) std::atomic<int64_t> round_ = 0;
};

}  // namespace weft
