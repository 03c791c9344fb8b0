// Every fault that host execution promises to catch, planted: kernels that are wrong on purpose.
//
// tests/test_device.py runs each and reads the message. They are built for the host alone; on a GPU
// some of them would hang and the others pass in silence, which is why the host is strict.
#include "device/cluster.h"
#include "device/grid.h"
#include "device/mma.h"
#include "device/selftest_launch.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::load_pack;
using device::store;

// ---- shared memory ---------------------------------------------------------------------------

void missing_barrier(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  values[thread] = load(in + global_thread());
  store(out + global_thread(), values[kThreads - 1 - thread]);
}

// Without the second barrier a fast thread overwrites what a slow one has yet to read.
void missing_second_barrier(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  int32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    values[thread] = load(in + global_thread()) + round;
    device::barrier();
    sum += values[(thread + 1) % kThreads];
  }
  store(out + global_thread(), sum);
}

// Each thread takes the next number. Counted from the nearer end, ascending and descending agree.
void order_of_arrival(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* arrived = memory.take<int32_t>(1);
  if (device::thread_index() == 0) arrived[0] = load(in);
  device::barrier();
  const int32_t place = arrived[0]++;
  store(out + global_thread(), place < kThreads / 2 ? place : kThreads - 1 - place);
}

void early_shared_read(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  store(out + global_thread(), values[thread]);
  values[thread] = load(in + global_thread());
}

void early_copy_read(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  values[thread] = 0;
  device::cp_async<4>(values + thread, in + global_thread());
  device::cp_async_commit();
  store(out + global_thread(), values[thread]);
  device::cp_async_wait<0>();
}

// The wait leaves one group pending, and it is the one that is read.
void copy_group_pending(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  device::cp_async<4>(values + thread, in + global_thread());
  device::cp_async_commit();
  device::cp_async_wait<1>();
  store(out + global_thread(), values[thread]);
  device::cp_async_wait<0>();
}

void copies_in_flight(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  device::cp_async<4>(values + thread, in + global_thread());
  device::cp_async_commit();
  store(out + global_thread(), 0);
}

void misaligned_copy(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(2 * kThreads);
  device::cp_async<8>(values + device::thread_index() + 1, in);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  store(out + global_thread(), 0);
}

void copy_outside_shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  device::cp_async<4>(values + thread + 1, in + global_thread());
  device::cp_async_commit();
  device::cp_async_wait<0>();
  device::barrier();
  store(out + global_thread(), values[thread]);
}

void store_after_shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  values[thread == 17 ? kThreads : thread] = load(in + global_thread());
  store(out + global_thread(), 0);
}

void store_before_shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  values[thread == 0 ? -1 : thread] = load(in + global_thread());
  store(out + global_thread(), 0);
}

void unequal_pieces(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(device::thread_index() == 9 ? 8 : 16);
  values[0] = load(in + global_thread());
  store(out + global_thread(), 0);
}

void too_much_shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads + 1);
  values[device::thread_index()] = load(in + global_thread());
  store(out + global_thread(), 0);
}

// ---- outputs ---------------------------------------------------------------------------------

void store_outside_output(const int32_t* in, int32_t* out) {
  store(out + global_thread() + 1, load(in + global_thread()));
}

void raw_store_after_output(const int32_t* in, int32_t* out) {
  const int64_t thread = global_thread();
  store(out + thread, load(in + thread));
  if (thread == kThreads + 5) out[device::grid_size() * kThreads] = 0;
}

void raw_store_before_output(const int32_t* in, int32_t* out) {
  const int64_t thread = global_thread();
  store(out + thread, load(in + thread));
  if (thread == kThreads + 5) out[-1] = 0;
}

void unwritten_output(const int32_t* in, int32_t* out) {
  if (device::thread_index() != 3) store(out + global_thread(), load(in + global_thread()));
}

void misaligned_pack(const int32_t* in, int32_t* out) {
  const auto pack = load_pack<2>(in + 2 * device::thread_index() + 1);
  store(out + global_thread(), pack[0]);
}

void misaligned_load(const int32_t* in, int32_t* out) {
  const char* bytes = reinterpret_cast<const char*>(in) + 1;
  store(out + global_thread(), load(reinterpret_cast<const int32_t*>(bytes)));
}

// A block that reads what another one stored: nothing orders blocks.
void block_order(const int32_t* in, int32_t* out) {
  const int64_t thread = global_thread();
  const bool first = device::block_index() == 0;
  store(out + thread, first ? load(in + thread) : load(out + thread - kThreads) + 1);
}

// ---- threads that must meet ------------------------------------------------------------------

void skipped_barrier(const int32_t* in, int32_t* out) {
  if (device::thread_index() < 60) device::barrier();
  store(out + global_thread(), load(in + global_thread()));
}

void two_barriers(const int32_t* in, int32_t* out) {
  if (device::thread_index() < 32)
    device::barrier();
  else
    device::barrier();
  store(out + global_thread(), load(in + global_thread()));
}

void lost_lane(const int32_t* in, int32_t* out) {
  int32_t value = load(in + global_thread());
  if (device::thread_index() != 40) value = device::shuffle_xor(value, 1);
  store(out + global_thread(), value);
}

void mixed_exchange(const int32_t* in, int32_t* out) {
  int32_t value = load(in + global_thread());
  if (device::lane() < 16)
    value = device::shuffle_xor(value, 1);
  else
    value = device::shuffle_down(value, 1);
  store(out + global_thread(), value);
}

void barrier_against_exchange(const int32_t* in, int32_t* out) {
  int32_t value = load(in + global_thread());
  if (device::lane() < 31)
    value = device::shuffle_xor(value, 1);
  else
    device::barrier();
  store(out + global_thread(), value);
}

// ---- tensor cores ----------------------------------------------------------------------------

void lost_mma_lane(const int32_t* in, int32_t* out) {
  device::Mma<double>::C c{};
  const device::Mma<double>::A a{{1.0}};
  if (device::thread_index() != 40) device::mma<double>(c, a, a);
  store(out + global_thread(), load(in + global_thread()) + static_cast<int32_t>(c[0]));
}

void misaligned_ldmatrix(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  values[device::thread_index()] = load(in + global_thread());
  device::barrier();
  store(out + global_thread(), static_cast<int32_t>(device::ldmatrix(values + 2)[0]));
}

void ldmatrix_outside_shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  values[device::thread_index()] = load(in + global_thread());
  device::barrier();
  store(out + global_thread(),
        static_cast<int32_t>(device::ldmatrix(values + 4 * device::lane())[0]));
}

// Rows are read while other lanes of the warp still store them.
void ldmatrix_without_barrier(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(4 * kThreads);
  const int thread = device::thread_index();
  for (int i = 0; i < 4; ++i) values[4 * thread + i] = load(in + global_thread());
  const int32_t* row = values + 4 * (thread / 32 * 32 + 31 - device::lane());
  store(out + global_thread(), static_cast<int32_t>(device::ldmatrix(row)[0]));
}

// ---- blocks that must meet ---------------------------------------------------------------------

int64_t next_block() { return (device::block_index() + 1) % device::grid_size(); }

// Without the second barrier a fast block overwrites what a slow one has yet to read.
void missing_grid_barrier(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, device::grid_size());
  int32_t x = load(in + global_thread());
  for (int round = 0; round < 2; ++round) {
    store(out + global_thread(), x);
    meet.wait();
    x += load(out + next_block() * kThreads + device::thread_index());
  }
  meet.wait();
  store(out + global_thread(), x);
}

// The set that meets is smaller than the one that reads.
void too_small_a_set(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, 1);
  store(out + global_thread(), load(in + global_thread()));
  meet.wait();
  const int32_t x = load(out + next_block() * kThreads + device::thread_index());
  meet.wait();
  store(out + global_thread(), x + load(in + global_thread()));
}

void skipped_grid_barrier(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, device::grid_size());
  if (device::block_index() != 1) meet.wait();
  store(out + global_thread(), load(in + global_thread()));
}

void half_a_grid_barrier(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, device::grid_size());
  if (device::block_index() == 0 || device::thread_index() < 32) meet.wait();
  store(out + global_thread(), load(in + global_thread()));
}

void two_grid_barriers(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, device::grid_size());
  if (device::block_index() == 0)
    meet.wait();
  else
    meet.wait();
  store(out + global_thread(), load(in + global_thread()));
}

void grid_barrier_of_a_plain_launch(const int32_t* in, int32_t* out) {
  device::GridBarrier meet(nullptr, device::grid_size());
  meet.wait();
  store(out + global_thread(), load(in + global_thread()));
}

// Blocks read each other's shared memory.
int32_t neighbours_value(int32_t* values) {
  const int other = (device::cluster_rank() + 1) % device::cluster_size();
  return device::at_rank(values, other)[device::thread_index()];
}

void missing_cluster_barrier(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  device::cluster_barrier();
  values[device::thread_index()] = load(in + global_thread());
  store(out + global_thread(), neighbours_value(values));
  device::cluster_barrier();
}

// A block ends while another may yet read its memory.
void early_end(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  values[device::thread_index()] = load(in + global_thread());
  device::cluster_barrier();
  store(out + global_thread(), neighbours_value(values));
}

void late_start(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  values[device::thread_index()] = load(in + global_thread());
  store(out + global_thread(), neighbours_value(values));
  device::cluster_barrier();
}

void skipped_cluster_barrier(const int32_t* in, int32_t* out) {
  if (device::cluster_rank() == 1) device::cluster_barrier();
  store(out + global_thread(), load(in + global_thread()));
}

struct Fault {
  const char* word;
  void (*kernel)(const int32_t*, int32_t*);
  int threads = kThreads;
  int64_t shared_bytes = 0;
  bool cooperative = false;
  int cluster = 1;
};

constexpr int64_t kShared = kThreads * 4;

constexpr Fault kFaults[] = {
    {"missing_barrier", missing_barrier, kThreads, kShared},
    {"missing_second_barrier", missing_second_barrier, kThreads, kShared},
    {"order_of_arrival", order_of_arrival, kThreads, kShared},
    {"early_shared_read", early_shared_read, kThreads, kShared},
    {"early_copy_read", early_copy_read, kThreads, kShared},
    {"copy_group_pending", copy_group_pending, kThreads, kShared},
    {"copies_in_flight", copies_in_flight, kThreads, kShared},
    {"misaligned_copy", misaligned_copy, kThreads, 2 * kShared},
    {"copy_outside_shared", copy_outside_shared, kThreads, kShared},
    {"store_after_shared", store_after_shared, kThreads, kShared},
    {"store_before_shared", store_before_shared, kThreads, kShared},
    {"unequal_pieces", unequal_pieces, kThreads, kShared},
    {"too_much_shared", too_much_shared, kThreads, kShared},
    {"more_shared_than_a_block_has", missing_barrier, kThreads, 228 * 1024},
    {"store_outside_output", store_outside_output},
    {"raw_store_after_output", raw_store_after_output},
    {"raw_store_before_output", raw_store_before_output},
    {"unwritten_output", unwritten_output},
    {"misaligned_pack", misaligned_pack},
    {"misaligned_load", misaligned_load},
    {"block_order", block_order},
    {"skipped_barrier", skipped_barrier},
    {"two_barriers", two_barriers},
    {"lost_lane", lost_lane},
    {"mixed_exchange", mixed_exchange},
    {"barrier_against_exchange", barrier_against_exchange},
    {"lost_mma_lane", lost_mma_lane},
    {"misaligned_ldmatrix", misaligned_ldmatrix, kThreads, kShared},
    {"ldmatrix_outside_shared", ldmatrix_outside_shared, kThreads, kShared},
    {"ldmatrix_without_barrier", ldmatrix_without_barrier, kThreads, 4 * kShared},
    {"missing_grid_barrier", missing_grid_barrier, kThreads, 0, true},
    {"too_small_a_set", too_small_a_set, kThreads, 0, true},
    {"skipped_grid_barrier", skipped_grid_barrier, kThreads, 0, true},
    {"half_a_grid_barrier", half_a_grid_barrier, kThreads, 0, true},
    {"two_grid_barriers", two_grid_barriers, kThreads, 0, true},
    {"grid_barrier_of_a_plain_launch", grid_barrier_of_a_plain_launch},
    {"missing_cluster_barrier", missing_cluster_barrier, kThreads, kShared, false, 2},
    {"early_end", early_end, kThreads, kShared, false, 2},
    {"late_start", late_start, kThreads, kShared, false, 2},
    {"skipped_cluster_barrier", skipped_cluster_barrier, kThreads, kShared, false, 2},
    {"odd_cluster", late_start, kThreads, kShared, false, 3},
    {"odd_threads", unwritten_output, 48},
    {"too_many_threads", unwritten_output, 2048},
};

bool run(const char* word, const void* in, void* out, int64_t bytes, const Context& context) {
  const int64_t blocks = bytes / (4 * kThreads);
  const auto* x = static_cast<const int32_t*>(in);
  for (const Fault& fault : kFaults) {
    if (strcmp(word, fault.word) != 0) continue;
    device::launch({fault.word, blocks, fault.threads, fault.shared_bytes, context.stream,
                    fault.cooperative, fault.cluster},
                   fault.kernel, x, static_cast<int32_t*>(out));
    return true;
  }
  if (strcmp(word, "foreign_output") == 0) {
    int32_t local[kThreads];
    device::launch({word, 1, kThreads, 0, context.stream}, unwritten_output, x, local);
    return true;
  }
  return false;
}

}  // namespace

const SelftestKernels fault_kernels = {run};

}  // namespace weft::WEFT_TARGET
