// Adaptive maximum pooling on CPU, with places or without; see pool_adaptive.h.
//
// Maps of one row take two steps: the maxima of as many windows as a vector has lanes, by
// transposing, and then the place of each, where it first equals its window's element.
#pragma once

#include <limits>

#include "pool/pool_adaptive.h"

namespace weft::WEFT_TARGET {
namespace {

// kLanes<T> maxima and the places that they came with: the first of equal ones, the last NaN.
template <class T>
struct MaxState {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  static constexpr int64_t kFold = 16;
  static constexpr A kNeutral = -std::numeric_limits<A>::infinity();

  Vec<A> best = broadcast<Vec<A>>(kNeutral);
  Vec<I> place = {};

  WEFT_INLINE void take(Vec<A> value, int64_t value_place) {
    const auto replace = (value > best) | (value != value);
    best = replace ? value : best;
    place = replace ? broadcast<Vec<I>>(static_cast<I>(value_place)) : place;
  }
  WEFT_INLINE void fold(int64_t) {}
};

template <class A>
struct Best {
  A value = -std::numeric_limits<A>::infinity();
  int64_t place = std::numeric_limits<int64_t>::max();

  // In any order of places.
  WEFT_INLINE void take(A other, int64_t other_place) {
    const bool nan = value != value;
    const bool other_nan = other != other;
    const bool replace = other_nan
                             ? !nan || other_place > place
                             : !nan && (other > value || (other == value && other_place < place));
    value = replace ? other : value;
    place = replace ? other_place : place;
  }
};

// The maximum of `count` columns whose places ascend by one from column to column. Whole vectors of
// both arrays exist.
template <class A, class I>
WEFT_INLINE Best<A> best_column(const A* value, const I* place, int64_t count) {
  using Op = MaxOf<A>;
  A lanes[kLanes<A>];
  store_vec(lanes, reduce_run<Op>(value, count, round_up(count, kLanes<A>)));
  A best = lanes[0];
  for (int l = 1; l < kLanes<A>; ++l) best = best >= lanes[l] ? best : lanes[l];
  bool nan = false;
  for (int l = 0; l < kLanes<A>; ++l) nan |= lanes[l] != lanes[l];
  if (nan) {
    Best<A> result;
    for (int64_t k = 0; k < count; ++k) result.take(value[k], place[k] + k);
    return result;
  }
  constexpr I kNone = std::numeric_limits<I>::max();
  Vec<I> first = broadcast<Vec<I>>(kNone);
  Vec<I> lane;
  for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
  for (int64_t k = 0; k < count; k += kLanes<A>) {
    const auto mine = load_lanes(place + k) + lane + static_cast<I>(k);
    const auto equal = (load_lanes(value + k) == best) & lanes_before<A>(count - k);
    first = equal & (mine < first) ? mine : first;
  }
  I least = first[0];
  for (int l = 1; l < kLanes<A>; ++l) least = first[l] < least ? first[l] : least;
  return {best, least};
}

template <class Place, class I>
WEFT_INLINE void store_place_row(Place* row, int64_t j, int64_t n, Vec<I> place) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(I));
  using Narrow = typename vector_of<Place, kCount>::type;
  const Narrow places = __builtin_convertvector(place, Narrow);
  memcpy(row + j, &places, (n - j < kCount ? n - j : kCount) * sizeof(Place));
}

// Windows of maps that are one row: as many as have lanes are reduced at once, then each maximum is
// looked for. Rows [begin, end); `places` may be null.
template <class T, class Place>
void adaptive_row_maxima(const PoolProblem& p, const T* x, T* y, Place* places, int64_t begin,
                         int64_t end) {
  using Op = MaxOf<T>;
  const AxisBoxes width(p, 2);
  const int64_t outputs = p.out[2];
  const T* run[Op::kWidth];
  int64_t size[Op::kWidth];
  typename Op::V values[Op::kWidth];
  const T* row = x + begin * p.in[2];
  int64_t ow = 0;
  for (int64_t first = begin * outputs; first < end * outputs; first += Op::kWidth) {
    const int64_t left = end * outputs - first;
    const int64_t count = left < Op::kWidth ? left : Op::kWidth;
    for (int64_t l = 0; l < Op::kWidth; ++l) {
      values[l] = broadcast<typename Op::V>(Op::kNeutral);
      if (l >= count) continue;
      run[l] = row + width.first[ow];
      size[l] = width.size[ow];
      values[l] = reduce_run<Op>(run[l], size[l], x + p.in_elements() - run[l]);
      if (++ow < outputs) continue;
      ow = 0;
      row += p.in[2];
    }
    store_row<Op>(y + first, 0, count, reduce_lanes<Op>(values));
    if (places == nullptr) continue;
    for (int64_t l = 0; l < count; ++l)
      places[first + l] = static_cast<Place>(place_in_run(run[l], size[l], widen(y[first + l])));
  }
}

// Output rows [begin, end) of [outer, D, H]; `places` may be null.
template <class T, class Place>
void adaptive_max_values(const PoolProblem& p, const T* x, T* y, Place* places, int64_t begin,
                         int64_t end) {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  const int64_t n = p.out[2] * p.inner;
  BoxReader<T> boxes(p, x);
  const int64_t columns = round_up(p.in[2], kLanes<T>) + kLanes<T>;
  Scratch<A> best(columns);
  Scratch<I> place(columns);
  Scratch<MaxState<T>> states(p.inner > 1 ? ceil_div(p.inner, kLanes<T>) : 0);
  for_each_row(p.out, begin, end, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
    boxes.select_rows(outer, od, oh);
    T* out = y + index * n;
    Place* out_places = places == nullptr ? nullptr : places + index * n;
    const auto emit = [&](int64_t j, const Best<A>& b) {
      out[j] = narrow<T>(b.value);
      if (out_places != nullptr) out_places[j] = static_cast<Place>(b.place);
    };
    if (p.inner > 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        boxes.select_positions(ow);
        const int64_t at = ow * p.inner;
        reduce_positions(boxes.positions, p.inner, states.data(),
                         [&](int64_t j, const MaxState<T>& state) {
                           store_row<SumOf<T>>(out + at, j, p.inner, state.best);
                           if (out_places != nullptr)
                             store_place_row<Place, I>(out_places + at, j, p.inner, state.place);
                         });
      }
    } else if (p.out[2] == 1) {
      MaxState<T> states[kRunVectors];
      reduce_runs(boxes.rows, p.in[2], states);
      A lanes[kRunVectors * kLanes<T>];
      I lane_places[kRunVectors * kLanes<T>];
      for (int v = 0; v < kRunVectors; ++v) {
        store_vec(lanes + v * kLanes<T>, states[v].best);
        // A lane that met nothing above -inf names its first place, or one that loses to it.
        memcpy(lane_places + v * kLanes<T>, &states[v].place, sizeof(states[v].place));
        for (int l = 0; l < kLanes<T>; ++l) lane_places[v * kLanes<T> + l] -= v * kLanes<T>;
      }
      emit(0, best_column(lanes, lane_places, kRunVectors * kLanes<T>));
    } else {
      reduce_sources<MaxState<T>>(boxes.rows, p.in[2], [&](int64_t j, const MaxState<T>& state) {
        store_vec(best.data() + j, state.best);
        memcpy(place.data() + j, &state.place, sizeof(state.place));
      });
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const int64_t w = boxes.width.first[ow];
        emit(ow, best_column(best.data() + w, place.data() + w, boxes.width.size[ow]));
      }
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
