#include "core/parallel.h"

#include <thread>

namespace weft {

void Meeting::wait(int64_t size) {
  constexpr int64_t kLooks = 1 << 12;
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

}  // namespace weft
