// Adaptive average pooling on CPU, forward and backward; see pool_adaptive.h.
//
// Sums are added up in a cascade, so that a map of any size loses few bits. Backward: neighbouring
// input rows that the same outputs read have equal gradients, so a row is made once and copied.
#pragma once

#include "pool/pool_adaptive.h"

namespace weft::WEFT_TARGET {
namespace {

// kLanes<T> sums of any number of values.
template <class T>
struct SumState {
  using A = accumulate_t<T>;
  static constexpr int64_t kFold = 16;  // values after which a level is added to the next

  static constexpr A kNeutral = 0;

  Vec<A> low = {}, middle = {}, high = {};

  WEFT_INLINE void take(Vec<A> value, int64_t) { low += value; }
  // To be called after each kFold values, with how many there were.
  WEFT_INLINE void fold(int64_t count) {
    middle += low;
    low = Vec<A>{};
    if (count % (kFold * kFold) == 0) {
      high += middle;
      middle = Vec<A>{};
    }
  }
  WEFT_INLINE Vec<A> total() const { return high + (middle + low); }
};

template <class A>
WEFT_INLINE A sum_of_lanes(Vec<A> value) {
  A lane[kLanes<A>];
  memcpy(lane, &value, sizeof(value));
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Output rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_values(const PoolProblem& p, const T* x, T* y, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  BoxReader<T> boxes(p, x);
  Scratch<A> sum(round_up(p.in[2], kLanes<T>) + kLanes<T>);
  Scratch<SumState<T>> states(p.inner > 1 ? ceil_div(p.inner, kLanes<T>) : 0);
  for_each_row(p.out, begin, end, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
    boxes.select_rows(outer, od, oh);
    const int64_t height = boxes.rows.count;
    T* out = y + index * p.out[2] * p.inner;
    if (p.inner > 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        boxes.select_positions(ow);
        const auto divisor = broadcast<Vec<A>>(static_cast<A>(boxes.positions.count));
        reduce_positions(
            boxes.positions, p.inner, states.data(), [&](int64_t j, const SumState<T>& state) {
              store_row<SumOf<T>>(out + ow * p.inner, j, p.inner, state.total() / divisor);
            });
      }
    } else if (p.out[2] == 1) {
      SumState<T> states[kRunVectors];
      reduce_runs(boxes.rows, p.in[2], states);
      const A total = sum_of_lanes<A>((states[0].total() + states[1].total()) +
                                      (states[2].total() + states[3].total()));
      out[0] = narrow<T>(total / static_cast<A>(height * p.in[2]));
    } else if (height == 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const T* run = boxes.rows.address[0] + boxes.width.first[ow];
        const int64_t width = boxes.width.size[ow];
        const A total = sum_of_lanes<A>(reduce_run<SumOf<T>>(run, width, boxes.rows.end - run));
        out[ow] = narrow<T>(total / static_cast<A>(width));
      }
    } else {
      reduce_sources<SumState<T>>(boxes.rows, p.in[2], [&](int64_t j, const SumState<T>& state) {
        store_vec(sum.data() + j, state.total());
      });
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const A* column = sum.data() + boxes.width.first[ow];
        const int64_t width = boxes.width.size[ow];
        A total = 0;
        if (width < kLanes<A>) {
          for (int64_t k = 0; k < width; ++k) total += column[k];
        } else {
          total = sum_of_lanes<A>(reduce_run<SumOf<A>>(column, width, round_up(width, kLanes<A>)));
        }
        out[ow] = narrow<T>(total / static_cast<A>(height * width));
      }
    }
  });
}

// out [W, inner] = at each position the sums [outputs, inner] of the windows that hold it, of which
// there are at most as many as positions: neighbours then share one position, or none. `values` is
// for the sums as T.
template <class T, class A>
void repeat_row(const PoolProblem& p, const AxisBoxes& boxes, const A* sum, T* values, T* out) {
  const int64_t inner = p.inner;
  for (int64_t j = 0; j < p.out[2] * inner; ++j) values[j] = narrow<T>(sum[j]);
  int64_t w = 0;
  for (int64_t ow = 0; ow < p.out[2]; ++ow, sum += inner, values += inner) {
    if (boxes.first[ow] < w)
      for (int64_t c = 0; c < inner; ++c)
        out[(w - 1) * inner + c] = narrow<T>(sum[c - inner] + sum[c]);
    const int64_t end = boxes.first[ow] + boxes.size[ow];
    if (inner == 1) {
      const T value = *values;
      for (; w < end; ++w) out[w] = value;
    } else {
      for (; w < end; ++w) memcpy(static_cast<void*>(out + w * inner), values, inner * sizeof(T));
    }
  }
}

// Input rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_gradients(const PoolProblem& p, const T* gy, T* gx, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t inner = p.inner;
  const int64_t n = p.in[2] * inner;
  const AxisBoxes depth(p, 0), height(p, 1), width(p, 2);
  Scratch<A> sum(p.out[2] * inner);  // over the output rows that read this input row
  Scratch<A> spread(round_up(n, kLanes<T>));
  Scratch<T> values(p.out[2] * inner);
  Range ds{0, 0}, hs{0, 0};  // the outputs that read the row
  bool known = false;        // whether the row before this one has the same
  for_each_row(p.in, begin, end, [&](int64_t index, int64_t outer, int64_t d, int64_t h) {
    T* out = gx + index * n;
    if (d == 0 && h == 0) known = false;
    const auto ends = [](const AxisBoxes& boxes, const Range& range, int64_t at, int64_t outputs) {
      return range.end < outputs && boxes.first[range.end] <= at;
    };
    const auto starts = [](const AxisBoxes& boxes, const Range& range, int64_t at) {
      return range.begin < range.end && boxes.first[range.begin] + boxes.size[range.begin] <= at;
    };
    if (known && h > 0 && !ends(height, hs, h, p.out[1]) && !starts(height, hs, h)) {
      memcpy(static_cast<void*>(out), out - n, n * sizeof(T));
      return;
    }
    known = true;
    ds = outputs_covering(p.window[0], d, p.out[0]);
    hs = outputs_covering(p.window[1], h, p.out[1]);
    fill(sum.data(), p.out[2] * inner, A{0});
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const T* row = gy + ((outer * p.out[0] + od) * p.out[1] + oh) * p.out[2] * inner;
        for (int64_t ow = 0; ow < p.out[2]; ++ow) {
          const A divisor = static_cast<A>(depth.size[od] * height.size[oh] * width.size[ow]);
          for (int64_t c = 0; c < inner; ++c)
            sum[ow * inner + c] += widen(row[ow * inner + c]) / divisor;
        }
      }
    if (p.out[2] > 0 && p.out[2] <= p.in[2])
      return repeat_row(p, width, sum.data(), values.data(), out);
    fill(spread.data(), n, A{0});
    for (int64_t ow = 0; ow < p.out[2]; ++ow) {
      A* window = spread.data() + width.first[ow] * inner;
      const A* value = sum.data() + ow * inner;
      if (inner == 1) {
        for (int64_t w = 0; w < width.size[ow]; ++w) window[w] += *value;
      } else {
        for (int64_t w = 0; w < width.size[ow]; ++w)
          for (int64_t c = 0; c < inner; ++c) window[w * inner + c] += value[c];
      }
    }
    for (int64_t j = 0; j < n; j += kLanes<T>)
      store_row<SumOf<T>>(out, j, n, load_vec(spread.data() + j));
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
