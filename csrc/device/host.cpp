// What the words of the device vocabulary do under host execution: indices, shared memory,
// barriers, warp exchanges, memory and its traffic, asynchronous copies.
//
// A word acts on the thread that runs (`fiber`) of the block that runs (`block`). One that must
// wait says in the block's states what it waits for and yields; host_blocks.cpp resumes it. What
// every switch touches is kept small: states and counters lie in the block.
#include <cstring>

#include "device/host_run.h"

namespace weft::device::host {

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
  const auto& together = blocks_together();
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

void fault(const std::string& what) {
  throw block_fault(", thread " + std::to_string(fiber->index) + ": " + what);
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

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
    if (!same_site(fiber_of(*block, i).site, site)) throw divergence();
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

}  // namespace weft::device::host
