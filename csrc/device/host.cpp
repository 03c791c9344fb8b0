// Host execution of the device vocabulary: fibers, barriers, warp exchanges, traffic.
//
// A launch runs its grid three times, with threads and blocks in ascending, descending and seeded
// random order, from the same initial memory, and compares all outputs bit by bit: a kernel that
// relies on an order it did not ask for (a missing barrier) differs between the runs. Fibers start
// with makecontext and switch with the compiler's setjmp/longjmp (a few instructions, no system
// call); under AddressSanitizer they switch with swapcontext and tell it so.
//
// A fault that shows only after the fact (a broken guard band, an order that changed the bits) is
// hunted: the block or grid runs once more, serially, and is looked at after every step of every
// thread, so that the message can name the thread. Blocks that may wait for each other (a
// cooperative grid, a cluster) run together on one OS thread: each goes on until all its threads
// wait for other blocks. Time is bound by switches, so what every switch touches is kept small:
// states and counters in the block, stacks spread over the cache's sets.
#include "device/device.h"
#include "device/guarded.h"

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace weft::device {
namespace {

using host::Allocation;
using host::guards_intact;
using host::kGuardByte;
using host::kGuardBytes;
using host::poison;
using host::Site;

constexpr int kWarp = 32;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = grid_facts_of(0).block_shared_bytes;
constexpr int kMaxCluster = 8;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

std::string site_name(const Site& site) {
  std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

// "0-30, 32"
std::string thread_list(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(threads[i]);
    if (j > i) text += "-" + std::to_string(threads[j]);
    i = j + 1;
  }
  return text;
}

// ---- one launch ----------------------------------------------------------------------------

enum class State : uint8_t {
  ready,
  at_barrier,
  at_exchange,
  at_grid_barrier,
  at_cluster_barrier,
  parked,
  done
};

const char* wait_of(State state) {
  switch (state) {
    case State::at_barrier:
      return "wait at the barrier of ";
    case State::at_exchange:
      return "wait in the warp exchange of ";
    case State::at_grid_barrier:
      return "wait at the grid barrier of ";
    case State::at_cluster_barrier:
      return "wait at the cluster barrier of ";
    case State::parked:
    case State::ready:
    case State::done:
      break;
  }
  return "";
}

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

struct Warp {
  alignas(16) unsigned char slots[2][kWarp][host::kSlotBytes];
  int arrived = 0;
};

struct SharedPiece {
  int64_t offset;
  int64_t bytes;
  int64_t taken;  // with what its alignment may cost
};

using Image = std::vector<std::vector<unsigned char>>;

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
  std::unique_ptr<host::BlockState> state;
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

// The fibers of one OS thread, reused from block to block.
class FiberPool {
 public:
  ~FiberPool() { clear(); }

  std::vector<std::unique_ptr<Fiber>>& get(int count) {
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
    return fibers_;
  }

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
thread_local std::vector<std::unique_ptr<BlockRun>> reused_blocks;
thread_local std::vector<BlockRun*> together;  // the blocks that run on this OS thread
thread_local BlockRun* block = nullptr;
thread_local Fiber* fiber = nullptr;

// ---- switching -----------------------------------------------------------------------------

void fiber_main();

#if defined(__SANITIZE_ADDRESS__)

thread_local ucontext_t scheduler_context;
thread_local const void* scheduler_stack = nullptr;
thread_local size_t scheduler_stack_bytes = 0;

void resume(Fiber& next) {
  fiber = &next;
  if (!next.started) {
    next.started = true;
    getcontext(&next.context);
    next.context.uc_stack.ss_sp = next.stack;
    next.context.uc_stack.ss_size = next.stack_bytes;
    next.context.uc_link = nullptr;
    makecontext(&next.context, fiber_main, 0);
  }
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

void enter_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}

#else

thread_local void* scheduler_jump[5];

// The compiler's own pair saves no more than frame, stack and place; it must not be inlined into
// one function, and the registers of both callers count as lost.
__attribute__((noinline)) void resume(Fiber& next) {
  fiber = &next;
  if (__builtin_setjmp(scheduler_jump) != 0) return;
  if (next.started) __builtin_longjmp(next.jump, 1);
  next.started = true;
  getcontext(&next.context);
  next.context.uc_stack.ss_sp = next.stack;
  next.context.uc_stack.ss_size = next.stack_bytes;
  next.context.uc_link = nullptr;
  makecontext(&next.context, fiber_main, 0);
  setcontext(&next.context);
}

__attribute__((noinline)) void back_to_scheduler() { __builtin_longjmp(scheduler_jump, 1); }

__attribute__((noinline)) void yield_to_scheduler() {
  if (__builtin_setjmp(fiber->jump) == 0) back_to_scheduler();
}

void enter_fiber() {}

#endif

KernelFault block_fault(const std::string& what) {
  return KernelFault("kernel " + std::string(block->launch->config.kernel) + ", block " +
                     std::to_string(block->index) + what);
}

[[noreturn]] void fault(const std::string& what) {
  throw block_fault(", thread " + std::to_string(fiber->index) + ": " + what);
}

void fiber_main() {
  enter_fiber();
  for (;;) {
    try {
      block->launch->thread_body();
      if (!fiber->copies.empty()) fault("finishes with asynchronous copies not waited for");
      if (block->state != nullptr) block->state->thread_done();
    } catch (...) {
      block->fault = std::current_exception();
    }
    block->states[fiber->index] = State::done;
    ++block->done;
    yield_to_scheduler();
  }
}

// ---- one block -----------------------------------------------------------------------------

Fiber& fiber_of(const BlockRun& run, int thread) { return *pool.get(0)[run.first_fiber + thread]; }
Fiber& fiber_of(int thread) { return fiber_of(*block, thread); }

// All threads of both blocks wait for other blocks, at one word.
bool meet(const BlockRun& a, const BlockRun& b) {
  const int threads = a.launch->config.threads;
  return a.abroad == threads && b.abroad == threads && a.states[0] == b.states[0] &&
         a.members == b.members && same_site(fiber_of(a, 0).site, fiber_of(b, 0).site);
}

KernelFault divergence() {
  std::map<std::string, std::vector<int>> groups;
  for (size_t i = 0; i < block->states.size(); ++i) {
    const State state = block->states[i];
    const auto thread = static_cast<int>(i);
    const Fiber& f = fiber_of(thread);
    const std::string wait = state == State::parked ? f.parked : wait_of(state);
    groups[state == State::ready  ? "are on their way"
           : state == State::done ? "finished"
                                  : wait + site_name(f.site)]
        .push_back(thread);
  }
  std::string text;
  for (const auto& [where, members] : groups)
    text += (text.empty() ? "threads " : "; threads ") + thread_list(members) + " " + where;
  return block_fault(": not all threads reach the same word: " + text);
}

// Throws unless all threads wait for the same word.
void check_one_word() {
  for (size_t i = 1; i < block->states.size(); ++i)
    if (block->states[i] != block->states[0] ||
        !same_site(fiber_of(static_cast<int>(i)).site, fiber_of(0).site))
      throw divergence();
}

void release_barrier() {
  check_one_word();
  std::fill(block->states.begin(), block->states.end(), State::ready);
  block->at_barrier = 0;
}

// What lies outside its bounds: "" if nothing does.
std::string shared_damage() {
  for (size_t i = 0; i < block->pieces.size(); ++i) {
    const SharedPiece& piece = block->pieces[i];
    if (!guards_intact(block->shared.data() + piece.offset, piece.bytes))
      return "outside piece " + std::to_string(i) + " of shared memory (" +
             std::to_string(piece.bytes) + " bytes)";
  }
  return "";
}

std::string output_damage(const LaunchRun& launch) {
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    const Allocation& output = launch.outputs[i];
    if (!guards_intact(output.payload, output.bytes))
      return "outside output " + std::to_string(i) + " (" + std::to_string(output.bytes) +
             " bytes)";
  }
  return "";
}

void look_for_damage(const LaunchRun& launch) {
  std::string damage = shared_damage();
  if (damage.empty()) damage = output_damage(launch);
  if (!damage.empty()) fault("stores " + damage);
}

void start_block(LaunchRun& launch, BlockRun& run, int64_t index, int first_fiber) {
  const int threads = launch.config.threads;
  run.start(launch, index, first_fiber);
  auto& fibers = pool.get(first_fiber + threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *fibers[first_fiber + i];
    f.index = i;
    f.pieces_taken = 0;
    f.exchanges = 0;
    f.copy_group = 0;
    f.copies.clear();
  }
}

// Runs `block` until all its threads are done or wait for other blocks. False: they already did.
bool advance(const std::vector<int>& order) {
  BlockRun& run = *block;
  LaunchRun& launch = *run.launch;
  const int threads = launch.config.threads;
  bool moved = false;
  while (run.done < threads && run.abroad < threads) {
    bool progressed = false;
    for (int i : order) {
      if (run.states[i] != State::ready) continue;
      progressed = true;
      resume(fiber_of(i));
      if (run.fault) std::rethrow_exception(run.fault);
      if (launch.look_after_each_step) look_for_damage(launch);
    }
    if (run.at_barrier == threads) {
      release_barrier();
    } else if (!progressed) {
      throw divergence();
    }
    moved = true;
  }
  if (!moved) return false;
  if (run.done == threads && run.state != nullptr) {
    const std::string left = run.state->block_done();
    if (!left.empty()) throw block_fault(": " + left);
  }
  if (run.abroad == threads) check_one_word();
  // The memory of a block ends with it, also for the blocks of its cluster.
  if (run.done == threads && launch.config.cluster > 1)
    for (const SharedPiece& piece : run.pieces)
      poison(run.shared.data() + piece.offset, piece.bytes);
  return true;
}

// Lets the sets of blocks go on whose members have all arrived.
void release_sets() {
  std::map<int64_t, std::vector<BlockRun*>> sets;
  for (BlockRun* run : together)
    if (run->abroad > 0) sets[run->index / run->members].push_back(run);
  for (const auto& [number, set] : sets) {
    const BlockRun& first = *set[0];
    if (static_cast<int64_t>(set.size()) < first.members) continue;
    if (!std::all_of(set.begin(), set.end(), [&](BlockRun* run) { return meet(*run, first); }))
      continue;
    for (BlockRun* run : set) {
      std::fill(run->states.begin(), run->states.end(), State::ready);
      run->abroad = 0;
    }
  }
}

// Blocks wait for one that does not come.
KernelFault absence() {
  std::vector<BlockRun*> blocks = together;
  std::sort(blocks.begin(), blocks.end(),
            [](const BlockRun* a, const BlockRun* b) { return a->index < b->index; });
  const auto place = [](const BlockRun& run) {
    if (run.abroad == 0) return std::string("finished");
    const std::string wait = wait_of(run.states[0]);
    return "waits" + wait.substr(4) + site_name(fiber_of(run, 0).site);  // 4: of "wait"
  };
  const BlockRun& waits = **std::find_if(blocks.begin(), blocks.end(),
                                         [](const BlockRun* run) { return run->abroad > 0; });
  for (BlockRun* run : blocks) {
    if (run->index / waits.members != waits.index / waits.members || meet(*run, waits)) continue;
    block = run;
    return block_fault(": not all blocks reach the same word: it " + place(*run) + "; block " +
                       std::to_string(waits.index) + " " + place(waits));
  }
  block = const_cast<BlockRun*>(&waits);
  return block_fault(": waits in a set of blocks that others do not share");
}

using ThreadOrder = std::function<std::vector<int>(int64_t block)>;

void run_to_end(LaunchRun& launch, const std::vector<int64_t>& indices,
                const ThreadOrder& order_of) {
  while (reused_blocks.size() < indices.size())
    reused_blocks.push_back(std::make_unique<BlockRun>());
  together.clear();
  std::vector<std::vector<int>> orders;
  for (size_t i = 0; i < indices.size(); ++i) {
    together.push_back(reused_blocks[i].get());
    start_block(launch, *together[i], indices[i], static_cast<int>(i) * launch.config.threads);
    orders.push_back(order_of(indices[i]));
  }
  const auto done = [&](const BlockRun* run) { return run->done == launch.config.threads; };
  while (!std::all_of(together.begin(), together.end(), done)) {
    // From the first again: a set that may go on does so ahead of blocks that do not wait for it.
    bool moved = false;
    for (size_t i = 0; i < together.size() && !moved; ++i) {
      block = together[i];
      moved = advance(orders[i]);
    }
    if (!moved) throw absence();
    release_sets();
  }
}

// Damage around the shared memory of any block; `block` is then that one.
std::string damage_of_blocks() {
  for (BlockRun* run : together) {
    block = run;
    const std::string damage = shared_damage();
    if (!damage.empty()) return damage;
  }
  return "";
}

// Runs blocks that may wait for each other.
void run_together(LaunchRun& launch, const std::vector<int64_t>& indices,
                  const ThreadOrder& order_of) {
  try {
    run_to_end(launch, indices, order_of);
    const std::string damage = damage_of_blocks();
    if (!damage.empty()) {
      LaunchRun hunt{launch.config, launch.outputs, launch.thread_body};
      hunt.look_after_each_step = true;
      run_to_end(hunt, indices, order_of);
      throw block_fault(": a thread stores " + damage);
    }
  } catch (...) {
    block = nullptr;
    pool.clear();
    throw;
  }
  block = nullptr;
  if (launch.report == nullptr) return;
  static std::mutex report_mutex;
  for (BlockRun* run : together) {
    const int64_t loaded = run->loads.distinct_sectors();
    const int64_t stored = run->stores.distinct_sectors();
    std::lock_guard lock(report_mutex);
    launch.report->bytes_loaded += run->loads.bytes;
    launch.report->bytes_stored += run->stores.bytes;
    launch.report->sectors_loaded += loaded;
    launch.report->sectors_stored += stored;
  }
}

// ---- the grid, three times -----------------------------------------------------------------

enum class Order { ascending, descending, random };

template <class Integer>
std::vector<Integer> ordered(int64_t count, Order order, uint64_t seed) {
  std::vector<Integer> indices(count);
  std::iota(indices.begin(), indices.end(), Integer{0});
  if (order == Order::descending) std::reverse(indices.begin(), indices.end());
  if (order == Order::random)
    for (int64_t i = count - 1; i > 0; --i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      std::swap(indices[i], indices[(seed >> 33) % static_cast<uint64_t>(i + 1)]);
    }
  return indices;
}

// libgomp's threads do not survive a fork, and a team in the child would wait for them for ever.
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

// Of several faults the one that the order meets first is thrown, so a message never changes.
void run_blocks(LaunchRun& launch, Order order, bool serially) {
  const int64_t blocks = launch.config.blocks;
  const int64_t size = launch.config.cooperative ? blocks : launch.config.cluster;
  const auto groups = ordered<int64_t>(blocks / size, order, 20);
  const auto within = ordered<int64_t>(size, order, 20);
  const auto count = static_cast<int64_t>(groups.size());
  const auto in_order = ordered<int>(launch.config.threads, order, 20);
  const ThreadOrder order_of = [&](int64_t block) {
    const auto seed = static_cast<uint64_t>(block);
    return order == Order::random ? ordered<int>(launch.config.threads, order, seed) : in_order;
  };
  int64_t first_fault = count;
  std::exception_ptr fault;
  std::mutex fault_mutex;
#pragma omp parallel for schedule(dynamic) if (count > 1 && !serially)
  for (int64_t i = 0; i < count; ++i) {
    {
      std::lock_guard lock(fault_mutex);
      if (i > first_fault) continue;
    }
    try {
      std::vector<int64_t> indices = within;
      for (int64_t& index : indices) index += groups[i] * size;
      run_together(launch, indices, order_of);
    } catch (...) {
      std::lock_guard lock(fault_mutex);
      if (i < first_fault) {
        first_fault = i;
        fault = std::current_exception();
      }
    }
  }
  if (fault) std::rethrow_exception(fault);
}

void run_grid(LaunchRun& launch, Order order, const Image& before) {
  run_blocks(launch, order, in_forked_child);
  const std::string damage = output_damage(launch);
  if (damage.empty()) return;
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    const Allocation& output = launch.outputs[i];
    host::restore_guards(output.payload, output.bytes);
    std::copy(before[i].begin(), before[i].end(), output.payload);
  }
  LaunchRun hunt{launch.config, launch.outputs, launch.thread_body};
  hunt.look_after_each_step = true;
  run_blocks(hunt, order, true);
  throw KernelFault("kernel " + std::string(launch.config.kernel) + ": a thread stores " + damage);
}

std::mutex reports_mutex;
std::vector<LaunchReport> reports;

std::atomic<int> multiprocessors{kHostMultiprocessors};

void check_launch(const Launch& config) {
  const auto refuse = [&](const std::string& what) {
    throw KernelFault("kernel " + std::string(config.kernel) + ": " + what);
  };
  if (config.threads <= 0 || config.threads > kMaxThreads || config.threads % kWarp != 0)
    refuse(std::to_string(config.threads) +
           " threads a block; expected a multiple of 32, at most 1024");
  if (config.blocks < 0 || config.blocks > std::numeric_limits<int>::max())
    refuse(std::to_string(config.blocks) + " blocks; a grid has at most 2^31 - 1");
  if (config.shared_bytes > kMaxSharedBytes)
    refuse(std::to_string(config.shared_bytes) + " bytes of shared memory; a block has at most " +
           std::to_string(kMaxSharedBytes));
  if (config.cluster < 1 || config.cluster > kMaxCluster || config.blocks % config.cluster != 0)
    refuse("clusters of " + std::to_string(config.cluster) + " in a grid of " +
           std::to_string(config.blocks) + " blocks; expected a divisor of it, at most 8");
  const int64_t resident = grid_facts().resident_blocks(config.threads, config.shared_bytes);
  if (config.cooperative && config.blocks > resident)
    refuse(std::to_string(config.blocks) + " blocks that wait for each other; the device runs " +
           std::to_string(resident) + " of them at once");
}

}  // namespace

GridFacts grid_facts() { return grid_facts_of(multiprocessors); }
void set_multiprocessors(int count) { multiprocessors = count; }

void clear_launch_reports() {
  std::lock_guard lock(reports_mutex);
  reports.clear();
}

std::vector<LaunchReport> launch_reports() {
  std::lock_guard lock(reports_mutex);
  return reports;
}

namespace host {

int thread_index() { return fiber->index; }
int block_size() { return block->launch->config.threads; }
int64_t block_index() { return block->index; }
int64_t grid_size() { return block->launch->config.blocks; }

void begin_shared() { fiber->pieces_taken = 0; }

void* take_shared(int64_t bytes, int64_t alignment) {
  const size_t ordinal = fiber->pieces_taken++;
  if (ordinal < block->pieces.size()) {
    if (block->pieces[ordinal].bytes != bytes)
      fault("takes " + std::to_string(bytes) +
            " bytes of shared memory where another thread took " +
            std::to_string(block->pieces[ordinal].bytes));
    return block->shared.data() + block->pieces[ordinal].offset;
  }
  int64_t taken = bytes + alignment - 16;  // the block's memory begins at a multiple of 16
  for (const SharedPiece& piece : block->pieces) taken += piece.taken;
  if (taken > block->launch->config.shared_bytes)
    fault("takes " + std::to_string(taken) + " bytes of shared memory, the launch gave " +
          std::to_string(block->launch->config.shared_bytes));
  const int64_t begin = static_cast<int64_t>(block->shared.size());
  const auto base = reinterpret_cast<int64_t>(block->shared.data());
  const int64_t aligned =
      (base + begin + kGuardBytes + alignment - 1) / alignment * alignment - base;
  const int64_t end = aligned + bytes + kGuardBytes;
  if (end > static_cast<int64_t>(block->shared.capacity())) fault("takes too many shared pieces");
  block->shared.resize(end, kGuardByte);  // within capacity: earlier pieces stay where they are
  block->pieces.push_back({aligned, bytes, (bytes + 15) / 16 * 16 + alignment - 16});
  poison(block->shared.data() + aligned, bytes);
  return block->shared.data() + aligned;
}

void barrier(const Site& site) {
  fiber->site = site;
  block->states[fiber->index] = State::at_barrier;
  ++block->at_barrier;
  yield_to_scheduler();
}

namespace {

void wait_abroad(State state, int64_t members, const Site& site) {
  fiber->site = site;
  block->states[fiber->index] = state;
  ++block->abroad;
  block->members = members;
  yield_to_scheduler();
}

}  // namespace

void grid_barrier(int64_t members, const Site& site) {
  const Launch& config = block->launch->config;
  if (!config.cooperative) fault("meets a grid barrier in a launch that is not cooperative");
  if (members < 1 || config.blocks % members != 0)
    fault("meets in a set of " + std::to_string(members) + " blocks of " +
          std::to_string(config.blocks));
  wait_abroad(State::at_grid_barrier, members, site);
}

void cluster_barrier(const Site& site) {
  wait_abroad(State::at_cluster_barrier, block->launch->config.cluster, site);
}

int cluster_size() { return block->launch->config.cluster; }

void* at_rank(void* shared, int rank) {
  const int64_t size = cluster_size();
  if (rank < 0 || rank >= size)
    fault("looks for block " + std::to_string(rank) + " of a cluster of " + std::to_string(size));
  const int64_t index = block->index / size * size + rank;
  const BlockRun& other = **std::find_if(together.begin(), together.end(),
                                         [&](const BlockRun* run) { return run->index == index; });
  const int64_t offset = static_cast<unsigned char*>(shared) - block->shared.data();
  const auto holds = [&](const SharedPiece& piece) {
    return offset >= piece.offset && offset < piece.offset + piece.bytes;
  };
  if (!std::any_of(other.pieces.begin(), other.pieces.end(), holds))
    fault("looks into shared memory that block " + std::to_string(index) + " has not taken");
  return const_cast<unsigned char*>(other.shared.data()) + offset;
}

void fault(const std::string& what) { device::fault(what); }

bool same_site(const Site& a, const Site& b) { return device::same_site(a, b); }

std::unique_ptr<BlockState>& block_state() { return block->state; }

void park(const char* where, const Site& site) {
  fiber->site = site;
  fiber->parked = where;
  block->states[fiber->index] = State::parked;
  yield_to_scheduler();
}

void unpark(int thread) { block->states[thread] = State::ready; }

void exchange(const void* value, int bytes, const Site& site) {
  const int first = fiber->index / kWarp * kWarp;
  Warp& warp = block->warps[fiber->index / kWarp];
  // Two generations of slots: a lane can be one exchange ahead of another, never two.
  memcpy(warp.slots[fiber->exchanges++ & 1][fiber->index % kWarp], value, bytes);
  block->states[fiber->index] = State::at_exchange;
  fiber->site = site;
  if (++warp.arrived < kWarp) return yield_to_scheduler();
  warp.arrived = 0;
  for (int i = first; i < first + kWarp; ++i)
    if (!same_site(fiber_of(i).site, site)) throw divergence();
  std::fill_n(block->states.begin() + first, kWarp, State::ready);
}

const void* slot(int lane) {
  const Warp& warp = block->warps[fiber->index / kWarp];
  return warp.slots[(fiber->exchanges - 1) & 1][lane];
}

void misaligned(const void* address, size_t bytes, const char* word) {
  const auto offset = reinterpret_cast<uintptr_t>(address) % bytes;
  fault(std::string(word) + " that needs an address aligned to " + std::to_string(bytes) +
        " bytes meets one that is off by " + std::to_string(offset));
}

void count_load(const void* address, int bytes) {
  if (block->launch->report != nullptr) block->loads.add(address, bytes);
}

void count_store(const void* address, int bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  LaunchRun& launch = *block->launch;
  const bool inside =
      std::any_of(launch.outputs.begin(), launch.outputs.end(), [&](const Allocation& output) {
        return begin >= output.payload && begin + bytes <= output.payload + output.bytes;
      });
  if (!inside) fault("stores " + std::to_string(bytes) + " bytes outside the launch's outputs");
  if (launch.report != nullptr) block->stores.add(address, bytes);
  if (launch.watched >= begin && launch.watched < begin + bytes) {
    launch.watched_block = block->index;
    launch.watched_thread = fiber->index;
  }
}

void check_shared(const void* shared, int bytes, const char* verb, const char* way) {
  const int64_t offset = static_cast<const unsigned char*>(shared) - block->shared.data();
  const bool inside =
      std::any_of(block->pieces.begin(), block->pieces.end(), [&](const SharedPiece& piece) {
        return offset >= piece.offset && offset + bytes <= piece.offset + piece.bytes;
      });
  if (!inside)
    fault(std::string(verb) + " " + std::to_string(bytes) + " bytes " + way +
          " outside shared memory");
}

void cp_async(void* shared, const void* global, int bytes) {
  check_alignment(shared, bytes, "cp_async to shared memory");
  check_shared(shared, bytes, "copies", "to");
  if (global != nullptr) {
    check_alignment(global, bytes, "cp_async from global memory");
    count_load(global, bytes);
  }
  poison(shared, bytes);
  fiber->copies.push_back({shared, global, bytes, fiber->copy_group});
}

void cp_async_commit() { ++fiber->copy_group; }

void cp_async_wait(int pending) {
  auto& copies = fiber->copies;
  const auto landed = [&](const Copy& copy) { return copy.group < fiber->copy_group - pending; };
  for (const Copy& copy : copies) {
    if (!landed(copy)) continue;
    if (copy.global == nullptr)
      memset(copy.shared, 0, copy.bytes);
    else
      memcpy(copy.shared, copy.global, copy.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), landed), copies.end());
}

void run(const Launch& config, const std::vector<void*>& outputs,
         const std::function<void()>& thread_body) {
  const std::string kernel = config.kernel;
  check_launch(config);
  std::vector<Allocation> memory;
  for (void* output : outputs) memory.push_back(allocation_of(output, config.kernel));
  const auto image = [&] {
    Image bytes;
    for (const Allocation& m : memory) bytes.emplace_back(m.payload, m.payload + m.bytes);
    return bytes;
  };

  const auto restore = [&](const Image& bytes) {
    for (size_t i = 0; i < memory.size(); ++i)
      std::copy(bytes[i].begin(), bytes[i].end(), memory[i].payload);
  };

  const Image before = image();
  LaunchReport report{kernel, config.blocks, config.threads, config.shared_bytes};
  Image first;
  for (Order order : {Order::ascending, Order::descending, Order::random}) {
    LaunchRun launch{config, memory, thread_body};
    if (order == Order::ascending) {
      launch.report = &report;
    } else {
      restore(before);
    }
    run_grid(launch, order, before);
    if (order == Order::ascending) {
      first = image();
      continue;
    }
    for (size_t i = 0; i < memory.size(); ++i) {
      const unsigned char* now = memory[i].payload;
      if (std::equal(first[i].begin(), first[i].end(), now)) continue;
      const int64_t byte =
          std::mismatch(first[i].begin(), first[i].end(), now).first - first[i].begin();
      restore(before);
      LaunchRun hunt{config, memory, thread_body};
      hunt.watched = now + byte;
      run_blocks(hunt, Order::ascending, true);
      const std::string writer = hunt.watched_block < 0
                                     ? ""
                                     : ", block " + std::to_string(hunt.watched_block) +
                                           ", thread " + std::to_string(hunt.watched_thread);
      throw KernelFault("kernel " + kernel + writer + ": output " + std::to_string(i) +
                        " depends on the order in which threads run (first at byte " +
                        std::to_string(byte) + " of " + std::to_string(first[i].size()) +
                        "); is a barrier missing?");
    }
  }
  std::lock_guard lock(reports_mutex);
  reports.push_back(std::move(report));
}

}  // namespace host
}  // namespace weft::device
