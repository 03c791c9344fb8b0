// One kernel per word of the device vocabulary, each with a result that is known beforehand.
//
// Under host execution they prove the instrument; on a GPU they prove that a word's hardware
// meaning is the one that the host executes. Elements are integers, one thread each, in blocks of
// kThreads; tests/test_device.py holds the expected values. Nothing here is made to be fast.
#include "device/selftest.h"

#include <cstring>

#include "device/index.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::load_pack;
using device::Pack;
using device::store;

constexpr int kThreads = 64;

// Where lanes fetch from; the tests know these numbers.
constexpr int kMask = 9;
constexpr int kDelta = 5;

template <int Bytes>
struct Bits;
template <>
struct Bits<1> {
  using type = uint8_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint64_t;
};
template <>
struct Bits<16> {
  using type = Pack<uint32_t, 4>;
};

WEFT_GLOBAL void indices(const int64_t*, int64_t* out) {
  using namespace device;
  const int64_t digits[] = {grid_size(), block_index(), block_size(), thread_index(), lane()};
  int64_t code = 0;
  for (const int64_t digit : digits) code = code * 1000 + digit;
  store(out + global_thread(), code);
}

// Two pieces of different types: y = x of the mirrored thread + its index.
WEFT_GLOBAL void shared(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* values = memory.take<int32_t>(kThreads);
  uint8_t* places = memory.take<uint8_t>(kThreads);
  const int thread = device::thread_index();
  values[thread] = load(in + global_thread());
  places[thread] = static_cast<uint8_t>(thread);
  device::barrier();
  const int mirrored = kThreads - 1 - thread;
  store(out + global_thread(), values[mirrored] + places[mirrored]);
}

// Inclusive scan of a block, two barriers a step.
WEFT_GLOBAL void barrier(const int32_t* in, int32_t* out) {
  device::SharedMemory memory;
  int32_t* sums = memory.take<int32_t>(kThreads);
  const int thread = device::thread_index();
  int32_t sum = load(in + global_thread());
  for (int distance = 1; distance < kThreads; distance *= 2) {
    sums[thread] = sum;
    device::barrier();
    if (thread >= distance) sum += sums[thread - distance];
    device::barrier();
  }
  store(out + global_thread(), sum);
}

template <class T>
WEFT_GLOBAL void shuffle(const T* in, T* out) {
  const int source = (device::lane() * 5 + 3) % 32;
  store(out + global_thread(), device::shuffle(load(in + global_thread()), source));
}
template <class T>
WEFT_GLOBAL void shuffle_xor(const T* in, T* out) {
  store(out + global_thread(), device::shuffle_xor(load(in + global_thread()), kMask));
}
template <class T>
WEFT_GLOBAL void shuffle_down(const T* in, T* out) {
  store(out + global_thread(), device::shuffle_down(load(in + global_thread()), kDelta));
}
template <class T>
WEFT_GLOBAL void shuffle_up(const T* in, T* out) {
  store(out + global_thread(), device::shuffle_up(load(in + global_thread()), kDelta));
}

WEFT_GLOBAL void ballot(const uint32_t* in, uint32_t* out) {
  store(out + global_thread(), device::ballot(load(in + global_thread()) != 0));
}
WEFT_GLOBAL void any(const uint32_t* in, uint32_t* out) {
  store(out + global_thread(), device::any(load(in + global_thread()) != 0) ? 1u : 0u);
}
WEFT_GLOBAL void all(const uint32_t* in, uint32_t* out) {
  store(out + global_thread(), device::all(load(in + global_thread()) != 0) ? 1u : 0u);
}

template <class T>
WEFT_GLOBAL void load_store(const T* in, T* out) {
  store(out + global_thread(), load(in + global_thread()));
}

// Neighbouring elements of T, reversed inside each pack: a pack keeps the order of memory.
template <class T, int N>
WEFT_GLOBAL void packs(const T* in, T* out) {
  const Pack<T, N> pack = load_pack<N>(in + global_thread() * N);
  Pack<T, N> reversed;
  for (int i = 0; i < N; ++i) reversed[i] = pack[N - 1 - i];
  store(out + global_thread() * N, reversed);
}

// A block streams kStages tiles through two buffers, one copy in flight while the other is read;
// the tile is mirrored, so threads read what others copied. One block per kStages * kThreads
// elements.
constexpr int kStages = 4;

template <int Bytes>
WEFT_GLOBAL void copies(const typename Bits<Bytes>::type* in, typename Bits<Bytes>::type* out) {
  using T = typename Bits<Bytes>::type;
  device::SharedMemory memory;
  T* buffers = memory.take<T>(2 * kThreads);
  const int thread = device::thread_index();
  const int64_t first = device::block_index() * kStages * kThreads;
  const auto fetch = [&](int stage) {
    device::cp_async<Bytes>(buffers + stage % 2 * kThreads + thread,
                            in + first + stage * kThreads + thread);
    device::cp_async_commit();
  };
  fetch(0);
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage + 1 < kStages) {
      fetch(stage + 1);
      device::cp_async_wait<1>();
    } else {
      device::cp_async_wait<0>();
    }
    device::barrier();
    store(out + first + stage * kThreads + thread,
          buffers[stage % 2 * kThreads + kThreads - 1 - thread]);
    device::barrier();
  }
}

// Barriers, exchanges and loads alone: what benchmarks of host execution measure.
constexpr int kRounds = 100;

WEFT_GLOBAL void barrier_rounds(const int32_t* in, int32_t* out) {
  for (int i = 0; i < kRounds; ++i) device::barrier();
  store(out + global_thread(), load(in + global_thread()));
}
WEFT_GLOBAL void shuffle_rounds(const int32_t* in, int32_t* out) {
  int32_t value = load(in + global_thread());
  for (int i = 0; i < kRounds; ++i) value = device::shuffle_xor(value, 1);
  store(out + global_thread(), value);
}
WEFT_GLOBAL void load_rounds(const int32_t* in, int32_t* out) {
  int32_t sum = 0;
  for (int i = 0; i < kRounds; ++i) sum += load(in + (global_thread() + i) % 64);
  store(out + global_thread(), sum);
}

// ---- the table -------------------------------------------------------------------------------

struct Run {
  const char* word;
  const void* in;
  void* out;
  int64_t bytes;
  const Context& context;
};

template <class T>
bool launch(const Run& run, void (*kernel)(const T*, T*), int per_thread = 1,
            int64_t shared_bytes = 0) {
  const int64_t elements = run.bytes / static_cast<int64_t>(sizeof(T));
  const device::Launch config{run.word, elements / per_thread / kThreads, kThreads, shared_bytes,
                              run.context.stream};
  device::launch(config, kernel, static_cast<const T*>(run.in), static_cast<T*>(run.out));
  return true;
}

// Words of one element type per width are named "word.bytes".
template <int Bytes>
bool run_width(const Run& run, const char* stem, size_t length) {
  using T = typename Bits<Bytes>::type;
  const auto is = [&](const char* name) {
    return strlen(name) == length && strncmp(stem, name, length) == 0;
  };
  if (is("shuffle")) return launch(run, shuffle<T>);
  if (is("shuffle_xor")) return launch(run, shuffle_xor<T>);
  if (is("shuffle_down")) return launch(run, shuffle_down<T>);
  if (is("shuffle_up")) return launch(run, shuffle_up<T>);
  if (is("load")) return launch(run, load_store<T>);
  if constexpr (Bytes > 1)
    if (is("pack_of_bytes")) return launch(run, packs<uint8_t, Bytes>, Bytes);
  if constexpr (Bytes > 2)
    if (is("pack_of_halves")) return launch(run, packs<uint16_t, Bytes / 2>, Bytes / 2);
  if constexpr (Bytes > 4)
    if (is("pack_of_words")) return launch(run, packs<uint32_t, Bytes / 4>, Bytes / 4);
  if constexpr (Bytes >= 4)
    if (is("cp_async")) return launch(run, copies<Bytes>, kStages, 2 * kThreads * Bytes);
  return false;
}

bool run(const char* word, const void* in, void* out, int64_t bytes, const Context& context) {
  const Run run{word, in, out, bytes, context};
  const auto is = [&](const char* name) { return strcmp(word, name) == 0; };
  if (is("indices")) return launch(run, indices);
  if (is("shared")) return launch(run, shared, 1, 5 * kThreads);
  if (is("barrier")) return launch(run, barrier, 1, 4 * kThreads);
  if (is("ballot")) return launch(run, ballot);
  if (is("any")) return launch(run, any);
  if (is("all")) return launch(run, all);
  if (is("barrier_rounds")) return launch(run, barrier_rounds);
  if (is("shuffle_rounds")) return launch(run, shuffle_rounds);
  if (is("load_rounds")) return launch(run, load_rounds);
  const char* dot = strchr(word, '.');
  if (dot == nullptr) return false;
  const auto length = static_cast<size_t>(dot - word);
  const char* width = dot + 1;
  if (strcmp(width, "1") == 0) return run_width<1>(run, word, length);
  if (strcmp(width, "2") == 0) return run_width<2>(run, word, length);
  if (strcmp(width, "4") == 0) return run_width<4>(run, word, length);
  if (strcmp(width, "8") == 0) return run_width<8>(run, word, length);
  if (strcmp(width, "16") == 0) return run_width<16>(run, word, length);
  return false;
}

}  // namespace

const SelftestKernels selftest_kernels = {run};

}  // namespace weft::WEFT_TARGET
