#include "core/kept_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <list>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// A sanitizer watches malloc's blocks, each by itself.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define WEFT_KEEPS_BLOCKS 1
#else
#define WEFT_KEEPS_BLOCKS 0
#endif

namespace weft {

#if WEFT_KEEPS_BLOCKS
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallStep = size_t{64} << 10;  // of the sizes of blocks below a huge page
constexpr size_t kLeastBytes = size_t{256} << 10;

constexpr time_t kMostSeconds = 10;

time_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return t.tv_sec;
}

// WEFT_KEPT_OUTPUTS_MB, by default an eighth of the machine's memory.
size_t most_kept_bytes() {
  if (const char* wanted = std::getenv("WEFT_KEPT_OUTPUTS_MB"))
    return static_cast<size_t>(std::max(0LL, std::atoll(wanted))) << 20;
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) /
         8;
}

// Null where the system has no more. From a huge page on the block is whole huge pages.
void* map_block(size_t bytes) {
  const size_t mapped = bytes < kHugePage ? bytes : bytes + kHugePage;
  void* const at =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  if (bytes < kHugePage) return at;
  char* const begin = static_cast<char*>(at);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return begin + before;
}

class KeptMemory {
 public:
  KeptBlock take(size_t wanted) {
    if (most_bytes_ == 0) return {};
    const size_t step = wanted < kHugePage ? kSmallStep : kHugePage;
    const size_t bytes = (wanted + step - 1) / step * step;
    {
      const std::lock_guard lock(mutex_);
      auto found = by_bytes_.lower_bound(bytes);
      if (found != by_bytes_.end() && found->first <= bytes + bytes / 4) {
        found = std::prev(by_bytes_.upper_bound(found->first));  // the latest of its size
        const KeptBlock block = found->second->block;
        drop(found->second);
        return block;
      }
    }
    void* memory = map_block(bytes);
    if (memory == nullptr) {
      drop_all();
      memory = map_block(bytes);
    }
    return memory == nullptr ? KeptBlock{} : KeptBlock{memory, bytes};
  }

  void keep(KeptBlock block) {
    const std::lock_guard lock(mutex_);
    const time_t since = now();
    waiting_.push_back({block, since, {}});
    waiting_.back().by_bytes = by_bytes_.emplace(block.bytes, std::prev(waiting_.end()));
    bytes_ += block.bytes;
    drop_oldest(most_bytes_, since - kMostSeconds);
  }

  void drop_all() {
    const std::lock_guard lock(mutex_);
    drop_oldest(0, now());
  }
  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }
  std::mutex& mutex() { return mutex_; }

 private:
  struct Waiting;
  using InOrder = std::list<Waiting>;
  using ByBytes = std::multimap<size_t, InOrder::iterator>;
  struct Waiting {
    KeptBlock block;
    time_t since;
    ByBytes::iterator by_bytes;
  };

  void drop(InOrder::iterator at) {
    bytes_ -= at->block.bytes;
    by_bytes_.erase(at->by_bytes);
    waiting_.erase(at);
  }

  // All above `most` bytes, and those that wait since before `since`.
  void drop_oldest(size_t most, time_t since) {
    while (!waiting_.empty() && (bytes_ > most || waiting_.front().since < since)) {
      munmap(waiting_.front().block.memory, waiting_.front().block.bytes);
      drop(waiting_.begin());
    }
  }

  const size_t most_bytes_ = most_kept_bytes();
  std::mutex mutex_;
  InOrder waiting_;  // the latest at the end
  ByBytes by_bytes_;
  size_t bytes_ = 0;
};

// Never destroyed: tensors may be freed after any static object.
KeptMemory& the_memory() {
  static KeptMemory& memory = *[] {
    // A child of a fork must not find the lock held by a thread that it has not.
    pthread_atfork([] { the_memory().mutex().lock(); }, [] { the_memory().mutex().unlock(); },
                   [] { the_memory().mutex().unlock(); });
    return new KeptMemory;
  }();
  return memory;
}

}  // namespace

KeptBlock take_block(size_t bytes) {
  return bytes < kLeastBytes ? KeptBlock{} : the_memory().take(bytes);
}
void give_back(KeptBlock block) { the_memory().keep(block); }
size_t kept_bytes() { return the_memory().bytes(); }
void release_kept() { the_memory().drop_all(); }
#else
KeptBlock take_block(size_t) { return {}; }
void give_back(KeptBlock) {}
size_t kept_bytes() { return 0; }
void release_kept() {}
#endif

}  // namespace weft
