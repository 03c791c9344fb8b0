// Host execution of the device vocabulary: fibers, barriers, warp exchanges, guards, traffic.
//
// A launch runs its grid three times, with threads and blocks in ascending, descending and seeded
// random order, from the same initial memory, and compares all outputs bit by bit: a kernel that
// relies on an order it did not ask for (a missing barrier) differs between the runs. Fibers start
// with makecontext and switch with _setjmp/_longjmp (no system call); under AddressSanitizer they
// switch with swapcontext and tell it so.
#undef _FORTIFY_SOURCE  // its longjmp check knows one stack only
#include "device/device.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace weft::device {
namespace {

using host::Site;

constexpr int kWarp = 32;
constexpr int64_t kGuardBytes = 256;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = 227 * 1024;  // what a block of sm_90 may ask for
constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kGuardByte = 0xFB;

// 0x7FF4 repeated is NaN as float64, float32, bfloat16 and float16, and a huge integer.
void poison(void* memory, int64_t bytes) {
  auto* out = static_cast<unsigned char*>(memory);
  for (int64_t i = 0; i < bytes; ++i) out[i] = i % 2 ? 0x7F : 0xF4;
}

bool guard_intact(const unsigned char* guard) {
  return std::all_of(guard, guard + kGuardBytes, [](unsigned char b) { return b == kGuardByte; });
}

std::string site_name(const Site& site) {
  std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
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

// ---- guarded memory ------------------------------------------------------------------------

struct Allocation {
  unsigned char* payload;
  int64_t bytes;
};

std::mutex allocations_mutex;
std::map<const unsigned char*, int64_t> allocations;  // payload -> bytes

Allocation allocation_of(const void* memory, const char* kernel) {
  const auto* address = static_cast<const unsigned char*>(memory);
  std::lock_guard lock(allocations_mutex);
  auto next = allocations.upper_bound(address);
  if (next != allocations.begin()) {
    const auto& [payload, bytes] = *std::prev(next);
    if (address < payload + std::max<int64_t>(bytes, 1))
      return {const_cast<unsigned char*>(payload), bytes};
  }
  throw KernelFault(std::string("kernel ") + kernel +
                    " is given an output that weft did not allocate");
}

// ---- one launch ----------------------------------------------------------------------------

enum class State { ready, at_barrier, at_exchange, done };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  int group;
};

struct BlockRun;

struct Fiber {
  int index = 0;
  State state = State::ready;
  Site site;
  int pieces_taken = 0;
  unsigned exchanges = 0;
  int copy_group = 0;
  std::vector<Copy> copies;

  bool started = false;
  ucontext_t context{};
  jmp_buf jump{};
  void* stack = nullptr;
};

struct Warp {
  unsigned char slots[2][kWarp][16];
  int arrived = 0;
};

struct SharedPiece {
  int64_t offset;
  int64_t bytes;
};

struct LaunchRun {
  const Launch& config;
  const std::vector<Allocation>& outputs;
  const std::function<void()>& thread_body;
  bool count_traffic;
  LaunchReport& report;
  std::mutex report_mutex;
};

struct BlockRun {
  LaunchRun* launch = nullptr;
  int64_t index = 0;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<SharedPiece> pieces;
  std::vector<uint64_t> sectors_loaded;
  std::vector<uint64_t> sectors_stored;
  int64_t bytes_loaded = 0;
  int64_t bytes_stored = 0;
  std::exception_ptr fault;
};

// The fibers of one OS thread, reused from block to block.
class FiberPool {
 public:
  ~FiberPool() { clear(); }

  std::vector<std::unique_ptr<Fiber>>& get(int count) {
    while (static_cast<int>(fibers_.size()) < count) {
      auto fiber = std::make_unique<Fiber>();
      fiber->index = static_cast<int>(fibers_.size());
      fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber->stack == MAP_FAILED) throw std::bad_alloc();
      fibers_.push_back(std::move(fiber));
    }
    return fibers_;
  }

  // After a fault the fibers' stacks hold half-run threads: drop them.
  void clear() {
    for (auto& fiber : fibers_) munmap(fiber->stack, kStackBytes);
    fibers_.clear();
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

thread_local FiberPool pool;
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
    next.context.uc_stack.ss_size = kStackBytes;
    next.context.uc_link = nullptr;
    makecontext(&next.context, fiber_main, 0);
  }
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, next.stack, kStackBytes);
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

thread_local jmp_buf scheduler_jump;

__attribute__((noinline)) void resume(Fiber& next) {
  fiber = &next;
  if (_setjmp(scheduler_jump) != 0) return;
  if (next.started) _longjmp(next.jump, 1);
  next.started = true;
  getcontext(&next.context);
  next.context.uc_stack.ss_sp = next.stack;
  next.context.uc_stack.ss_size = kStackBytes;
  next.context.uc_link = nullptr;
  makecontext(&next.context, fiber_main, 0);
  setcontext(&next.context);
}

__attribute__((noinline)) void yield_to_scheduler() {
  if (_setjmp(fiber->jump) == 0) _longjmp(scheduler_jump, 1);
}

void enter_fiber() {}

#endif

[[noreturn]] void fault(const std::string& what) {
  throw KernelFault("kernel " + std::string(block->launch->config.kernel) + ", block " +
                    std::to_string(block->index) + ", thread " + std::to_string(fiber->index) +
                    ": " + what);
}

void fiber_main() {
  enter_fiber();
  for (;;) {
    try {
      block->launch->thread_body();
      if (!fiber->copies.empty()) fault("finishes with asynchronous copies not waited for");
    } catch (...) {
      block->fault = std::current_exception();
    }
    fiber->state = State::done;
    yield_to_scheduler();
  }
}

// ---- one block -----------------------------------------------------------------------------

std::string diagnose(const std::vector<std::unique_ptr<Fiber>>& fibers, int threads) {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = *fibers[i];
    const std::string where = f.state == State::done ? std::string("finished")
                              : f.state == State::at_barrier
                                  ? "wait at the barrier of " + site_name(f.site)
                                  : "wait in the warp exchange of " + site_name(f.site);
    groups[where].push_back(i);
  }
  std::string text;
  for (const auto& [where, members] : groups)
    text += (text.empty() ? "threads " : "; threads ") + thread_list(members) + " " + where;
  return "kernel " + std::string(block->launch->config.kernel) + ", block " +
         std::to_string(block->index) + ": not all threads reach the same word: " + text;
}

void release_barrier(const std::vector<std::unique_ptr<Fiber>>& fibers, int threads) {
  for (int i = 0; i < threads; ++i)
    if (!same_site(fibers[i]->site, fibers[0]->site)) throw KernelFault(diagnose(fibers, threads));
  for (int i = 0; i < threads; ++i) fibers[i]->state = State::ready;
}

void check_shared_guards() {
  for (size_t i = 0; i < block->pieces.size(); ++i) {
    const unsigned char* piece = block->shared.data() + block->pieces[i].offset;
    if (guard_intact(piece - kGuardBytes) && guard_intact(piece + block->pieces[i].bytes)) continue;
    throw KernelFault("kernel " + std::string(block->launch->config.kernel) + ", block " +
                      std::to_string(block->index) + ": a thread stored outside piece " +
                      std::to_string(i) + " of shared memory (" +
                      std::to_string(block->pieces[i].bytes) + " bytes)");
  }
}

int64_t distinct(std::vector<uint64_t>& sectors) {
  std::sort(sectors.begin(), sectors.end());
  return std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

void run_block(LaunchRun& launch, int64_t index, const std::vector<int>& order) {
  const int threads = launch.config.threads;
  auto& fibers = pool.get(threads);
  BlockRun run;
  run.launch = &launch;
  run.index = index;
  run.warps.resize(threads / kWarp);
  // Every piece needs two guard bands; a kernel takes a handful of pieces.
  run.shared.reserve(launch.config.shared_bytes + 16 * (2 * kGuardBytes + 16));
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *fibers[i];
    f.state = State::ready;
    f.pieces_taken = 0;
    f.exchanges = 0;
    f.copy_group = 0;
    f.copies.clear();
  }
  block = &run;
  try {
    for (;;) {
      bool progressed = false;
      for (int i : order) {
        if (fibers[i]->state != State::ready) continue;
        progressed = true;
        resume(*fibers[i]);
        if (run.fault) std::rethrow_exception(run.fault);
      }
      int done = 0;
      int at_barrier = 0;
      for (int i = 0; i < threads; ++i) {
        done += fibers[i]->state == State::done;
        at_barrier += fibers[i]->state == State::at_barrier;
      }
      if (done == threads) break;
      if (at_barrier == threads) {
        release_barrier(fibers, threads);
      } else if (!progressed) {
        throw KernelFault(diagnose(fibers, threads));
      }
    }
    check_shared_guards();
  } catch (...) {
    block = nullptr;
    pool.clear();
    throw;
  }
  block = nullptr;
  if (launch.count_traffic) {
    const int64_t loaded = distinct(run.sectors_loaded);
    const int64_t stored = distinct(run.sectors_stored);
    std::lock_guard lock(launch.report_mutex);
    launch.report.bytes_loaded += run.bytes_loaded;
    launch.report.bytes_stored += run.bytes_stored;
    launch.report.sectors_loaded += loaded;
    launch.report.sectors_stored += stored;
  }
}

// ---- the grid, three times -----------------------------------------------------------------

enum class Order { ascending, descending, random };

template <class Integer>
std::vector<Integer> ordered(int64_t count, Order order, unsigned seed) {
  std::vector<Integer> indices(count);
  std::iota(indices.begin(), indices.end(), Integer{0});
  if (order == Order::descending) std::reverse(indices.begin(), indices.end());
  if (order == Order::random) std::shuffle(indices.begin(), indices.end(), std::mt19937(seed));
  return indices;
}

void run_grid(LaunchRun& launch, Order order) {
  const auto blocks = ordered<int64_t>(launch.config.blocks, order, 20u);
  std::exception_ptr fault;
  std::mutex fault_mutex;
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < blocks.size(); ++i) {
    {
      std::lock_guard lock(fault_mutex);
      if (fault) continue;
    }
    try {
      const auto seed = static_cast<unsigned>(blocks[i]);
      run_block(launch, blocks[i], ordered<int>(launch.config.threads, order, seed));
    } catch (...) {
      std::lock_guard lock(fault_mutex);
      if (!fault) fault = std::current_exception();
    }
  }
  if (fault) std::rethrow_exception(fault);
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    const Allocation& output = launch.outputs[i];
    if (!guard_intact(output.payload - kGuardBytes) || !guard_intact(output.payload + output.bytes))
      throw KernelFault("kernel " + std::string(launch.config.kernel) +
                        ": a thread stored outside output " + std::to_string(i) + " (" +
                        std::to_string(output.bytes) + " bytes)");
  }
}

std::mutex reports_mutex;
std::vector<LaunchReport> reports;

}  // namespace

void clear_launch_reports() {
  std::lock_guard lock(reports_mutex);
  reports.clear();
}

std::vector<LaunchReport> launch_reports() {
  std::lock_guard lock(reports_mutex);
  return reports;
}

void* allocate_guarded(int64_t bytes) {
  const int64_t padded = (bytes + 63) / 64 * 64;
  auto* base = static_cast<unsigned char*>(std::aligned_alloc(64, padded + 2 * kGuardBytes));
  if (base == nullptr) throw std::bad_alloc();
  std::fill(base, base + padded + 2 * kGuardBytes, kGuardByte);
  unsigned char* payload = base + kGuardBytes;
  poison(payload, bytes);
  std::lock_guard lock(allocations_mutex);
  allocations.emplace(payload, bytes);
  return payload;
}

void release_guarded(void* memory) {
  auto* payload = static_cast<unsigned char*>(memory);
  {
    std::lock_guard lock(allocations_mutex);
    allocations.erase(payload);
  }
  std::free(payload - kGuardBytes);
}

namespace host {

int thread_index() { return fiber->index; }
int block_size() { return block->launch->config.threads; }
int64_t block_index() { return block->index; }
int64_t grid_size() { return block->launch->config.blocks; }

void* take_shared(int64_t bytes) {
  const size_t ordinal = fiber->pieces_taken++;
  if (ordinal < block->pieces.size()) {
    if (block->pieces[ordinal].bytes != bytes)
      fault("takes " + std::to_string(bytes) +
            " bytes of shared memory where another thread took " +
            std::to_string(block->pieces[ordinal].bytes));
    return block->shared.data() + block->pieces[ordinal].offset;
  }
  int64_t taken = bytes;
  for (const SharedPiece& piece : block->pieces) taken += (piece.bytes + 15) / 16 * 16;
  if (taken > block->launch->config.shared_bytes)
    fault("takes " + std::to_string(taken) + " bytes of shared memory, the launch gave " +
          std::to_string(block->launch->config.shared_bytes));
  const int64_t begin = static_cast<int64_t>(block->shared.size());
  const int64_t aligned = (begin + kGuardBytes + 15) / 16 * 16;
  const int64_t end = aligned + bytes + kGuardBytes;
  if (end > static_cast<int64_t>(block->shared.capacity())) fault("takes too many shared pieces");
  block->shared.resize(end, kGuardByte);  // within capacity: earlier pieces stay where they are
  block->pieces.push_back({aligned, bytes});
  poison(block->shared.data() + aligned, bytes);
  return block->shared.data() + aligned;
}

void barrier(const Site& site) {
  fiber->state = State::at_barrier;
  fiber->site = site;
  yield_to_scheduler();
}

void exchange(const void* value, int bytes, const Site& site) {
  const auto& fibers = pool.get(0);
  const int first = fiber->index / kWarp * kWarp;
  Warp& warp = block->warps[fiber->index / kWarp];
  // Two generations of slots: a lane can be one exchange ahead of another, never two.
  memcpy(warp.slots[fiber->exchanges++ & 1][fiber->index % kWarp], value, bytes);
  fiber->state = State::at_exchange;
  fiber->site = site;
  if (++warp.arrived < kWarp) return yield_to_scheduler();
  warp.arrived = 0;
  for (int i = first; i < first + kWarp; ++i)
    if (!same_site(fibers[i]->site, site))
      throw KernelFault(diagnose(fibers, block->launch->config.threads));
  for (int i = first; i < first + kWarp; ++i) fibers[i]->state = State::ready;
}

const void* slot(int lane) {
  const Warp& warp = block->warps[fiber->index / kWarp];
  return warp.slots[(fiber->exchanges - 1) & 1][lane];
}

void check_alignment(const void* address, int bytes, const char* word) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fault(std::string(word) + " of " + std::to_string(bytes) + " bytes at a misaligned address");
}

namespace {
void count(const void* address, int bytes, int64_t& total, std::vector<uint64_t>& sectors) {
  if (!block->launch->count_traffic) return;
  total += bytes;
  const auto first = reinterpret_cast<uintptr_t>(address) / 32;
  const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / 32;
  for (auto sector = first; sector <= last; ++sector) sectors.push_back(sector);
}
}  // namespace

void count_load(const void* address, int bytes) {
  count(address, bytes, block->bytes_loaded, block->sectors_loaded);
}

void count_store(const void* address, int bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  const bool inside = std::any_of(
      block->launch->outputs.begin(), block->launch->outputs.end(), [&](const Allocation& output) {
        return begin >= output.payload && begin + bytes <= output.payload + output.bytes;
      });
  if (!inside) fault("stores " + std::to_string(bytes) + " bytes outside the launch's outputs");
  count(address, bytes, block->bytes_stored, block->sectors_stored);
}

void cp_async(void* shared, const void* global, int bytes) {
  check_alignment(shared, bytes, "cp_async to shared memory");
  check_alignment(global, bytes, "cp_async from global memory");
  count_load(global, bytes);
  poison(shared, bytes);
  fiber->copies.push_back({shared, global, bytes, fiber->copy_group});
}

void cp_async_commit() { ++fiber->copy_group; }

void cp_async_wait(int pending) {
  auto& copies = fiber->copies;
  const auto landed = [&](const Copy& copy) { return copy.group < fiber->copy_group - pending; };
  for (const Copy& copy : copies)
    if (landed(copy)) memcpy(copy.shared, copy.global, copy.bytes);
  copies.erase(std::remove_if(copies.begin(), copies.end(), landed), copies.end());
}

void run(const Launch& config, const std::vector<void*>& outputs,
         const std::function<void()>& thread_body) {
  const std::string kernel = config.kernel;
  if (config.threads <= 0 || config.threads > kMaxThreads || config.threads % kWarp != 0)
    throw KernelFault("kernel " + kernel + ": " + std::to_string(config.threads) +
                      " threads a block; expected a multiple of 32, at most 1024");
  if (config.blocks < 0 || config.blocks > std::numeric_limits<int>::max())
    throw KernelFault("kernel " + kernel + ": " + std::to_string(config.blocks) +
                      " blocks; a grid has at most 2^31 - 1");
  if (config.shared_bytes > kMaxSharedBytes)
    throw KernelFault("kernel " + kernel + ": " + std::to_string(config.shared_bytes) +
                      " bytes of shared memory; a block has at most " +
                      std::to_string(kMaxSharedBytes));

  std::vector<Allocation> memory;
  for (void* output : outputs) memory.push_back(allocation_of(output, config.kernel));
  using Image = std::vector<std::vector<unsigned char>>;
  const auto image = [&] {
    Image bytes;
    for (const Allocation& m : memory) bytes.emplace_back(m.payload, m.payload + m.bytes);
    return bytes;
  };

  const Image before = image();
  LaunchReport report{kernel, config.blocks, config.threads, config.shared_bytes};
  Image first;
  for (Order order : {Order::ascending, Order::descending, Order::random}) {
    for (size_t i = 0; i < memory.size(); ++i)
      std::copy(before[i].begin(), before[i].end(), memory[i].payload);
    LaunchRun launch{config, memory, thread_body, order == Order::ascending, report, {}};
    run_grid(launch, order);
    if (order == Order::ascending) {
      first = image();
      continue;
    }
    const Image now = image();
    for (size_t i = 0; i < memory.size(); ++i) {
      const auto [a, b] = std::mismatch(first[i].begin(), first[i].end(), now[i].begin());
      if (a == first[i].end()) continue;
      throw KernelFault("kernel " + kernel + ": output " + std::to_string(i) +
                        " depends on the order in which threads run (first at byte " +
                        std::to_string(a - first[i].begin()) + " of " +
                        std::to_string(first[i].size()) + "); is a barrier missing?");
    }
  }
  std::lock_guard lock(reports_mutex);
  reports.push_back(std::move(report));
}

}  // namespace host
}  // namespace weft::device
