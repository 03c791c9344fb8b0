// Words of the device vocabulary that only Hopper (sm_90a) has: barriers that count bytes, copies
// of whole boxes by the tensor memory accelerator (TMA), matrix products of a warpgroup.
//
//   MBarrier b                   in shared memory, taken as MBarrier; its phases have parity 0, 1,
//                                0, ...
//   b.init(arrivals)             by one thread, before a barrier() of the block
//   b.arrive()                   one of the arrivals that the open phase needs
//   b.arrive_expect(n)           the same, and the phase needs n bytes more
//   b.wait(parity)               until the latest phase of that parity is complete: all arrivals
//                                made, all bytes landed
//   tensor_map(tensor, box)      on the host: what copies read, for a parameter of the kernel that
//                                is declared WEFT_CONSTANT TensorMap
//   tma_load(shared, map, b, c0, c1, ...)
//                                one thread copies a box; its corner, fastest axis first
//   tma_load_im2col<Rank>(shared, map, b, at)
//                                one thread copies the pixels that windows see, one place of each;
//                                the bytes of both land in the open phase of b
//   fence_async()                ordinary stores to shared memory come before what wgmma and TMA
//                                do there after the next barrier
//   WgmmaSums<N> sums            64 x N sums of a warpgroup: four warps, the first a multiple of 4
//   wgmma_fence(sums)            before the first wgmma on sums that the thread has touched
//   wgmma<T>(sums, a, b)         sums += a · b, 16 deep, of T = bf16, f16; goes on in background
//   wgmma_commit()               ends a group of products ...
//   wgmma_wait<Pending>(sums)    ... and waits until that many of the latest groups are pending;
//                                sums and operands may be touched once no product on them is
//
// How boxes lie in shared memory, and operands (PTX ISA, "Swizzling modes" and "Shared memory
// matrix layout"): rows of 128 bytes one after another, from a multiple of 1024 on; in row r the 16
// bytes with index i are found at index i ^ (r % 8). Rows are 64 elements of 16 bits.
//
//   a, b                         row m (n) holds 64 places of the reduction; the address of place
//                                0, 16, 32 or 48 in row 0 chooses the 16
//   b of wgmma<T, Major::columns>
//                                row k holds 64 columns, the next 64 are in a piece 64 rows (8192
//                                bytes) further on; the address is that of row 0, 16, 32 or 48. N
//                                is a multiple of 64
//   a of wgmma<T, Major::columns, Major::columns>
//                                so does row k of it its 64 rows
#pragma once

#include <stdexcept>
#include <string>

#include "device/device.h"
#include "device/hopper_facts.h"

namespace weft::device {

// A tensor in global memory: extents and steps in elements, the fastest axis, of step 1, first.
struct TensorView {
  const void* base = nullptr;
  DType dtype = DType::bf16;
  int rank = 2;
  int64_t extent[5] = {1, 1, 1, 1, 1};
  int64_t step[5] = {1, 0, 0, 0, 0};
};

// What tma_load brings; zeros where it lies outside the tensor.
struct TileBox {
  int extent[4] = {1, 1, 1, 1};
};

// What tma_load_im2col brings of a tensor [image, (D, (H,)) W, channel]: `pixels` pixels with
// `channels` channels each, in the order in which windows of stride `stride` walk over the images.
// The base of a window, its place 0, runs from `lower` to extent - 1 + `upper` on each axis (W, H,
// D). Zeros where a pixel lies outside the image.
struct WindowBox {
  int lower[3] = {0, 0, 0};
  int upper[3] = {0, 0, 0};
  int stride[3] = {1, 1, 1};
  int channels = 64;
  int pixels = 64;
};

// Where a copy of windows begins: channel, base of the first window (W, H, D), image, and the place
// of all windows, as its distance from their bases.
struct WindowAt {
  int channel = 0;
  int base[3] = {0, 0, 0};
  int image = 0;
  int offset[3] = {0, 0, 0};
};

namespace detail {

inline void require(bool holds, const char* what, int64_t got) {
  if (holds) return;
  throw std::invalid_argument("weft: tensor map: expected " + std::string(what) + ", got " +
                              std::to_string(got));
}

inline void check_tensor(const TensorView& t, int least_rank, int most_rank) {
  require(t.rank >= least_rank && t.rank <= most_rank, "another rank", t.rank);
  require(reinterpret_cast<uintptr_t>(t.base) % 16 == 0, "an address aligned to 16 bytes",
          static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.base) % 16));
  require(t.step[0] == 1, "a fastest axis of step 1", t.step[0]);
  for (int a = 0; a < t.rank; ++a)
    require(t.extent[a] >= 1 && t.extent[a] <= int64_t{1} << 32, "extents of 1 to 2^32",
            t.extent[a]);
  for (int a = 1; a < t.rank; ++a) {
    const int64_t bytes = t.step[a] * size_of(t.dtype);
    require(bytes % 16 == 0 && bytes >= 0 && bytes < int64_t{1} << 40,
            "steps of a multiple of 16 bytes, below 2^40", bytes);
  }
}

}  // namespace detail

// std::invalid_argument where the hardware has no such map.
inline void check_map(const TensorView& tensor, const TileBox& box) {
  using detail::require;
  detail::check_tensor(tensor, 2, 4);
  require(box.extent[0] * size_of(tensor.dtype) == kBoxRowBytes, "a box with rows of 128 bytes",
          box.extent[0] * size_of(tensor.dtype));
  for (int a = 1; a < tensor.rank; ++a)
    require(box.extent[a] >= 1 && box.extent[a] <= 256, "a box of 1 to 256 on each axis",
            box.extent[a]);
}

inline void check_map(const TensorView& tensor, const WindowBox& box) {
  using detail::require;
  detail::check_tensor(tensor, 3, 5);
  require(box.channels * size_of(tensor.dtype) == kBoxRowBytes, "a box with rows of 128 bytes",
          box.channels * size_of(tensor.dtype));
  require(box.pixels >= 1 && box.pixels <= 1024, "a box of 1 to 1024 pixels", box.pixels);
  const int64_t limit = window_box_limit(tensor.rank);
  for (int a = 0; a < tensor.rank - 2; ++a) {
    for (int corner : {box.lower[a], box.upper[a]})
      require(corner >= -limit && corner < limit, "corners within the limits of the rank", corner);
    require(box.stride[a] >= 1 && box.stride[a] <= kMostWindowStride, "a stride of 1 to 8",
            box.stride[a]);
    require(box.lower[a] < tensor.extent[a + 1] + box.upper[a], "a box that holds a window",
            tensor.extent[a + 1] + box.upper[a] - box.lower[a]);
  }
}

// The sums of a warpgroup's 64 x N tile that one of its threads holds.
template <int N>
struct WgmmaSums {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma makes 8, 16, ... 256 columns");
  static constexpr int kCount = N / 2;
  float value[kCount];

  WEFT_DEVICE void clear() {
    WEFT_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = 0;
  }

  // Where value i belongs (PTX ISA, "Register fragments for wgmma", matrix D).
  static WEFT_DEVICE int row(int i) {
    return thread_index() / 32 % 4 * 16 + lane() / 4 + i / 2 % 2 * 8;
  }
  static WEFT_DEVICE int column(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }
};

// What lies together in the rows of wgmma's second operand.
enum class Major : uint8_t { reduction, columns };

}  // namespace weft::device

#if defined(__CUDACC__)
#include "device/hopper_cuda.h"
#else
#include "device/hopper_host.h"
#endif
