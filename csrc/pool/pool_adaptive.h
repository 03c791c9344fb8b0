// Adaptive pooling on CPU.
//
// An output's window is a box of the input, and boxes differ, so there are no phases to split rows
// into. Each output row reads its rows of the input with unit stride, in one of three ways:
//
//   channels-last: the positions of one window are reduced channel by channel;
//   contiguous: the window's rows are reduced column by column, whole rows at a time, and the
//     columns of each window then one by one; a window of k rows makes 1/k of the work scalar;
//   contiguous, one output in a row (global pooling): the rows of the window are reduced into a few
//     vectors, whatever their length, and those at the end.
//
// Bound: bytes. The first two are the same loop over a list of sources, out[j] = reduce_k
// source_k[j]. Sums are added up in a cascade, so that a map of any size loses few bits.
//
// Backward of the average: the gradient of an input row is the same for all rows of a window, so it
// is made once and copied.
#pragma once

#include <limits>

#include "core/parallel.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kRunVectors = 4;  // vectors of results that a loop keeps in registers

// kLanes<T> sums of any number of values.
template <class T>
struct SumState {
  using A = accumulate_t<T>;
  static constexpr int64_t kFold = 16;  // values after which a level is added to the next

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

  Vec<A> best = broadcast<Vec<A>>(-std::numeric_limits<A>::infinity());
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

// Reduces each source over [0, n) into kRunVectors states, lane l of state v taking the elements
// v * lanes + l of every kRunVectors * lanes; `ends` gets what is left of each, element by element.
template <class T, class State, class Ends>
WEFT_INLINE void reduce_runs(const Sources<T>& sources, int64_t n, State (&states)[kRunVectors],
                             const Ends& ends) {
  constexpr int64_t kBlockLanes = kRunVectors * kLanes<T>;
  int64_t taken = 0;
  for (int64_t k = 0; k < sources.count; ++k) {
    const T* run = sources.address[k];
    int64_t j = 0;
    for (; j + kBlockLanes <= n; j += kBlockLanes) {
      for (int v = 0; v < kRunVectors; ++v)
        states[v].take(load_vec(run + j + v * kLanes<T>), sources.place[k] + j + v * kLanes<T>);
      if (++taken % State::kFold == 0)
        for (int v = 0; v < kRunVectors; ++v) states[v].fold(taken);
    }
    for (; j < n; ++j) ends(widen(run[j]), sources.place[k] + j);
  }
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

// The boxes of the outputs: `rows` of the input that the windows of output row (od, oh) read.
template <class T>
WEFT_INLINE void select_rows(const PoolProblem& p, const T* plane, int64_t od, int64_t oh,
                             Sources<T>& rows) {
  const int64_t d = p.window[0].first_input(od);
  const int64_t h = p.window[1].first_input(oh);
  const int64_t depth = places_inside(p.window[0], od, p.in[0]).end;
  const int64_t height = places_inside(p.window[1], oh, p.in[1]).end;
  rows.clear();
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t j = 0; j < height; ++j)
      rows.add(plane + ((d + i) * p.in[1] + h + j) * p.in[2] * p.inner,
               (i * p.window[1].size + j) * p.window[2].size);
}

// The same for one output's window of a channels-last input: its positions.
template <class T>
WEFT_INLINE void select_positions(const PoolProblem& p, const Sources<T>& rows, int64_t ow,
                                  Sources<T>& positions) {
  const int64_t w = p.window[2].first_input(ow);
  const int64_t width = places_inside(p.window[2], ow, p.in[2]).end;
  positions.clear();
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t k = 0; k < width; ++k)
      positions.add(rows.address[i] + (w + k) * p.inner, rows.place[i] + k);
}

template <class Place, class I>
WEFT_INLINE void store_place_row(Place* row, int64_t j, int64_t n, Vec<I> place) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(I));
  using Narrow = typename vector_of<Place, kCount>::type;
  const Narrow places = __builtin_convertvector(place, Narrow);
  memcpy(row + j, &places, (n - j < kCount ? n - j : kCount) * sizeof(Place));
}

template <class T>
WEFT_INLINE void store_lanes(T* row, int64_t j, int64_t n, Vec<accumulate_t<T>> value) {
  if (j + kLanes<T> <= n) return store_vec(row + j, value);
  store_part(row + j, value, static_cast<int>(n - j));
}

// Output rows [begin, end) of [outer, D, H]; `places` may be null.
template <class T, class Place>
void adaptive_max_values(const PoolProblem& p, const T* x, T* y, Place* places, int64_t begin,
                         int64_t end) {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  const int64_t n = p.out[2] * p.inner;
  const T* x_end = x + p.in_elements();
  Sources<T> rows(p.window[0].size * p.window[1].size, x_end);
  Sources<T> positions(p.inner > 1 ? p.window_elements() : 0, x_end);
  const int64_t columns = round_up(p.in[2], kLanes<T>);
  Scratch<A> best(columns);
  Scratch<I> place(columns);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t oh = index % p.out[1];
    const int64_t od = index / p.out[1] % p.out[0];
    const int64_t outer = index / (p.out[1] * p.out[0]);
    select_rows(p, x + outer * p.in_positions() * p.inner, od, oh, rows);
    T* out = y + index * n;
    Place* out_places = places == nullptr ? nullptr : places + index * n;
    const auto emit = [&](int64_t j, const Best<A>& b) {
      out[j] = narrow<T>(b.value);
      if (out_places != nullptr) out_places[j] = static_cast<Place>(b.place);
    };
    if (p.inner > 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        select_positions(p, rows, ow, positions);
        reduce_sources<MaxState<T>>(positions, p.inner, [&](int64_t j, const MaxState<T>& state) {
          store_lanes(out + ow * p.inner, j, p.inner, state.best);
          if (out_places != nullptr)
            store_place_row<Place, I>(out_places + ow * p.inner, j, p.inner, state.place);
        });
      }
    } else if (p.out[2] == 1) {
      MaxState<T> states[kRunVectors];
      Best<A> b{.place = 0};  // of a window without anything above -inf
      reduce_runs(rows, p.in[2], states, [&](A value, int64_t at) { b.take(value, at); });
      for (int v = 0; v < kRunVectors; ++v)
        for (int l = 0; l < kLanes<T>; ++l) b.take(states[v].best[l], states[v].place[l] + l);
      emit(0, b);
    } else {
      reduce_sources<MaxState<T>>(rows, p.in[2], [&](int64_t j, const MaxState<T>& state) {
        store_vec(best.data() + j, state.best);
        memcpy(place.data() + j, &state.place, sizeof(state.place));
      });
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const int64_t w = p.window[2].first_input(ow);
        const int64_t width = places_inside(p.window[2], ow, p.in[2]).end;
        Best<A> b;
        for (int64_t k = 0; k < width; ++k) b.take(best[w + k], place[w + k] + k);
        emit(ow, b);
      }
    }
  }
}

// Output rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_values(const PoolProblem& p, const T* x, T* y, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* x_end = x + p.in_elements();
  Sources<T> rows(p.window[0].size * p.window[1].size, x_end);
  Sources<T> positions(p.inner > 1 ? p.window_elements() : 0, x_end);
  Scratch<A> sum(round_up(p.in[2], kLanes<T>));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t oh = index % p.out[1];
    const int64_t od = index / p.out[1] % p.out[0];
    const int64_t outer = index / (p.out[1] * p.out[0]);
    select_rows(p, x + outer * p.in_positions() * p.inner, od, oh, rows);
    T* out = y + index * p.out[2] * p.inner;
    if (p.inner > 1) {
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        select_positions(p, rows, ow, positions);
        const auto divisor = broadcast<Vec<A>>(static_cast<A>(positions.count));
        reduce_sources<SumState<T>>(positions, p.inner, [&](int64_t j, const SumState<T>& state) {
          store_lanes(out + ow * p.inner, j, p.inner, state.total() / divisor);
        });
      }
    } else if (p.out[2] == 1) {
      SumState<T> states[kRunVectors];
      A ends = 0;
      reduce_runs(rows, p.in[2], states, [&](A value, int64_t) { ends += value; });
      const Vec<A> lanes =
          (states[0].total() + states[1].total()) + (states[2].total() + states[3].total());
      A total = 0;
      for (int l = 0; l < kLanes<T>; ++l) total += lanes[l];
      out[0] = narrow<T>((total + ends) / static_cast<A>(rows.count * p.in[2]));
    } else {
      reduce_sources<SumState<T>>(rows, p.in[2], [&](int64_t j, const SumState<T>& state) {
        store_vec(sum.data() + j, state.total());
      });
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const int64_t w = p.window[2].first_input(ow);
        const int64_t width = places_inside(p.window[2], ow, p.in[2]).end;
        A total = 0;
        for (int64_t k = 0; k < width; ++k) total += sum[w + k];
        out[ow] = narrow<T>(total / static_cast<A>(rows.count * width));
      }
    }
  }
}

// Input rows [begin, end) of [outer, D, H].
template <class T>
void adaptive_avg_gradients(const PoolProblem& p, const T* gy, T* gx, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t inner = p.inner;
  const int64_t n = p.in[2] * inner;
  Scratch<A> sum(p.out[2] * inner);  // over the output rows that read this input row
  Scratch<A> spread(round_up(n, kLanes<T>));
  const T* made = nullptr;  // the row of gx that the last covering rows gave
  int64_t made_from[5] = {-1, -1, -1, -1, -1};
  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % p.in[1];
    const int64_t d = index / p.in[1] % p.in[0];
    const int64_t outer = index / (p.in[1] * p.in[0]);
    const Range ds = outputs_covering(p.window[0], d, p.out[0]);
    const Range hs = outputs_covering(p.window[1], h, p.out[1]);
    T* out = gx + index * n;
    const int64_t from[5] = {outer, ds.begin, ds.end, hs.begin, hs.end};
    if (memcmp(from, made_from, sizeof(from)) == 0) {
      memcpy(static_cast<void*>(out), made, n * sizeof(T));
      continue;
    }
    memcpy(made_from, from, sizeof(from));
    made = out;
    fill(sum.data(), p.out[2] * inner, A{0});
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const T* row = gy + ((outer * p.out[0] + od) * p.out[1] + oh) * p.out[2] * inner;
        for (int64_t ow = 0; ow < p.out[2]; ++ow) {
          const A divisor = static_cast<A>(pool_divisor(p, od, oh, ow));
          for (int64_t c = 0; c < inner; ++c)
            sum[ow * inner + c] += widen(row[ow * inner + c]) / divisor;
        }
      }
    fill(spread.data(), n, A{0});
    for (int64_t ow = 0; ow < p.out[2]; ++ow) {
      const int64_t first = p.window[2].first_input(ow);
      const int64_t last = first + places_inside(p.window[2], ow, p.in[2]).end;
      if (inner == 1) {
        const A value = sum[ow];
        for (int64_t w = first; w < last; ++w) spread[w] += value;
      } else {
        for (int64_t w = first; w < last; ++w)
          for (int64_t c = 0; c < inner; ++c) spread[w * inner + c] += sum[ow * inner + c];
      }
    }
    for (int64_t j = 0; j < n; j += kLanes<T>) store_lanes(out, j, n, load_vec(spread.data() + j));
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
