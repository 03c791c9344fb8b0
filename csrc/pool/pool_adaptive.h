// Adaptive pooling on CPU.
//
// An output's window is a box of the input, and boxes differ, so there are no phases to split rows
// into. Each output row reads its rows of the input with unit stride, in one of three ways:
//
//   channels-last: the positions of one window are reduced channel by channel;
//   contiguous: the window's rows are reduced column by column, whole rows at a time, and the
//     columns of each window then by vectors where it is as wide as one;
//   contiguous, one output in a row (global pooling): the rows of the window are reduced into a few
//     vectors, whatever their length, and those at the end.
//
// Bound: bytes. The first two are the same loop over a list of sources, out[j] = reduce_k
// source_k[j]. Sums are added up in a cascade, so that a map of any size loses few bits.
//
// Backward of the average: neighbouring input rows that the same outputs read have equal gradients,
// so a row is made once and copied.
#pragma once

#include <limits>

#include "core/parallel.h"
#include "pool/pool_planes.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kRunVectors = 4;  // vectors of results that a loop keeps in registers

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

// What a window is read from: `count` addresses with their places in the window, ascending.
template <class T>
struct Sources {
  Scratch<const T*> address;
  Scratch<int64_t> place;
  int64_t count = 0;
  const T* end;  // of the memory that may be read

  Sources(int64_t capacity, const T* end) : address(capacity), place(capacity), end(end) {}
  void clear() { count = 0; }
  void add(const T* source, int64_t source_place) {
    address[count] = source;
    place[count++] = source_place;
  }
};

template <class T, class State, int kVectors>
WEFT_INLINE void reduce_block(const Sources<T>& sources, int64_t j, State (&states)[kVectors]) {
  for (int64_t k = 0; k < sources.count;) {
    const int64_t stop = k + State::kFold < sources.count ? k + State::kFold : sources.count;
    for (; k < stop; ++k)
      for (int v = 0; v < kVectors; ++v)
        states[v].take(load_vec(sources.address[k] + j + v * kLanes<T>), sources.place[k]);
    for (int v = 0; v < kVectors; ++v) states[v].fold(k);
  }
}

// Calls emit(j, state) for each vector of [0, n). Lanes beyond n hold what lies there, or zero.
template <class State, class T, class Emit>
WEFT_INLINE void reduce_sources(const Sources<T>& sources, int64_t n, const Emit& emit) {
  constexpr int64_t kBlockLanes = kRunVectors * kLanes<T>;
  int64_t j = 0;
  for (; j + kBlockLanes <= n; j += kBlockLanes) {
    State states[kRunVectors];
    reduce_block(sources, j, states);
    for (int v = 0; v < kRunVectors; ++v) emit(j + v * kLanes<T>, states[v]);
  }
  for (; j < n; j += kLanes<T>) {
    State states[1];
    const T* last = sources.address[sources.count - 1] + j;
    if (last + kLanes<T> <= sources.end) {
      reduce_block(sources, j, states);
    } else {
      const int64_t left = n - j < kLanes<T> ? n - j : kLanes<T>;
      for (int64_t k = 0; k < sources.count; ++k) {
        states[0].take(load_part(sources.address[k] + j, static_cast<int>(left)), sources.place[k]);
        if ((k + 1) % State::kFold == 0) states[0].fold(k + 1);
      }
    }
    emit(j, states[0]);
  }
}

// `value` in the first `count` lanes, `rest` in the others.
template <class A>
WEFT_INLINE Vec<A> first_lanes(Vec<A> value, int64_t count, A rest) {
  using I = lane_int<A>;
  Vec<I> lane;
  for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
  return lane < broadcast<Vec<I>>(static_cast<I>(count)) ? value : Vec<A>{} + rest;
}

// Reduces the sources over [0, n) into kRunVectors states; the place of a lane's result is the
// state's plus the lane.
template <class T, class State>
WEFT_INLINE void reduce_runs(const Sources<T>& sources, int64_t n, State (&states)[kRunVectors]) {
  constexpr int64_t kBlockLanes = kRunVectors * kLanes<T>;
  int64_t taken = 0;
  for (int64_t k = 0; k < sources.count; ++k) {
    const T* run = sources.address[k];
    const int64_t place = sources.place[k];
    int64_t j = 0;
    for (; j + kBlockLanes <= n; j += kBlockLanes) {
      for (int v = 0; v < kRunVectors; ++v)
        states[v].take(load_vec(run + j + v * kLanes<T>), place + j + v * kLanes<T>);
      if (++taken % State::kFold == 0)
        for (int v = 0; v < kRunVectors; ++v) states[v].fold(taken);
    }
    for (int v = 0; v < kRunVectors; ++v, j += kLanes<T>) {
      if (j + kLanes<T> <= n) {
        states[v].take(load_vec(run + j), place + j);
      } else if (j < n) {
        const int64_t left = n - j;
        const auto value = run + j + kLanes<T> <= sources.end
                               ? load_vec(run + j)
                               : load_part(run + j, static_cast<int>(left));
        states[v].take(first_lanes<accumulate_t<T>>(value, left, State::kNeutral), place + j);
      }
    }
  }
}

template <class A>
WEFT_INLINE A sum_of_lanes(Vec<A> value) {
  A lane[kLanes<A>];
  memcpy(lane, &value, sizeof(value));
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

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

// The windows on one axis, since finding them takes divisions.
struct AxisBoxes {
  Scratch<int64_t> first;
  Scratch<int64_t> size;

  AxisBoxes(const PoolProblem& p, int axis) : first(p.out[axis]), size(p.out[axis]) {
    for (int64_t o = 0; o < p.out[axis]; ++o) {
      first[o] = p.window[axis].first_input(o);
      size[o] = places_inside(p.window[axis], o, p.in[axis]).end;
    }
  }
};

// Calls body(row index, outer, od, oh) for rows [begin, end) of [outer, extents[0], extents[1]].
template <class Body>
WEFT_INLINE void for_each_row(const int64_t (&extents)[3], int64_t begin, int64_t end,
                              const Body& body) {
  int64_t h = begin % extents[1];
  int64_t d = begin / extents[1] % extents[0];
  int64_t outer = begin / (extents[1] * extents[0]);
  for (int64_t index = begin; index < end; ++index) {
    body(index, outer, d, h);
    if (++h < extents[1]) continue;
    h = 0;
    if (++d < extents[0]) continue;
    d = 0;
    ++outer;
  }
}

// The boxes of all outputs, and what the outputs of one row or one window read.
template <class T>
struct BoxReader {
  const PoolProblem& p;
  const T* x;
  AxisBoxes depth, height, width;
  Sources<T> rows, positions;

  BoxReader(const PoolProblem& p, const T* x)
      : p(p),
        x(x),
        depth(p, 0),
        height(p, 1),
        width(p, 2),
        rows(p.window[0].size * p.window[1].size, x + p.in_elements()),
        positions(p.inner > 1 ? p.window_elements() : 0, x + p.in_elements()) {}

  // `rows` become those of the input that output row (od, oh) reads.
  WEFT_INLINE void select_rows(int64_t outer, int64_t od, int64_t oh) {
    const T* plane = x + outer * p.in_positions() * p.inner;
    rows.clear();
    for (int64_t i = 0; i < depth.size[od]; ++i)
      for (int64_t j = 0; j < height.size[oh]; ++j)
        rows.add(
            plane + ((depth.first[od] + i) * p.in[1] + height.first[oh] + j) * p.in[2] * p.inner,
            (i * p.window[1].size + j) * p.window[2].size);
  }

  // `positions` become those of the selected rows that output `ow` of a channels-last row reads.
  WEFT_INLINE void select_positions(int64_t ow) {
    positions.clear();
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < width.size[ow]; ++k)
        positions.add(rows.address[i] + (width.first[ow] + k) * p.inner, rows.place[i] + k);
  }
};

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
        reduce_sources<MaxState<T>>(
            boxes.positions, p.inner, [&](int64_t j, const MaxState<T>& state) {
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

// Output rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_values(const PoolProblem& p, const T* x, T* y, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  BoxReader<T> boxes(p, x);
  Scratch<A> sum(round_up(p.in[2], kLanes<T>) + kLanes<T>);
  for_each_row(p.out, begin, end, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
    boxes.select_rows(outer, od, oh);
    const int64_t height = boxes.rows.count;
    T* out = y + index * p.out[2] * p.inner;
    if (p.inner > 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        boxes.select_positions(ow);
        const auto divisor = broadcast<Vec<A>>(static_cast<A>(boxes.positions.count));
        reduce_sources<SumState<T>>(
            boxes.positions, p.inner, [&](int64_t j, const SumState<T>& state) {
              store_row<SumOf<T>>(out + ow * p.inner, j, p.inner, state.total() / divisor);
            });
      }
    } else if (p.out[2] == 1) {
      SumState<T> states[kRunVectors];
      reduce_runs(boxes.rows, p.in[2], states);
      const A total = sum_of_lanes<A>((states[0].total() + states[1].total()) +
                                      (states[2].total() + states[3].total()));
      out[0] = narrow<T>(total / static_cast<A>(height * p.in[2]));
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

// Input rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_gradients(const PoolProblem& p, const T* gy, T* gx, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t inner = p.inner;
  const int64_t n = p.in[2] * inner;
  const AxisBoxes depth(p, 0), height(p, 1), width(p, 2);
  Scratch<A> sum(p.out[2] * inner);  // over the output rows that read this input row
  Scratch<A> spread(round_up(n, kLanes<T>));
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
