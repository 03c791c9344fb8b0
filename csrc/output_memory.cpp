#include "output_memory.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// A sanitizer watches malloc's blocks, each by itself.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define WEFT_KEEPS_OUTPUTS 1
#else
#define WEFT_KEEPS_OUTPUTS 0
#endif

namespace weft {
namespace {

#if WEFT_KEEPS_OUTPUTS
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastBytes = kHugePage;  // below, malloc keeps most of its blocks by itself

constexpr time_t kMostSeconds = 10;

struct Block {
  char* memory;
  size_t bytes;
  time_t kept_at;
};

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

// Null where the system has no more.
char* map_huge_pages(size_t bytes) {
  const size_t mapped = bytes + kHugePage;
  void* const at =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(at);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return begin + before;
}

class OutputMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes >= kLeastBytes)
      if (Block* const block = take((bytes + kHugePage - 1) / kHugePage * kHugePage)) {
        c10::profiledCPUMemoryReporter().New(block->memory, bytes);
        return {block->memory, block, release, c10::Device(c10::kCPU)};
      }
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  size_t kept_bytes() {
    const std::lock_guard lock(mutex_);
    return kept_bytes_;
  }
  void drop_kept() {
    const std::lock_guard lock(mutex_);
    drop_oldest(0, now());
  }
  std::mutex& mutex() { return mutex_; }

 private:
  static void release(void* context);

  // The latest freed block of the size or up to a quarter above it, or a new one.
  Block* take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = kept_.rend();
      for (auto block = kept_.rbegin(); block != kept_.rend(); ++block)
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
            (best == kept_.rend() || block->bytes < best->bytes))
          best = block;
      if (best != kept_.rend()) {
        auto* const block = new Block(*best);
        kept_bytes_ -= block->bytes;
        kept_.erase(std::next(best).base());
        return block;
      }
    }
    char* memory = map_huge_pages(bytes);
    if (memory == nullptr) {
      drop_kept();
      memory = map_huge_pages(bytes);
    }
    return memory == nullptr ? nullptr : new Block{memory, bytes, 0};
  }

  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    block.kept_at = now();
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    drop_oldest(most_kept_bytes_, block.kept_at - kMostSeconds);
  }

  // All above `most` bytes, and those kept before `since`.
  void drop_oldest(size_t most, time_t since) {
    auto block = kept_.begin();
    for (; block != kept_.end() && (kept_bytes_ > most || block->kept_at < since); ++block) {
      munmap(block->memory, block->bytes);
      kept_bytes_ -= block->bytes;
    }
    kept_.erase(kept_.begin(), block);
  }

  const size_t most_kept_bytes_ = weft::most_kept_bytes();
  std::mutex mutex_;
  std::vector<Block> kept_;  // the latest at the end
  size_t kept_bytes_ = 0;
};

// Never destroyed: tensors may be freed after any static object.
OutputMemory& the_memory() {
  static OutputMemory& memory = *[] {
    // A child of a fork must not find the lock held by a thread that it has not.
    pthread_atfork([] { the_memory().mutex().lock(); }, [] { the_memory().mutex().unlock(); },
                   [] { the_memory().mutex().unlock(); });
    return new OutputMemory;
  }();
  return memory;
}

void OutputMemory::release(void* context) {
  auto* const block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->memory);
  the_memory().keep(*block);
  delete block;
}
#endif

}  // namespace

#if WEFT_KEEPS_OUTPUTS
c10::Allocator* output_memory() { return &the_memory(); }
size_t kept_output_bytes() { return the_memory().kept_bytes(); }
void release_kept_outputs() { the_memory().drop_kept(); }
#else
c10::Allocator* output_memory() { return c10::GetCPUAllocator(); }
size_t kept_output_bytes() { return 0; }
void release_kept_outputs() {}
#endif

}  // namespace weft
