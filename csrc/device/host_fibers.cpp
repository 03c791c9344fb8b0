// How fibers start and switch: see host_fibers.h.
//
// They start with makecontext and switch with the compiler's setjmp/longjmp (a few instructions, no
// system call); under AddressSanitizer they switch with swapcontext and tell it so. Stacks are
// spread over the cache's sets: the time of host execution is bound by switches.
#include "device/host_fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace weft::device::host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

class FiberPool {
 public:
  ~FiberPool() { clear(); }

  void ensure(int count) {
    while (static_cast<int>(fibers_.size()) < count) {
      auto fiber = std::make_unique<Fiber>();
      const size_t page = page_bytes();
      void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      // A kernel that overruns its stack stops there instead of writing into its neighbour's.
      mprotect(memory, page, PROT_NONE);
      fiber->stack = static_cast<unsigned char*>(memory) + page;
      // Stacks at equal offsets of a page would all compete for the same sets of the cache.
      fiber->stack_bytes = kStackBytes - fibers_.size() % 32 * 1088;
      fibers_.push_back(std::move(fiber));
    }
  }

  Fiber& operator[](int index) { return *fibers_[index]; }

  // After a fault the fibers' stacks hold half-run threads: drop them.
  void clear() {
    for (auto& fiber : fibers_) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
      munmap(fiber->stack - page_bytes(), page_bytes() + kStackBytes);
    }
    fibers_.clear();
  }

 private:
  static size_t page_bytes() {
    static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
};

thread_local FiberPool pool;

#if defined(__SANITIZE_ADDRESS__)

thread_local ucontext_t scheduler_context;
thread_local const void* scheduler_stack = nullptr;
thread_local size_t scheduler_stack_bytes = 0;

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  run_threads();
}

#else

thread_local void* scheduler_jump[5];

void fiber_main() { run_threads(); }

__attribute__((noinline)) void back_to_scheduler() { __builtin_longjmp(scheduler_jump, 1); }

#endif

void start(Fiber& next) {
  next.started = true;
  getcontext(&next.context);
  next.context.uc_stack.ss_sp = next.stack;
  next.context.uc_stack.ss_size = next.stack_bytes;
  next.context.uc_link = nullptr;
  makecontext(&next.context, fiber_main, 0);
}

}  // namespace

constinit thread_local Fiber* fiber = nullptr;

void ensure_fibers(int count) { pool.ensure(count); }
Fiber& pooled_fiber(int index) { return pool[index]; }
void drop_fibers() { pool.clear(); }

#if defined(__SANITIZE_ADDRESS__)

void resume(Fiber& next) {
  fiber = &next;
  if (!next.started) start(next);
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, next.stack, next.stack_bytes);
  swapcontext(&scheduler_context, &next.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void yield_to_scheduler() {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber->context, &scheduler_context);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
}

#else

// The compiler's own pair saves no more than frame, stack and place; it must not be inlined into
// one function, and the registers of both callers count as lost.
__attribute__((noinline)) void resume(Fiber& next) {
  fiber = &next;
  if (__builtin_setjmp(scheduler_jump) != 0) return;
  if (next.started) __builtin_longjmp(next.jump, 1);
  start(next);
  setcontext(&next.context);
}

__attribute__((noinline)) void yield_to_scheduler() {
  if (__builtin_setjmp(fiber->jump) == 0) back_to_scheduler();
}

#endif

}  // namespace weft::device::host
