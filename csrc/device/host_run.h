// What host execution keeps of a launch and of the blocks that run: between host.cpp (what a word
// does), host_blocks.cpp (how threads and blocks take turns) and host_grid.cpp (the three runs).
#pragma once

#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "device/guarded.h"
#include "device/host_fibers.h"

namespace weft::device::host {

constexpr int kWarp = 32;

enum class State : uint8_t {
  ready,
  at_barrier,
  at_exchange,
  at_grid_barrier,
  at_cluster_barrier,
  parked,
  done
};

struct Warp {
  alignas(16) unsigned char slots[2][kWarp][host::kSlotBytes];
  int arrived = 0;
};

struct SharedPiece {
  int64_t offset;
  int64_t bytes;
  int64_t taken;  // with what its alignment may cost
};

struct LaunchRun {
  const Launch& config;
  const std::vector<Allocation>& outputs;
  const std::function<void()>& thread_body;
  LaunchReport* report = nullptr;  // where traffic is counted, if it is

  // When a fault is hunted: look for damage after every step, or note who stores to `watched`.
  bool look_after_each_step = false;
  const unsigned char* watched = nullptr;
  int64_t watched_block = -1;
  int watched_thread = -1;
};

// What a block moved. A sector that was met lately is not noted again.
struct Traffic {
  int64_t bytes = 0;
  std::vector<uintptr_t> sectors;
  std::array<uintptr_t, 256> recent;

  void clear() {
    bytes = 0;
    sectors.clear();
    recent.fill(0);
  }

  void add(const void* address, int count) {
    bytes += count;
    const auto first = reinterpret_cast<uintptr_t>(address) / 32;
    const auto last = (reinterpret_cast<uintptr_t>(address) + count - 1) / 32;
    for (auto sector = first; sector <= last; ++sector) {
      uintptr_t& place = recent[sector % recent.size()];
      if (place == sector) continue;
      place = sector;
      sectors.push_back(sector);
    }
  }

  int64_t distinct_sectors() {
    std::sort(sectors.begin(), sectors.end());
    return std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  }
};

// A block while it runs; reused, so that its buffers are allocated once per OS thread.
struct BlockRun {
  LaunchRun* launch = nullptr;
  int64_t index = 0;
  int first_fiber = 0;  // of its threads, in the pool
  std::vector<State> states;
  int done = 0;
  int at_barrier = 0;
  int abroad = 0;       // threads that wait for other blocks ...
  int64_t members = 0;  // ... so many of which are a set
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<SharedPiece> pieces;
  Traffic loads;
  Traffic stores;
  std::unique_ptr<BlockState> state;
  std::exception_ptr fault;

  void start(LaunchRun& of, int64_t block, int fiber) {
    const int threads = of.config.threads;
    launch = &of;
    index = block;
    first_fiber = fiber;
    states.assign(threads, State::ready);
    done = 0;
    at_barrier = 0;
    abroad = 0;
    members = 0;
    warps.resize(threads / kWarp);
    for (Warp& warp : warps) warp.arrived = 0;
    shared.clear();
    // Every piece needs two guard bands; a kernel takes a handful of pieces, few far aligned.
    shared.reserve(of.config.shared_bytes + 16 * (2 * kGuardBytes + 16) + 8 * 1024);
    pieces.clear();
    state.reset();
    if (of.report != nullptr) {
      loads.clear();
      stores.clear();
    }
    fault = nullptr;
  }
};

// The block that runs on this OS thread, and those that take turns with it.
extern constinit thread_local BlockRun* block;
const std::vector<BlockRun*>& blocks_together();

inline Fiber& fiber_of(const BlockRun& run, int thread) {
  return pooled_fiber(run.first_fiber + thread);
}

// A fault of `block`: "kernel <name>, block <index><what>"; one of threads that wait for different
// words.
KernelFault block_fault(const std::string& what);
KernelFault divergence();

// Which output is no longer intact around its bounds, in words: "" if all are.
std::string output_damage(const LaunchRun& launch);

// Runs blocks that may wait for each other; each one's threads take turns in the order given.
using ThreadOrder = std::function<std::vector<int>(int64_t block)>;
void run_together(LaunchRun& launch, const std::vector<int64_t>& indices,
                  const ThreadOrder& order_of);

}  // namespace weft::device::host
