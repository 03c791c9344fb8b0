// Hopper's words as the hardware's own instructions. See device/hopper.h.
//
// Compiled for any other architecture than sm_90a a word is a trap: launchers ask for
// sm90a_multiprocessors() first.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "device/hopper.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WEFT_SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define WEFT_SM90A_ASM(...) __trap()
#endif

#include "device/wgmma_cuda.h"

namespace weft::device {

// The multiprocessors of the current device, if it executes sm_90a and this build has code for it;
// else 0.
inline int sm90a_multiprocessors() {
#if WEFT_WITH_SM90A
  int device = 0;
  check(cudaGetDevice(&device), "sm90a_multiprocessors");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "sm90a_multiprocessors");
    return value;
  };
  const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
                      attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  return hopper ? attribute(cudaDevAttrMultiProcessorCount) : 0;
#else
  return 0;
#endif
}

namespace detail {
WEFT_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
}  // namespace detail

// ---- barriers that count bytes ---------------------------------------------------------------

class MBarrier {
 public:
  WEFT_DEVICE void init(int arrivals) {
    WEFT_SM90A_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()),
                   "r"(arrivals) : "memory");
    WEFT_SM90A_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");  // for TMA to see it
  }
  WEFT_DEVICE void arrive() {
    WEFT_SM90A_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  WEFT_DEVICE void arrive_expect(int bytes) {
    WEFT_SM90A_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                   "r"(bytes) : "memory");
  }
  WEFT_DEVICE void wait(int parity) {
    unsigned complete = 0;
    const long long start = clock64();
    do {  // the instruction itself sleeps for a while
      stop_if_stuck(start);
      WEFT_SM90A_ASM(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}" : "=r"(complete) : "r"(address()),
          "r"(parity) : "memory");
    } while (complete == 0);
  }
  WEFT_DEVICE unsigned address() const { return detail::shared_address(this); }

 private:
  uint64_t state_;
};

// ---- copies of boxes -------------------------------------------------------------------------

struct TensorMap {
  CUtensorMap map;
};

namespace detail {

// The driver's function, found at run time: nothing links to libcuda.
template <class Function>
Function driver_function(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  device::check(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found),
                name);
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("weft: the CUDA driver has no ") + name);
  return reinterpret_cast<Function>(address);
}

inline void check_driver(CUresult status, const char* name) {
  if (status == CUDA_SUCCESS) return;
  throw std::runtime_error(std::string("weft: ") + name + " failed with error " +
                           std::to_string(static_cast<int>(status)));
}

inline CUtensorMapDataType tensor_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::f64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case DType::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::f16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

// Extents, and the steps in bytes of all axes but the fastest.
struct DriverView {
  cuuint64_t extent[5];
  cuuint64_t step[4];

  explicit DriverView(const TensorView& t) {
    for (int a = 0; a < t.rank; ++a) extent[a] = static_cast<cuuint64_t>(t.extent[a]);
    for (int a = 1; a < t.rank; ++a)
      step[a - 1] = static_cast<cuuint64_t>(t.step[a] * size_of(t.dtype));
  }
};

}  // namespace detail

inline TensorMap tensor_map(const TensorView& tensor, const TileBox& box) {
  check_map(tensor, box);
  static const auto encode =
      detail::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const detail::DriverView view(tensor);
  cuuint32_t extent[4];
  const cuuint32_t every[4] = {1, 1, 1, 1};
  for (int a = 0; a < tensor.rank; ++a) extent[a] = static_cast<cuuint32_t>(box.extent[a]);
  TensorMap result;
  detail::check_driver(
      encode(&result.map, detail::tensor_type(tensor.dtype), static_cast<cuuint32_t>(tensor.rank),
             const_cast<void*>(tensor.base), view.extent, view.step, extent, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeTiled");
  return result;
}

inline TensorMap tensor_map(const TensorView& tensor, const WindowBox& box) {
  check_map(tensor, box);
  static const auto encode =
      detail::driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const detail::DriverView view(tensor);
  cuuint32_t every[5] = {1, 1, 1, 1, 1};
  for (int a = 0; a < tensor.rank - 2; ++a) every[a + 1] = static_cast<cuuint32_t>(box.stride[a]);
  TensorMap result;
  detail::check_driver(
      encode(&result.map, detail::tensor_type(tensor.dtype), static_cast<cuuint32_t>(tensor.rank),
             const_cast<void*>(tensor.base), view.extent, view.step, box.lower, box.upper,
             static_cast<cuuint32_t>(box.channels), static_cast<cuuint32_t>(box.pixels), every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeIm2col");
  return result;
}

#define WEFT_OFFSET(axis) "h"(static_cast<unsigned short>(at.offset[axis]))
#define WEFT_TMA(rank, mode) \
  "cp.async.bulk.tensor." rank ".shared::cluster.global" mode ".mbarrier::complete_tx::bytes"

WEFT_DEVICE void tma_load(void* shared, const TensorMap& map, MBarrier& barrier, int c0, int c1) {
  WEFT_SM90A_ASM(
      WEFT_TMA("2d", ".tile") " [%0], [%1, {%3, %4}], [%2];" ::"r"(detail::shared_address(shared)),
      "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1) : "memory");
}
WEFT_DEVICE void tma_load(void* shared, const TensorMap& map, MBarrier& barrier, int c0, int c1,
                          int c2) {
  WEFT_SM90A_ASM(WEFT_TMA("3d", ".tile") " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                     detail::shared_address(shared)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
WEFT_DEVICE void tma_load(void* shared, const TensorMap& map, MBarrier& barrier, int c0, int c1,
                          int c2, int c3) {
  WEFT_SM90A_ASM(WEFT_TMA("4d", ".tile") " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                     detail::shared_address(shared)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2),
                 "r"(c3) : "memory");
}

template <int Rank>
WEFT_DEVICE void tma_load_im2col(void* shared, const TensorMap& map, MBarrier& barrier,
                                 const WindowAt& at) {
  static_assert(Rank >= 3 && Rank <= 5);
  if constexpr (Rank == 3) {
    WEFT_SM90A_ASM(WEFT_TMA("3d", ".im2col") " [%0], [%1, {%3, %4, %5}], [%2], {%6};" ::"r"(
                       detail::shared_address(shared)),
                   "l"(&map.map), "r"(barrier.address()), "r"(at.channel), "r"(at.base[0]),
                   "r"(at.image), WEFT_OFFSET(0) : "memory");
  } else if constexpr (Rank == 4) {
    WEFT_SM90A_ASM(WEFT_TMA("4d", ".im2col") " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(
                       detail::shared_address(shared)),
                   "l"(&map.map), "r"(barrier.address()), "r"(at.channel), "r"(at.base[0]),
                   "r"(at.base[1]), "r"(at.image), WEFT_OFFSET(0), WEFT_OFFSET(1) : "memory");
  } else {
    WEFT_SM90A_ASM(
        WEFT_TMA("5d", ".im2col") " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(
            detail::shared_address(shared)),
        "l"(&map.map), "r"(barrier.address()), "r"(at.channel), "r"(at.base[0]), "r"(at.base[1]),
        "r"(at.base[2]), "r"(at.image), WEFT_OFFSET(0), WEFT_OFFSET(1), WEFT_OFFSET(2) : "memory");
  }
}

#undef WEFT_OFFSET
#undef WEFT_TMA

WEFT_DEVICE void fence_async() { WEFT_SM90A_ASM("fence.proxy.async.shared::cta;" :: : "memory"); }

// ---- products of a warpgroup -----------------------------------------------------------------

namespace detail {

// Keeps the compiler from moving accesses to the sums across this place.
template <int N>
WEFT_DEVICE void pin(WgmmaSums<N>& sums) {
#pragma unroll
  for (int i = 0; i < WgmmaSums<N>::kCount; ++i) asm volatile("" : "+f"(sums.value[i])::"memory");
}

// PTX ISA, "Matrix descriptor": address, leading and stride offset in units of 16 bytes; 128-byte
// swizzle. Rows along the reduction: the stride is that of 8 rows, the leading one is not read.
// Rows along columns: the stride is that of 8 rows, the leading one that of 64 columns.
WEFT_DEVICE uint64_t matrix_descriptor(const void* shared, int leading_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = 8 * kBoxRowBytes / 16;
  return (shared_address(shared) & 0x3FFFFu) >> 4 |
         static_cast<uint64_t>(leading_bytes / 16) << 16 | kStride << 32 | kSwizzle128;
}

}  // namespace detail

template <int N>
WEFT_DEVICE void wgmma_fence(WgmmaSums<N>& sums) {
  detail::pin(sums);
  WEFT_SM90A_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}

template <class T, Major kMajorB = Major::reduction, Major kMajorA = Major::reduction, int N>
WEFT_DEVICE void wgmma(WgmmaSums<N>& sums, const T* a, const T* b) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static_assert(kMajorB == Major::reduction || N % 64 == 0);
  constexpr bool kAColumns = kMajorA == Major::columns, kBColumns = kMajorB == Major::columns;
  constexpr int kPiece = 64 * kBoxRowBytes;
  detail::wgmma_of<std::is_same_v<T, bf16>, kBColumns, kAColumns>(
      sums, detail::matrix_descriptor(a, kAColumns ? kPiece : 16),
      detail::matrix_descriptor(b, kBColumns ? kPiece : 16));
}

WEFT_DEVICE void wgmma_commit() {
  WEFT_SM90A_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}

template <int Pending, int N>
WEFT_DEVICE void wgmma_wait(WgmmaSums<N>& sums) {
  static_assert(Pending >= 0 && Pending <= 7);
  WEFT_SM90A_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  detail::pin(sums);
}

}  // namespace weft::device
