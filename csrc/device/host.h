// The device vocabulary executed on the CPU: a test instrument, strict where hardware is silent.
//
// Every CUDA thread is a fiber; a block runs on one OS thread; blocks run on several. What it
// checks, and how each fault is reported, is told in CONTRIBUTING.md ("Host execution").
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define WEFT_GLOBAL
#define WEFT_DEVICE inline
#define WEFT_CONSTANT const
#define WEFT_UNROLL
#define WEFT_UNROLL_BY(count)

namespace weft::device {

// A fault that a kernel committed. The message names the kernel, the block and the threads.
class KernelFault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What one launch moved, counted in the first of its three runs.
struct LaunchReport {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int64_t bytes_loaded = 0;    // by load / load_pack / cp_async, all threads
  int64_t bytes_stored = 0;    // by store
  int64_t sectors_loaded = 0;  // 32-byte sectors a block touches, each once; summed over blocks
  int64_t sectors_stored = 0;
};
void clear_launch_reports();
std::vector<LaunchReport> launch_reports();

// The device that host execution plays: small, so that all its threads can be fibers at once. Tests
// choose how many multiprocessors it has.
GridFacts grid_facts();
void set_multiprocessors(int count);
inline constexpr int kHostMultiprocessors = 4;

// Memory that kernels write: poisoned, between guard bands that every launch checks.
void* allocate_guarded(int64_t bytes);
void release_guarded(void* memory);

namespace host {

using Site = std::source_location;

int thread_index();
int block_size();
int64_t block_index();
int64_t grid_size();

void begin_shared();
void* take_shared(int64_t bytes, int64_t alignment);
void barrier(const Site& site);
// Of sets of `members` neighbouring blocks; of a cluster.
void grid_barrier(int64_t members, const Site& site);
void cluster_barrier(const Site& site);
int cluster_size();
// Where block `rank` of the cluster has the shared memory that this block has at `shared`.
void* at_rank(void* shared, int rank);
// Deposits this lane's value, of at most kSlotBytes, and returns once all 32 lanes did; slot(i) is
// lane i's value, kSlotBytes after that of lane i - 1.
constexpr int kSlotBytes = 32;
void exchange(const void* value, int bytes, const Site& site);
const void* slot(int lane);

void count_load(const void* address, int bytes);
void count_store(const void* address, int bytes);
[[noreturn]] void misaligned(const void* address, size_t bytes, const char* word);
inline void check_alignment(const void* address, size_t bytes, const char* word) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) misaligned(address, bytes, word);
}

// A fault "<verb> <bytes> bytes <way> outside shared memory" unless all of them lie in one piece.
void check_shared(const void* shared, int bytes, const char* verb, const char* way);

// `global` may be null: zeros land.
void cp_async(void* shared, const void* global, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

[[noreturn]] void fault(const std::string& what);
bool same_site(const Site& a, const Site& b);

// What words of other files keep for the block that runs. Made by its first use.
struct BlockState {
  virtual ~BlockState() = default;
  virtual void thread_done() = 0;        // may fault
  virtual std::string block_done() = 0;  // a fault of the block, "" if none
};
std::unique_ptr<BlockState>& block_state();

// This thread waits until another one calls unpark; `where` and the site tell where, in a fault.
void park(const char* where, const Site& site);
void unpark(int thread);

void run(const Launch& config, const std::vector<void*>& outputs,
         const std::function<void()>& thread_body);

}  // namespace host

inline int thread_index() { return host::thread_index(); }
inline int block_size() { return host::block_size(); }
inline int64_t block_index() { return host::block_index(); }
inline int64_t grid_size() { return host::grid_size(); }
inline int lane() { return host::thread_index() & 31; }

class SharedMemory {
 public:
  SharedMemory() { host::begin_shared(); }

  template <class T, int kAlignment = 16>
  T* take(int count) {
    const auto bytes = static_cast<int64_t>(count) * sizeof(T);
    return static_cast<T*>(host::take_shared(bytes, kAlignment));
  }
};

inline void barrier(host::Site site = host::Site::current()) { host::barrier(site); }

namespace host {
template <class T>
T exchange_with(T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 16);
  exchange(&value, sizeof(T), site);
  T result;
  memcpy(static_cast<void*>(&result), slot(source), sizeof(T));
  return result;
}
}  // namespace host

template <class T>
T shuffle(T value, int source, host::Site site = host::Site::current()) {
  return host::exchange_with(value, source & 31, site);
}
template <class T>
T shuffle_xor(T value, int mask, host::Site site = host::Site::current()) {
  return host::exchange_with(value, (lane() ^ mask) & 31, site);
}
template <class T>
T shuffle_down(T value, int delta, host::Site site = host::Site::current()) {
  const int source = lane() + delta;
  return host::exchange_with(value, source < 32 ? source : lane(), site);
}
template <class T>
T shuffle_up(T value, int delta, host::Site site = host::Site::current()) {
  const int source = lane() - delta;
  return host::exchange_with(value, source >= 0 ? source : lane(), site);
}
inline unsigned ballot(bool predicate, host::Site site = host::Site::current()) {
  host::exchange(&predicate, sizeof(bool), site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    votes |= static_cast<unsigned>(*static_cast<const bool*>(host::slot(i))) << i;
  return votes;
}
inline bool any(bool predicate, host::Site site = host::Site::current()) {
  return ballot(predicate, site) != 0;
}
inline bool all(bool predicate, host::Site site = host::Site::current()) {
  return ballot(predicate, site) == 0xFFFFFFFFu;
}

template <class T>
T load(const T* address) {
  host::check_alignment(address, alignof(T), "load");
  host::count_load(address, sizeof(T));
  return *address;
}
template <class T>
void store(T* address, T value) {
  host::check_alignment(address, alignof(T), "store");
  host::count_store(address, sizeof(T));
  *address = value;
}
template <int N, class T>
Pack<T, N> load_pack(const T* address) {
  host::check_alignment(address, sizeof(T) * N, "load_pack");
  host::count_load(address, sizeof(T) * N);
  Pack<T, N> pack;
  memcpy(pack.value, address, sizeof(T) * N);
  return pack;
}
template <class T, int N>
void store(T* address, const Pack<T, N>& pack) {
  host::check_alignment(address, sizeof(T) * N, "store");
  host::count_store(address, sizeof(T) * N);
  memcpy(address, pack.value, sizeof(T) * N);
}

template <int Bytes>
void cp_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  host::cp_async(shared, global, Bytes);
}
template <int Bytes>
void cp_async_or_zero(void* shared, const void* global, bool inside) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  host::cp_async(shared, inside ? global : nullptr, Bytes);
}
inline void cp_async_commit() { host::cp_async_commit(); }
template <int Pending>
void cp_async_wait() {
  host::cp_async_wait(Pending);
}

namespace host {
template <class T>
void note_output(std::vector<void*>& outputs, T argument) {
  if constexpr (std::is_pointer_v<T> && !std::is_const_v<std::remove_pointer_t<T>>) {
    if (argument != nullptr) outputs.push_back(argument);
  }
}
}  // namespace host

template <class... Parameters, class... Arguments>
void launch(const Launch& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (config.blocks == 0) return;
  std::vector<void*> outputs;
  (host::note_output(outputs, static_cast<Parameters>(arguments)), ...);
  host::run(config, outputs, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace weft::device
