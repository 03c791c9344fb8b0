// Maximum pooling with places on CPU as two passes over rows, and the backward that gathers.
//
// A row is [W, inner], contiguous in both layouts. The first pass reduces a row over the window's
// W axis, the second reduces such results over the window's D and H axes: the order of the window,
// which decides between equal values. Sources have unit stride:
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

#include "pool/pool.h"
#include "pool/pool_reduce.h"

namespace weft::WEFT_TARGET {
namespace {

// The integer that has as many lanes in a vector as the accumulation type of T.
template <class T>
using lane_int = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

template <class T>
WEFT_INLINE void widen_row(const T* row, int64_t count, accumulate_t<T>* out) {
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) store_vec(out + j, load_vec(row + j));
  for (; j < count; ++j) out[j] = widen(row[j]);
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
        widen_row(row + w * inner_, inner_,
                  data_.data() + t % stride * pitch_ + t / stride * inner_);
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
  Scratch<int64_t> row;   // d*H + h
  Scratch<int64_t> slot;  // of the ring
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

// Walks output rows [begin, end) of [outer, D, H]. For each one `first_pass(x_row, slot)` has run
// on every row of its windows, then second_pass(output row index, od, oh, rows) runs.
template <class T, class First, class Second>
WEFT_INLINE void walk_rows(const PoolProblem& p, const T* x, int64_t begin, int64_t end,
                           const First& first_pass, const Second& second_pass) {
  WindowRows rows(p);
  const int64_t row_elements = p.in[2] * p.inner;
  Scratch<int64_t> held(WindowRows::ring_rows(p));  // which input row each slot holds
  fill(held.data(), WindowRows::ring_rows(p), int64_t{-1});
  for (int64_t index = begin; index < end; ++index) {
    const int64_t oh = index % p.out[1];
    const int64_t od = index / p.out[1] % p.out[0];
    const int64_t outer = index / (p.out[1] * p.out[0]);
    rows.select(p, od, oh);
    for (int64_t k = 0; k < rows.count; ++k) {
      const int64_t row = outer * p.in[0] * p.in[1] + rows.row[k];
      if (held[rows.slot[k]] == row) continue;
      first_pass(x + row * row_elements, rows.slot[k]);
      held[rows.slot[k]] = row;
    }
    second_pass(index, od, oh, rows);
  }
}
}  // namespace
}  // namespace weft::WEFT_TARGET
