// Pooling as plain data.
//
// A contiguous tensor [N, C, D, H, W] and a channels-last one are both an array
// [outer, D, H, W, inner]: contiguous has outer = N*C and inner = 1, channels-last outer = N and
// inner = C. 1-d and 2-d problems have unit axes in front.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"
#include "pool/pool_window.h"

namespace weft {

struct PoolProblem {
  DType dtype = DType::f32;
  int64_t outer = 1;
  int64_t inner = 1;
  int64_t in[3] = {1, 1, 1};   // D, H, W of the input
  int64_t out[3] = {1, 1, 1};  // of the output
  PoolWindow window[3];

  // Average pooling: every window is divided by `divisor` if that is not 0, else by its number of
  // elements, with those that lie in the padding if `count_include_pad`.
  int64_t divisor = 0;
  bool count_include_pad = true;

  // Adaptive windows: all axes have them, or none.
  constexpr bool adaptive() const { return window[2].adaptive(); }
  constexpr int64_t in_positions() const { return in[0] * in[1] * in[2]; }
  constexpr int64_t out_positions() const { return out[0] * out[1] * out[2]; }
  constexpr int64_t in_elements() const { return outer * in_positions() * inner; }
  constexpr int64_t out_elements() const { return outer * out_positions() * inner; }
  constexpr int64_t window_elements() const {
    return window[0].size * window[1].size * window[2].size;
  }
  // Max pooling keeps, per output, the place of the maximum inside its window, row by row: one byte
  // where that is enough, otherwise four.
  constexpr int place_bytes() const { return window_elements() <= 256 ? 1 : 4; }
};

// The elements of the average windows at `output` on one axis; the divisor is their product.
WEFT_HD int64_t pool_count(const PoolProblem& p, int axis, int64_t output) {
  const PoolWindow& window = p.window[axis];
  if (window.adaptive()) return places_inside(window, output, p.in[axis]).end;
  int64_t begin = window.first_input(output);
  int64_t end = begin + window.size;
  // With ceil_mode a window may run past the padding; that part never counts.
  const int64_t limit = p.in[axis] + (p.count_include_pad ? window.padding : 0);
  if (end > limit) end = limit;
  if (!p.count_include_pad && begin < 0) begin = 0;
  return end - begin;
}

// The average window's divisor, for the output at (d, h, w).
WEFT_HD int64_t pool_divisor(const PoolProblem& p, int64_t d, int64_t h, int64_t w) {
  if (p.divisor != 0) return p.divisor;
  return pool_count(p, 0, d) * pool_count(p, 1, h) * pool_count(p, 2, w);
}

// Pointers are to elements of `dtype`; places to 1- or 4-byte unsigned integers.
struct PoolKernels {
  // y [out] = max of each window; places [out] may be null. Ties: the first place; NaN: the last.
  void (*max_forward)(const PoolProblem&, const void* x, void* y, void* places, const Context&);
  // gx [in] = for each input the sum of gy [out] over the windows whose maximum it is.
  void (*max_backward)(const PoolProblem&, const void* gy, const void* places, void* gx,
                       const Context&);
  // y [out] = x at each window's place: the transpose of max_backward.
  void (*max_pick)(const PoolProblem&, const void* x, const void* places, void* y, const Context&);
  // indices [out] = flat index of each window's place in the [D, H, W] map, as torch counts.
  void (*max_indices)(const PoolProblem&, const void* places, int64_t* indices, const Context&);
  // y [out] = sum of each window / its divisor.
  void (*avg_forward)(const PoolProblem&, const void* x, void* y, const Context&);
  // gx [in] = for each input the sum of gy / divisor over the windows that hold it.
  void (*avg_backward)(const PoolProblem&, const void* gy, void* gx, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(PoolKernels, pool_kernels)

}  // namespace weft
