// One kernel per word of the device vocabulary, each with a result that is known beforehand.
//
// Under host execution they prove the instrument; on a GPU they prove that a word's hardware
// meaning is the one that the host executes. Elements are integers, one thread each, in blocks of
// kThreads; tests/test_device.py holds the expected values. Nothing here is made to be fast.
#include "device/selftest_launch.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::load_pack;
using device::Pack;
using device::store;

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

// Words of one element type per width are named "word.bytes".
template <int Bytes>
bool run_width(const Word& word, size_t length) {
  using T = typename Bits<Bytes>::type;
  const auto is = [&](const char* name) {
    return strlen(name) == length && strncmp(word.name, name, length) == 0;
  };
  if (is("shuffle")) return word.launch(shuffle<T>);
  if (is("shuffle_xor")) return word.launch(shuffle_xor<T>);
  if (is("shuffle_down")) return word.launch(shuffle_down<T>);
  if (is("shuffle_up")) return word.launch(shuffle_up<T>);
  if (is("load")) return word.launch(load_store<T>);
  if constexpr (Bytes > 1)
    if (is("pack_of_bytes")) return word.launch(packs<uint8_t, Bytes>, Bytes);
  if constexpr (Bytes > 2)
    if (is("pack_of_halves")) return word.launch(packs<uint16_t, Bytes / 2>, Bytes / 2);
  if constexpr (Bytes > 4)
    if (is("pack_of_words")) return word.launch(packs<uint32_t, Bytes / 4>, Bytes / 4);
  if constexpr (Bytes >= 4)
    if (is("cp_async")) return word.launch(copies<Bytes>, kStages, 2 * kThreads * Bytes);
  return false;
}

bool run(const char* name, const void* in, void* out, int64_t bytes, const Context& context) {
  const Word word{name, in, out, bytes, context};
  if (word.is("indices")) return word.launch(indices);
  if (word.is("shared")) return word.launch(shared, 1, 5 * kThreads);
  if (word.is("barrier")) return word.launch(barrier, 1, 4 * kThreads);
  if (word.is("ballot")) return word.launch(ballot);
  if (word.is("any")) return word.launch(any);
  if (word.is("all")) return word.launch(all);
  if (word.is("barrier_rounds")) return word.launch(barrier_rounds);
  if (word.is("shuffle_rounds")) return word.launch(shuffle_rounds);
  if (word.is("load_rounds")) return word.launch(load_rounds);
  const char* dot = strchr(name, '.');
  if (dot == nullptr) return false;
  const auto length = static_cast<size_t>(dot - name);
  const char* width = dot + 1;
  if (strcmp(width, "1") == 0) return run_width<1>(word, length);
  if (strcmp(width, "2") == 0) return run_width<2>(word, length);
  if (strcmp(width, "4") == 0) return run_width<4>(word, length);
  if (strcmp(width, "8") == 0) return run_width<8>(word, length);
  if (strcmp(width, "16") == 0) return run_width<16>(word, length);
  return false;
}

}  // namespace

const SelftestKernels selftest_kernels = {run};

}  // namespace weft::WEFT_TARGET
