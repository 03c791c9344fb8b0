// Backward of small windows of stride 2 along contiguous rows on CPU.
//
// An input row gathers from the output rows that cover it: its even positions, and its odd ones,
// find their outputs side by side in such a row, so that a vector of gradients, masked by the kept
// places or divided, is a term of as many positions; a shuffle joins the two. Terms are added in
// the order of the outputs, as pool_gradients.h adds them, so the bits are the same. Input rows
// that the same windows of an average cover are equal: made once and stored to each. Bound: bytes;
// where the map is in the cache, comparisons.
#pragma once

#include "core/small_scratch.h"
#include "pool/pool_pairs.h"

namespace weft::WEFT_TARGET {
namespace {

// The outputs that cover inputs of one axis, which ascend.
class AscendingCover {
 public:
  AscendingCover(const Window& window, int64_t outputs) : window_(window), outputs_(outputs) {}

  void restart() { range_ = {0, 0}; }
  WEFT_INLINE Range at(int64_t input) {
    const int64_t padded = input + window_.padding;
    while (range_.end < outputs_ && range_.end * window_.stride <= padded) ++range_.end;
    while (range_.begin < range_.end && range_.begin * window_.stride + window_.size <= padded)
      ++range_.begin;
    return range_;
  }

 private:
  const Window& window_;
  const int64_t outputs_;
  Range range_{0, 0};
};

// The output rows that cover input rows. Made where it is used, as PairRows.
class PairCovers {
 public:
  explicit PairCovers(const PoolProblem& p) : p_(p) {}

  // Calls body(first, count) for runs of rows [begin, end) of [outer, D, H] that the same windows
  // cover.
  template <class Body>
  WEFT_INLINE void for_each(int64_t begin, int64_t end, const Body& body) {
    AscendingCover depth(p_.window[0], p_.out[0]), height(p_.window[1], p_.out[1]);
    int64_t h = begin % p_.in[1], d = begin / p_.in[1] % p_.in[0];
    int64_t outer = begin / p_.in[1] / p_.in[0];
    while (begin < end) {
      const Range hs = height.at(h);
      find(outer, d, h, depth.at(d), hs);
      int64_t run = 1;
      for (; begin + run < end && h + run < p_.in[1]; ++run) {
        const Range next = height.at(h + run);
        if (next.begin != hs.begin || next.end != hs.end) break;
      }
      body(begin, run);
      begin += run;
      h += run;
      if (h < p_.in[1]) continue;
      h = 0;
      height.restart();
      if (++d < p_.in[0]) continue;
      d = 0;
      depth.restart();
      ++outer;
    }
  }
  WEFT_INLINE int64_t count() const { return count_; }
  // The first element of output row k, and the place of the first one of the run in its windows.
  WEFT_INLINE int64_t row(int64_t k) const { return row_[k]; }
  WEFT_INLINE int64_t place(int64_t k) const { return place_[k]; }

 private:
  WEFT_INLINE void find(int64_t outer, int64_t d, int64_t h, Range ds, Range hs) {
    count_ = 0;
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const int64_t i = d - p_.window[0].Window::first_input(od);
        const int64_t j = h - p_.window[1].Window::first_input(oh);
        row_[count_] = ((outer * p_.out[0] + od) * p_.out[1] + oh) * p_.out[2];
        place_[count_++] = (i * p_.window[1].size + j) * p_.window[2].size;
      }
  }

  const PoolProblem& p_;
  int64_t row_[kPoolMostPairRows], place_[kPoolMostPairRows];
  int64_t count_ = 0;
};

// A vector of the places of `count` outputs; those outside read as anything.
template <class I>
WEFT_INLINE Vec<I> places_within(const uint8_t* places, int64_t at, int64_t count) {
  constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(I));
  if (at >= 0 && at + kWidth <= count) return load_places<uint8_t, I>(places + at);
  uint8_t held[kWidth] = {};
  for (int64_t l = 0; l < kWidth; ++l)
    if (at + l >= 0 && at + l < count) held[l] = places[at + l];
  return load_places<uint8_t, I>(held);
}

// Calls tap(parity, shift, place): position 2m + parity is, with padding kOdd, place `place` of the
// window of output m + shift. Outputs ascend.
template <int kSize, int kOdd, class Tap>
WEFT_INLINE void for_each_tap(const Tap& tap) {
#pragma GCC unroll 2
  for (int parity = 0; parity < 2; ++parity)
#pragma GCC unroll 4
    for (int s = kSize - 1; s >= 0; --s)
      if ((parity + kOdd + s) % 2 == 0) tap(parity, (parity + kOdd - s) / 2, s);
}
// Calls body(Count, Count) with the size and the parity of the padding.
template <class Body>
WEFT_INLINE void with_pair_taps(const Window& window, const Body& body) {
  with_pair_size(window.size, [&](auto size) {
    if (window.padding % 2 == 0)
      body(size, std::integral_constant<int, 0>{});
    else
      body(size, std::integral_constant<int, 1>{});
  });
}

// Stores positions from `at` on of a row of `extent`, those of either parity given.
template <class T, class V>
WEFT_INLINE void store_pairs(T* row, int64_t at, int64_t extent, V even, V odd) {
  V low, high;
  interleave(even, odd, low, high);
  store_row<SumOf<T>>(row, at, extent, low);
  if (at + kLanes<T> < extent) store_row<SumOf<T>>(row, at + kLanes<T>, extent, high);
}

// Input rows [begin, end) of the maximum.
template <class T, int kSize, int kOdd>
void max_pair_gradients(const PoolProblem& p, const T* gy, const uint8_t* places, T* gx,
                        int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using I = lane_index<A>;
  constexpr int64_t kWidth = kLanes<T>, kFirst = (kOdd - kSize + 1) / 2;  // of all shifts
  const int64_t extent = p.in[2], outputs = p.out[2], elements = p.out_elements();
  const int64_t moved = p.window[2].padding / 2;
  PairCovers covers(p);
  // Both parities of positions whose outputs lie from about `first` on, of row r of a run.
  const auto add = [&](auto inside, int64_t first, int64_t r,
                       V(&sum)[2]) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(inside)::value;
    sum[0] = sum[1] = V{};
    for (int64_t k = 0; k < covers.count(); ++k)
      for_each_tap<kSize, kOdd>([&](int parity, int64_t shift,
                                    int place) __attribute__((always_inline)) {
        const int64_t at = covers.row(k) + first + shift;
        const auto code = broadcast<Vec<I>>(static_cast<I>(covers.place(k) + r * kSize + place));
        if constexpr (kWhole) {
          sum[parity] += load_places<uint8_t, I>(places + at) == code ? load_vec(gy + at) : V{};
        } else {
          const auto kept = places_within<I>(places, at, elements);
          const auto mine = (kept == code) & lanes_inside<A>(first + shift, outputs);
          sum[parity] += mine ? load_within<SumOf<T>>(gy, at, elements) : V{};
        }
      });
  };
  covers.for_each(begin, end, [&](int64_t index, int64_t count) __attribute__((always_inline)) {
    const int64_t last_row = covers.count() > 0 ? covers.row(covers.count() - 1) : 0;
    for (int64_t r = 0; r < count; ++r) {
      T* const row = gx + (index + r) * extent;
      for (int64_t m = 0; 2 * m < extent; m += kWidth) {
        const int64_t left = (extent - 2 * m + 1) / 2, lanes = left < kWidth ? left : kWidth;
        const int64_t first = m + moved;
        const bool whole = first + kFirst >= 0 && first + kOdd + lanes <= outputs &&
                           last_row + first + kOdd + kWidth <= elements;
        V sum[2];
        if (whole)
          add(std::true_type{}, first, r, sum);
        else
          add(std::false_type{}, first, r, sum);
        store_pairs(row, 2 * m, extent, sum[0], sum[1]);
      }
    }
  });
}

// Of the average whose windows have one divisor: input rows [begin, end).
template <class T, int kSize, int kOdd>
void avg_pair_gradients(const PoolProblem& p, const T* gy, T* gx, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t extent = p.in[2], outputs = p.out[2], moved = p.window[2].padding / 2;
  const int64_t reach = round_up(outputs > extent / 2 ? outputs : extent / 2, kWidth);
  const V divisor = broadcast<V>(static_cast<A>(pool_divisor(p, 0, 0, 0)));
  SmallScratch<A, 1024> held(reach + (4 + moved) * kWidth);  // an output row between zeros
  fill_lanes(held.data(), reach + (4 + moved) * kWidth, A{0});
  A* const line = held.data() + kWidth;
  PairCovers covers(p);
  covers.for_each(begin, end, [&](int64_t index, int64_t count) {
    // The output rows, divided.
    for (int64_t j = 0; j < outputs; j += kWidth) {
      V sum = {};
      for (int64_t k = 0; k < covers.count(); ++k) {
        const T* const row = gy + covers.row(k);
        const V value =
            outputs - j >= kWidth ? load_vec(row + j) : load_some<SumOf<T>>(row + j, outputs - j);
        sum = k == 0 ? value / divisor : sum + value / divisor;
      }
      store_lanes(line + j, sum);
    }
    T* const row = gx + index * extent;
    for (int64_t m = 0; 2 * m < extent; m += kWidth) {
      V sum[2] = {};
      for_each_tap<kSize, kOdd>([&](int parity, int64_t shift, int) __attribute__((always_inline)) {
        sum[parity] += load_lanes(line + m + moved + shift);
      });
      for (int64_t r = 0; r < count; ++r)
        store_pairs(row + r * extent, 2 * m, extent, sum[0], sum[1]);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
