// The words by which blocks meet, each in a kernel whose result is known: see selftest.cu.
//
// Where flags are needed they are the last kThreads elements of the output, and the grid is a block
// smaller.
#include "device/cluster.h"
#include "device/grid.h"
#include "device/selftest_launch.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::store;

constexpr int kRounds = 3;
constexpr int kMembers = 2;
constexpr int kCluster = 4;

// x += x of the same thread of the next block of the set, kRounds times.
WEFT_GLOBAL void grid_barrier(int64_t members, const int32_t* in, int32_t* out, uint32_t* flags) {
  device::GridBarrier meet(flags, members);
  const int64_t first = device::block_index() / members * members;
  const int64_t next = first + (device::block_index() + 1 - first) % members;
  int32_t x = load(in + global_thread());
  for (int round = 0; round < kRounds; ++round) {
    store(out + global_thread(), x);
    meet.wait();
    x += load(out + next * kThreads + device::thread_index());
    meet.wait();
  }
  store(out + global_thread(), x);
}

// x of the mirrored thread of each block of the cluster, weighted by its distance.
WEFT_GLOBAL void cluster(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index(), size = device::cluster_size();
  values[thread] = load(in + global_thread());
  device::cluster_barrier();
  int32_t sum = 0;
  for (int distance = 0; distance < size; ++distance) {
    const int rank = (device::cluster_rank() + distance) % size;
    sum += (distance + 1) * device::at_rank(values, rank)[kThreads - 1 - thread];
  }
  device::cluster_barrier();
  store(out + global_thread(), sum);
}

bool run(const char* name, const void* in, void* out, int64_t bytes, const Context& context) {
  const Word word{name, in, out, bytes, context};
  const auto* x = static_cast<const int32_t*>(in);
  auto* y = static_cast<int32_t*>(out);
  device::Launch config{name, bytes / (4 * kThreads), kThreads, 0, context.stream};
  if (word.is("cluster")) {
    config.cluster = kCluster;
    config.shared_bytes = 4 * kThreads;
    device::launch(config, cluster, x, y);
    return true;
  }
  const bool whole = word.is("grid_barrier");
  if (!whole && !word.is("set_barrier")) return false;
  config.blocks -= 1;
  config.cooperative = true;
  auto* flags = reinterpret_cast<uint32_t*>(y + config.blocks * kThreads);
  device::clear_flags(flags, kThreads, config);
  device::launch(config, grid_barrier, whole ? config.blocks : kMembers, x, y, flags);
  return true;
}

}  // namespace

const SelftestKernels block_selftest_kernels = {run};

}  // namespace weft::WEFT_TARGET
