// The device vocabulary as the hardware's own instructions. All inline PTX stands here.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#define WEFT_GLOBAL __global__
#define WEFT_DEVICE __device__ __forceinline__
#define WEFT_CONSTANT const __grid_constant__
#define WEFT_UNROLL _Pragma("unroll")
#define WEFT_UNROLL_BY(count) WEFT_PRAGMA(unroll count)
#define WEFT_PRAGMA(words) _Pragma(#words)

namespace weft::device {

WEFT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
WEFT_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
WEFT_DEVICE int64_t block_index() { return blockIdx.x; }
WEFT_DEVICE int64_t grid_size() { return gridDim.x; }
WEFT_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31u); }

class SharedMemory {
 public:
  template <class T, unsigned kAlignment = 16>
  WEFT_DEVICE T* take(int count) {
    extern __shared__ __align__(16) unsigned char weft_shared_memory[];
    if constexpr (kAlignment > 16) {
      const auto base = static_cast<unsigned>(__cvta_generic_to_shared(weft_shared_memory));
      used_ = ((base + used_ + kAlignment - 1) & ~(kAlignment - 1)) - base;
    }
    T* piece = reinterpret_cast<T*>(weft_shared_memory + used_);
    used_ += (static_cast<unsigned>(count * sizeof(T)) + 15u) & ~15u;
    return piece;
  }

 private:
  unsigned used_ = 0;
};

WEFT_DEVICE void barrier() { __syncthreads(); }

// For a loop that waits for other blocks or for a copy, since `clock64()` was `start`: after some
// 20 seconds the kernel ends with an error, so that a fault in it does not hold the card for ever.
WEFT_DEVICE void stop_if_stuck(long long start) {
  constexpr long long kStuckCycles = 1LL << 35;
  if (clock64() - start > kStuckCycles) __trap();
}

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Values of up to 16 bytes travel as 32-bit words.
template <class T, class Exchange>
WEFT_DEVICE T exchange_words(T value, Exchange exchange) {
  constexpr int kWords = (sizeof(T) + 3) / 4;
  union {
    T value;
    unsigned word[kWords];
  } box{};
  box.value = value;
#pragma unroll
  for (int i = 0; i < kWords; ++i) box.word[i] = exchange(box.word[i]);
  return box.value;
}

template <class T>
WEFT_DEVICE T shuffle(T value, int source) {
  return exchange_words(value, [=](unsigned w) { return __shfl_sync(kAllLanes, w, source); });
}
template <class T>
WEFT_DEVICE T shuffle_xor(T value, int mask) {
  return exchange_words(value, [=](unsigned w) { return __shfl_xor_sync(kAllLanes, w, mask); });
}
template <class T>
WEFT_DEVICE T shuffle_down(T value, int delta) {
  return exchange_words(value, [=](unsigned w) { return __shfl_down_sync(kAllLanes, w, delta); });
}
template <class T>
WEFT_DEVICE T shuffle_up(T value, int delta) {
  return exchange_words(value, [=](unsigned w) { return __shfl_up_sync(kAllLanes, w, delta); });
}
WEFT_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
WEFT_DEVICE bool any(bool predicate) { return __any_sync(kAllLanes, predicate); }
WEFT_DEVICE bool all(bool predicate) { return __all_sync(kAllLanes, predicate); }

template <class T>
WEFT_DEVICE T load(const T* address) {
  return *address;
}
template <class T>
WEFT_DEVICE void store(T* address, T value) {
  *address = value;
}

namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
}  // namespace detail

template <int N, class T>
WEFT_DEVICE Pack<T, N> load_pack(const T* address) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  union {
    Word word;
    Pack<T, N> pack;
  } box;
  box.word = *reinterpret_cast<const Word*>(address);
  return box.pack;
}
template <class T, int N>
WEFT_DEVICE void store(T* address, const Pack<T, N>& pack) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  union {
    Pack<T, N> pack;
    Word word;
  } box;
  box.pack = pack;
  *reinterpret_cast<Word*>(address) = box.word;
}

template <int Bytes>
WEFT_DEVICE void cp_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(destination), "l"(global),
                 "n"(Bytes)
                 : "memory");
  }
}
template <int Bytes>
WEFT_DEVICE void cp_async_or_zero(void* shared, const void* global, bool inside) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? Bytes : 0;  // what is read; the rest of the destination gets zeros
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(global),
                 "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}
WEFT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
WEFT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

inline void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("weft: launch of ") + kernel +
                           " failed: " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const Launch& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (config.blocks == 0) return;
  if (config.blocks > std::numeric_limits<int>::max())
    throw std::runtime_error(std::string("weft: launch of ") + config.kernel +
                             " needs more than 2^31 - 1 blocks");
  if (config.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.shared_bytes)),
          config.kernel);
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  }
  cudaLaunchConfig_t shape = {};
  shape.gridDim = dim3(static_cast<unsigned>(config.blocks));
  shape.blockDim = dim3(static_cast<unsigned>(config.threads));
  shape.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  shape.stream = static_cast<cudaStream_t>(config.stream);
  shape.attrs = attributes;
  shape.numAttrs = count;
  check(cudaLaunchKernelEx(&shape, kernel, static_cast<Parameters>(arguments)...), config.kernel);
}

}  // namespace weft::device
