// How the threads of a block, and blocks that may wait for each other, take turns on one OS thread.
//
// A thread runs until it waits; a block goes on until all its threads wait for other blocks or are
// done. Blocks that may wait for each other (a cooperative grid, a cluster) run together. A broken
// guard band shows only after the fact and is hunted: the blocks run once more and are looked at
// after every step of every thread, so that the message can name the thread.
#include <map>
#include <mutex>

#include "device/host_run.h"

namespace weft::device::host {
namespace {

std::string site_name(const Site& site) {
  std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

// "0-30, 32"
std::string thread_list(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
    if (!text.empty()) text += ", ";
    text += std::to_string(threads[i]);
    if (j > i) text.append("-").append(std::to_string(threads[j]));
    i = j + 1;
  }
  return text;
}

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

thread_local std::vector<std::unique_ptr<BlockRun>> reused_blocks;
thread_local std::vector<BlockRun*> together;  // the blocks that run on this OS thread

// All threads of both blocks wait for other blocks, at one word.
bool meet(const BlockRun& a, const BlockRun& b) {
  const int threads = a.launch->config.threads;
  return a.abroad == threads && b.abroad == threads && a.states[0] == b.states[0] &&
         a.members == b.members && same_site(fiber_of(a, 0).site, fiber_of(b, 0).site);
}

// Throws unless all threads wait for the same word.
void check_one_word() {
  for (size_t i = 1; i < block->states.size(); ++i)
    if (block->states[i] != block->states[0] ||
        !same_site(fiber_of(*block, static_cast<int>(i)).site, fiber_of(*block, 0).site))
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

void look_for_damage(const LaunchRun& launch) {
  std::string damage = shared_damage();
  if (damage.empty()) damage = output_damage(launch);
  if (!damage.empty()) fault("stores " + damage);
}

void start_block(LaunchRun& launch, BlockRun& run, int64_t index, int first_fiber) {
  const int threads = launch.config.threads;
  run.start(launch, index, first_fiber);
  ensure_fibers(first_fiber + threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = pooled_fiber(first_fiber + i);
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
      resume(fiber_of(run, i));
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

}  // namespace

constinit thread_local BlockRun* block = nullptr;
const std::vector<BlockRun*>& blocks_together() { return together; }

KernelFault block_fault(const std::string& what) {
  return KernelFault("kernel " + std::string(block->launch->config.kernel) + ", block " +
                     std::to_string(block->index) + what);
}

KernelFault divergence() {
  std::map<std::string, std::vector<int>> groups;
  for (size_t i = 0; i < block->states.size(); ++i) {
    const State state = block->states[i];
    const auto thread = static_cast<int>(i);
    const Fiber& f = fiber_of(*block, thread);
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

std::string output_damage(const LaunchRun& launch) {
  for (size_t i = 0; i < launch.outputs.size(); ++i) {
    const Allocation& output = launch.outputs[i];
    if (!guards_intact(output.payload, output.bytes))
      return "outside output " + std::to_string(i) + " (" + std::to_string(output.bytes) +
             " bytes)";
  }
  return "";
}

void run_threads() {
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
    drop_fibers();
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

}  // namespace weft::device::host
