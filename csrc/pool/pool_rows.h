// The window walk on CPU as two passes over rows.
//
// A row is [W, inner], contiguous in both layouts. The first pass reduces a row over the window's
// W axis, the second reduces such results over the window's D and H axes. Both are the same loop,
// out[j] = reduce_k source_k[j], with unit stride in every source:
//
//   a row is first split into `stride` phases, phase q holding the padded positions i*stride + q,
//   so that window place s of output i lies in phase (s*dilation) % stride at
//   i + (s*dilation) / stride, whatever the stride, the layout or the dtype (halves are widened on
//   the way). Padding is written once and stays.
//
// The first pass's results live in a ring of as many rows as a window spans, so overlapping windows
// share them: an output costs size_W + size_D*size_H vector operations, not their product.
#pragma once

#include <type_traits>

#include "core/scratch.h"
#include "core/simd.h"
#include "pool/pool.h"

namespace weft::WEFT_TARGET {
namespace {

// The integer that has as many lanes in a vector as the accumulation type of T.
template <class T>
using lane_int = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Even and odd elements of the pair (a, b).
template <class V>
WEFT_INLINE void deinterleave(V a, V b, V& even, V& odd) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 2) {
    even = __builtin_shufflevector(a, b, 0, 2);
    odd = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (kCount == 4) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else if constexpr (kCount == 8) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    static_assert(kCount == 16);
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// The inverse: low and high halves of a0 b0 a1 b1 ...
template <class V>
WEFT_INLINE void interleave(V a, V b, V& low, V& high) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 2) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (kCount == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (kCount == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(kCount == 16);
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  }
}

// A row of elements split into phases.
template <class T>
class PhaseRow {
 public:
  using A = accumulate_t<T>;

  // `positions` of input, walked by `window` for `outputs`; padding reads as `padding_value`.
  PhaseRow(const Window& window, int64_t positions, int64_t outputs, int64_t inner, A padding_value)
      : window_(window),
        positions_(positions),
        inner_(inner),
        length_(outputs + window.dilation * (window.size - 1) / window.stride),
        pitch_(round_up(length_ * inner, kLanes<T>) + kLanes<T>),
        data_(pitch_ * window.stride) {
    fill(data_.data(), pitch_ * window.stride, padding_value);
  }

  // Where output 0 finds its window place `s`; output i, channel c is i*inner + c further.
  const A* place(int64_t s) const {
    const int64_t offset = s * window_.dilation;
    return data_.data() + offset % window_.stride * pitch_ + offset / window_.stride * inner_;
  }

  void split(const T* row) {
    const int64_t stride = window_.stride;
    const int64_t padding = window_.padding;
    // The last positions of a row may belong to no window.
    const int64_t reach = length_ * stride - padding;
    const int64_t end = positions_ < reach ? positions_ : reach;
    if (stride == 1) {
      widen_row(row, end * inner_, data_.data() + padding * inner_);
    } else if (inner_ > 1) {
      for (int64_t w = 0; w < end; ++w) {
        const int64_t t = w + padding;
        widen_row(row + w * inner_, inner_, data_.data() + t % stride * pitch_ + t / stride * inner_);
      }
    } else if (stride == 2) {
      split_in_two(row, end);
    } else {
      for (int64_t q = 0; q < stride; ++q) {
        A* phase = data_.data() + q * pitch_;
        const int64_t first = q >= padding ? 0 : ceil_div(padding - q, stride);
        for (int64_t i = first, w = first * stride + q - padding; w < end; ++i, w += stride)
          phase[i] = widen(row[w]);
      }
    }
  }

 private:
  static void widen_row(const T* row, int64_t count, A* out) {
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) store_vec(out + j, load_vec(row + j));
    for (; j < count; ++j) out[j] = widen(row[j]);
  }

  void split_in_two(const T* row, int64_t end) {
    const int64_t padding = window_.padding;
    A* even = data_.data();
    A* odd = data_.data() + pitch_;
    int64_t w = 0;
    if (padding % 2 == 1 && end > 0) odd[padding / 2] = widen(row[w++]);
    int64_t i = (w + padding) / 2;
    for (; w + 2 * kLanes<T> <= end; w += 2 * kLanes<T>, i += kLanes<T>) {
      Vec<A> a, b;
      deinterleave(load_vec(row + w), load_vec(row + w + kLanes<T>), a, b);
      store_vec(even + i, a);
      store_vec(odd + i, b);
    }
    for (; w < end; w += 2, ++i) {
      even[i] = widen(row[w]);
      if (w + 1 < end) odd[i] = widen(row[w + 1]);
    }
  }

  const Window window_;
  const int64_t positions_;
  const int64_t inner_;
  const int64_t length_;  // positions of a phase
  const int64_t pitch_;   // elements of a phase, with room for whole vectors
  Scratch<A> data_;
};

// Which input rows the window of one output row reads: `count` pairs (slot, place), place being the
// window's i*size_H + j, in ascending order.
struct WindowRows {
  int64_t count = 0;
  Scratch<int64_t> row;    // d*H + h
  Scratch<int64_t> slot;   // of the ring
  Scratch<int64_t> place;

  explicit WindowRows(const PoolProblem& p)
      : row(p.window[0].size * p.window[1].size),
        slot(p.window[0].size * p.window[1].size),
        place(p.window[0].size * p.window[1].size) {}

  // The ring holds, per place i of the D axis, as many rows as a window spans on the H axis.
  static int64_t ring_height(const PoolProblem& p) {
    return p.window[1].span() < p.in[1] ? p.window[1].span() : p.in[1];
  }
  static int64_t ring_rows(const PoolProblem& p) { return p.window[0].size * ring_height(p); }

  void select(const PoolProblem& p, int64_t od, int64_t oh) {
    const Range kd = places_inside(p.window[0], od, p.in[0]);
    const Range kh = places_inside(p.window[1], oh, p.in[1]);
    const int64_t height = ring_height(p);
    count = 0;
    for (int64_t i = kd.begin; i < kd.end; ++i)
      for (int64_t j = kh.begin; j < kh.end; ++j, ++count) {
        const int64_t d = p.window[0].first_input(od) + i * p.window[0].dilation;
        const int64_t h = p.window[1].first_input(oh) + j * p.window[1].dilation;
        row[count] = d * p.in[1] + h;
        slot[count] = i * height + h % height;
        place[count] = i * p.window[1].size + j;
      }
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
