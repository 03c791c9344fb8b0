// Small windows of stride 2 along contiguous rows on CPU, forward, where they lie.
//
// For each two places of a window, a vector of outputs reads two vectors of a row, and a shuffle
// parts the even from the odd elements: these places of as many windows. Nothing goes through a
// line of scratch. Values reduce the rows of a window first and then its places, as pool_values.h
// does, so the bits are the same; maxima with places are compared in the order of the window. Only
// the vectors at a row's ends look where it ends. Bound: bytes; where the map is in the cache, the
// comparisons.
#pragma once

#include "pool/pool_lines.h"

namespace weft::WEFT_TARGET {
namespace {

// Elements [at, at + kWidth) of an array of `count`; those outside read as zero.
template <class Op, class T>
WEFT_INLINE typename Op::V load_within(const T* array, int64_t at, int64_t count) {
  if (at >= 0 && at + Op::kWidth <= count) return Op::load(array + at);
  T held[Op::kWidth] = {};
  for (int64_t l = 0; l < Op::kWidth; ++l)
    if (at + l >= 0 && at + l < count) held[l] = array[at + l];
  return Op::load(held);
}

// Whether a vector from position `at` of a row of `extent` is inside, lane by lane.
template <class E>
WEFT_INLINE auto lanes_inside(int64_t at, int64_t extent) {
  constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(E));
  const int64_t begin = at < -kWidth ? kWidth : -at, end = extent - at;
  return lanes_before<E>(end < 0        ? 0
                         : end < kWidth ? end
                                        : kWidth) &
         ~lanes_before<E>(begin > 0 ? begin : 0);
}

// The rows of the windows of an output row. Made where it is used, and never shared: a store of
// bytes might change what has an address.
template <class T>
class PairRows {
 public:
  PairRows(const PoolProblem& p, const T* x)
      : p_(p), x_(x), elements_(p.in_elements()), extent_(p.in[2]) {}

  WEFT_INLINE void find(int64_t outer, int64_t d, int64_t h) {
    count_ = 0;
    for_places(p_.window[0], d, p_.in[0], [&](int64_t z, int64_t i) {
      for_places(p_.window[1], h, p_.in[1], [&](int64_t y, int64_t j) {
        row_[count_] = ((outer * p_.in[0] + z) * p_.in[1] + y) * extent_;
        place_[count_++] = (i * p_.window[1].size + j) * p_.window[2].size;
      });
    });
  }
  WEFT_INLINE int64_t count() const { return count_; }
  // Of the first element of row k in the window.
  WEFT_INLINE int64_t place(int64_t k) const { return place_[k]; }

  // Whether `outputs` windows, of which the first begins at `first`, lie inside, and all that
  // vectors of `width` read for them is memory of the map.
  template <int kSize>
  WEFT_INLINE bool whole(int64_t first, int64_t outputs, int64_t width) const {
    return count_ > 0 && first >= 0 && first + 2 * (outputs - 1) + kSize <= extent_ &&
           row_[count_ - 1] + first + (kSize - 1) / 2 * 2 + 2 * width <= elements_;
  }
  // A vector of row k. Unless kWhole, those lanes that lie outside the row read as `neutral`.
  template <class Op, bool kWhole>
  WEFT_INLINE typename Op::V load(int64_t k, int64_t at, typename Op::E neutral) const {
    const T* const from = x_ + row_[k] + at;
    prefetch_ahead(from);
    if constexpr (kWhole) return Op::load(from);
    return lanes_inside<typename Op::E>(at, extent_) ? load_within<Op>(x_, row_[k] + at, elements_)
                                                     : broadcast<typename Op::V>(neutral);
  }

 private:
  const PoolProblem& p_;
  const T* const x_;
  const int64_t elements_, extent_;
  int64_t row_[kPoolMostPairRows], place_[kPoolMostPairRows];
  int64_t count_ = 0;
};

// Calls body(Count) with the size of the windows.
template <class Body>
WEFT_INLINE void with_pair_size(int64_t size, const Body& body) {
  switch (size) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, kPoolMostPairs>{});
  }
}

template <class Op, class T>
class PairWalk {
 public:
  using V = typename Op::V;
  static constexpr int64_t kWidth = Op::kWidth;

  PairWalk(const PoolProblem& p, const T* x) : p_(p), x_(x), tiles_(tiles_of(p)) {}

  static int64_t items_of(const PoolProblem& p) { return tiles_of(p).items(p.outer); }
  int64_t width() const { return tiles_.width(); }

  // Items [begin, end) of RowTiles; see ValueWalk for `finish`.
  template <class Finish>
  void run(int64_t begin, int64_t end, T* y, Finish& finish) {
    with_pair_size(p_.window[2].size,
                   [&](auto size) { run_windows<decltype(size)::value>(begin, end, y, finish); });
  }

 private:
  static RowTiles tiles_of(const PoolProblem& p) { return RowTiles(p.out, 2 * sizeof(T), 1); }

  template <int kSize, class Finish>
  void run_windows(int64_t begin, int64_t end, T* y, Finish& finish) const {
    PairRows<T> rows(p_, x_);
    RowPart part = tiles_.part(begin);
    RowWriter<T> writer(y + tiles_.row(part) * p_.out[2] + part.begin, tiles_.width(),
                        pool_streams(p_.out_elements(), p_));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = part.end - part.begin;
      rows.find(part.outer, part.d, part.h);
      finish.start(part, 0);
      T* const out = writer.row();
      int64_t first = p_.window[2].first_input(part.begin);
      for (int64_t j = 0; j < n; j += kWidth, first += 2 * kWidth) {
        const bool whole =
            rows.template whole<kSize>(first, n - j < kWidth ? n - j : kWidth, kWidth);
        store_row<Op>(out, j, n,
                      finish(j, whole ? windows<kSize, true>(rows, first)
                                      : windows<kSize, false>(rows, first)));
      }
      writer.advance(n);
      part = tiles_.after(part);
    }
  }

  // Those of a vector of outputs, of which the first window begins at `first`.
  template <int kSize, bool kWhole>
  static WEFT_INLINE V windows(const PairRows<T>& rows, int64_t first) {
    const auto reduced = [&](int64_t at) __attribute__((always_inline)) {
      V sum = broadcast<V>(Op::kNeutral);
      for (int64_t k = 0; k < rows.count(); ++k) {
        const V value = rows.template load<Op, kWhole>(k, at, Op::kNeutral);
        sum = k == 0 ? value : Op::reduce(sum, value);
      }
      return sum;
    };
    V sum = broadcast<V>(Op::kNeutral);
#pragma GCC unroll 2
    for (int s = 0; s < kSize; s += 2) {
      V even, odd;
      deinterleave(reduced(first + s), reduced(first + s + kWidth), even, odd);
      sum = s == 0 ? even : Op::reduce(sum, even);
      if (s + 1 < kSize) sum = Op::reduce(sum, odd);
    }
    return sum;
  }

  const PoolProblem& p_;
  const T* x_;
  const RowTiles tiles_;
};

// The maxima of output rows [begin, end) of [outer, D, H], and their places.
template <class T, int kSize>
class MaxPairs {
 public:
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using I = lane_index<A>;
  static constexpr int64_t kWidth = kLanes<T>;

  static void run(const PoolProblem& p, const T* x, int64_t begin, int64_t end, T* y,
                  uint8_t* places) {
    const int64_t n = p.out[2], before = p.window[2].padding;
    int64_t h = begin % p.out[1], d = begin / p.out[1] % p.out[0];
    int64_t outer = begin / p.out[1] / p.out[0];
    PairRows<T> rows(p, x);
    RowWriter<T> writer(y + begin * n, n, pool_streams(p.out_elements(), p));
    places += begin * n;
    for (int64_t index = begin; index < end; ++index, places += n) {
      rows.find(outer, d, h);
      T* const out = writer.row();
      int64_t first = -before;
      for (int64_t j = 0; j < n; j += kWidth, first += 2 * kWidth) {
        Vec<I> code;
        const V best = rows.template whole<kSize>(first, n - j < kWidth ? n - j : kWidth, kWidth)
                           ? windows<true>(rows, first, code)
                           : windows<false>(rows, first, code);
        store_row<SumOf<T>>(out, j, n, best);
        store_places<uint8_t, I>(places, j, n, code);
      }
      writer.advance(n);
      if (++h < p.out[1]) continue;
      h = 0;
      if (++d < p.out[0]) continue;
      d = 0;
      ++outer;
    }
  }

 private:
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

  template <bool kWhole>
  static WEFT_INLINE V windows(const PairRows<T>& rows, int64_t first, Vec<I>& code) {
    // A window without anything above -inf keeps its first place that is not padding.
    code = broadcast<Vec<I>>(static_cast<I>(rows.count() > 0 ? rows.place(0) : 0));
    if constexpr (!kWhole) {
      Vec<I> padding;
      for (int l = 0; l < kWidth; ++l) padding[l] = static_cast<I>(-2 * l);
      padding += static_cast<I>(-first);
      code += padding > 0 ? padding : Vec<I>{};
    }
    V best = broadcast<V>(kLowest);
    for (int64_t k = 0; k < rows.count(); ++k)
#pragma GCC unroll 2
      for (int s = 0; s < kSize; s += 2) {
        V even, odd;
        deinterleave(rows.template load<SumOf<T>, kWhole>(k, first + s, kLowest),
                     rows.template load<SumOf<T>, kWhole>(k, first + s + kWidth, kLowest), even,
                     odd);
        const auto place = static_cast<I>(rows.place(k) + s);
        take_larger(best, code, even, broadcast<Vec<I>>(place));
        if (s + 1 < kSize)
          take_larger(best, code, odd, broadcast<Vec<I>>(static_cast<I>(place + 1)));
      }
    return best;
  }
};

template <class T>
void max_pairs(const PoolProblem& p, const T* x, int64_t begin, int64_t end, T* y,
               uint8_t* places) {
  with_pair_size(p.window[2].size, [&](auto size) {
    MaxPairs<T, decltype(size)::value>::run(p, x, begin, end, y, places);
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
