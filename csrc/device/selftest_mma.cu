// One kernel per word of device/mma.h and of zero-filling copies, as selftest.cu has for the rest.
//
// A lane's fragments are records of 64 bytes: a at byte 0, b at 16, c at 32. The test writes them
// by the index formulas of the PTX manual and reads the sums back, at byte 0, by the same; so
// neither meaning of a word, the hardware's or the host's, is compared with itself.
#include "device/mma.h"
#include "device/selftest_launch.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::load_pack;
using device::Pack;
using device::store;

constexpr int kRecordWords = 16;

template <class Fragment>
WEFT_DEVICE Fragment load_fragment(const uint32_t* words) {
  static_assert(sizeof(Fragment) <= 16);
  const Pack<uint32_t, 4> pack = load_pack<4>(words);
  Fragment fragment;
  memcpy(&fragment, &pack, sizeof(Fragment));
  return fragment;
}

// c += a · b, twice: the second sum starts from the first.
template <class T>
WEFT_GLOBAL void mma_record(const uint32_t* in, uint32_t* out) {
  const int64_t at = global_thread() * kRecordWords;
  const auto a = load_fragment<typename device::Mma<T>::A>(in + at);
  const auto b = load_fragment<typename device::Mma<T>::B>(in + at + 4);
  auto c = load_fragment<typename device::Mma<T>::C>(in + at + 8);
  device::mma<T>(c, a, b);
  device::mma<T>(c, a, b);
  const Pack<uint32_t, 4> zeros{};
  Pack<uint32_t, 4> sums;
  memcpy(&sums, &c, sizeof(sums));
  store(out + at, sums);
  for (int i = 4; i < kRecordWords; i += 4) store(out + at + i, zeros);
}

// Each thread keeps a row of 16 bytes; lane l of a warp points at row (l * 5 + 3) % 32 of its own.
template <bool kTransposed>
WEFT_GLOBAL void ldmatrix(const uint32_t* in, uint32_t* out) {
  device::SharedMemory memory;
  auto* rows = memory.take<Pack<uint32_t, 4>>(kThreads);
  const int thread = device::thread_index();
  rows[thread] = load_pack<4>(in + global_thread() * 4);
  device::barrier();
  const void* row = rows + thread / 32 * 32 + (device::lane() * 5 + 3) % 32;
  const auto words = kTransposed ? device::ldmatrix_transposed(row) : device::ldmatrix(row);
  store(out + global_thread() * 4, words);
}

WEFT_GLOBAL void to_tf32(const float* in, uint32_t* out) {
  store(out + global_thread(), device::to_tf32(load(in + global_thread())));
}

// Threads copy what lies `kThreads / 2` further on, or zeros where that is past the block's piece.
template <class T>
WEFT_GLOBAL void copies_or_zeros(const T* in, T* out) {
  device::SharedMemory memory;
  T* values = memory.take<T>(kThreads);
  const int thread = device::thread_index();
  const bool inside = thread + kThreads / 2 < kThreads;
  device::cp_async_or_zero<sizeof(T)>(values + thread, in + global_thread() + kThreads / 2, inside);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  device::barrier();
  store(out + global_thread(), values[kThreads - 1 - thread]);
}

bool run(const char* name, const void* in, void* out, int64_t bytes, const Context& context) {
  const Word word{name, in, out, bytes, context};
  if (word.is("mma.bf16")) return word.launch(mma_record<bf16>, kRecordWords);
  if (word.is("mma.f16")) return word.launch(mma_record<f16>, kRecordWords);
  if (word.is("mma.tf32")) return word.launch(mma_record<device::tf32>, kRecordWords);
  if (word.is("mma.f64")) return word.launch(mma_record<double>, kRecordWords);
  if (word.is("ldmatrix")) return word.launch(ldmatrix<false>, 4, 16 * kThreads);
  if (word.is("ldmatrix_transposed")) return word.launch(ldmatrix<true>, 4, 16 * kThreads);
  if (word.is("to_tf32")) return word.launch(to_tf32);
  if (word.is("cp_async_or_zero.4")) return word.launch(copies_or_zeros<uint32_t>, 1, 4 * kThreads);
  if (word.is("cp_async_or_zero.8")) return word.launch(copies_or_zeros<uint64_t>, 1, 8 * kThreads);
  if (word.is("cp_async_or_zero.16"))
    return word.launch(copies_or_zeros<Pack<uint32_t, 4>>, 1, 16 * kThreads);
  return false;
}

}  // namespace

const SelftestKernels mma_selftest_kernels = {run};

}  // namespace weft::WEFT_TARGET
