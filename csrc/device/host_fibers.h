// CUDA threads as fibers of an OS thread: their stacks, and how execution passes between them.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <vector>

#include "device/device.h"

namespace weft::device::host {

struct Copy {
  void* shared;
  const void* global;  // null: zeros
  int bytes;
  int group;
};

struct Fiber {
  int index = 0;
  bool started = false;
  size_t pieces_taken = 0;
  unsigned exchanges = 0;
  int copy_group = 0;
  Site site;
  const char* parked = "";  // in words, followed by the site
  std::vector<Copy> copies;

  void* jump[5] = {};  // for __builtin_setjmp
  ucontext_t context{};
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
};

// The fiber that runs on this OS thread.
extern constinit thread_local Fiber* fiber;

// The fibers of this OS thread, reused from block to block: at least `count` of them; one of them;
// none, after a fault that left their stacks half-run.
void ensure_fibers(int count);
Fiber& pooled_fiber(int index);
void drop_fibers();

// From the scheduler into a fiber, and back.
void resume(Fiber& next);
void yield_to_scheduler();

// What a fiber runs for ever: the threads that it is given, one after another (host_blocks.cpp).
[[noreturn]] void run_threads();

}  // namespace weft::device::host
