// A launch on the host: its grid runs three times, and all three must leave the same bits.
//
// Threads and blocks run in ascending, descending and seeded random order, from the same initial
// memory: a kernel that relies on an order it did not ask for (a missing barrier) differs between
// the runs. Such a fault is hunted: the grid runs once more, serially, so that the message can name
// the thread that stored the byte that differs.
#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>

#include "core/fork.h"
#include "device/host_run.h"

namespace weft::device {
namespace {

using namespace host;

constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = grid_facts_of(0).block_shared_bytes;
constexpr int kMaxCluster = 8;

using Image = std::vector<std::vector<unsigned char>>;

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
  run_blocks(launch, order, threads_lost_in_fork());
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