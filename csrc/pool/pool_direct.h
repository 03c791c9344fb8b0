// Forward pooling with small windows on CPU, without a line between: each output vector reduces the
// vectors of its window where they lie. The mean, and the maximum without its place.
//
// PixelWalk: channels-last maps, any stride. A pixel's window is a few pixels, each a run of
// channels.
//
// FlatWalk: either layout, windows that keep the map's size. The whole array is one run of vectors:
// the neighbours of an element lie at distances that do not depend on it, and what lies beyond a
// border of the map is replaced by the neutral element, by the columns and rows of the lanes. There
// is no work per row, so a row of 28 costs what its elements cost.
//
// Bound: bytes, in + out; outputs larger than the cache are streamed past it. Against a line
// (pool_values.h) an element is loaded more often, from the first-level cache, but nothing waits
// for vectors that were stored a moment before, and loads from memory never pause.
#pragma once

#include "pool/pool_lines.h"

namespace weft::WEFT_TARGET {
namespace {

// Stores vectors of Op as T, past the cache if asked.
template <class Op, class T>
class VectorWriter {
 public:
  static constexpr int kBytes = Op::kWidth * static_cast<int>(sizeof(T));

  VectorWriter(T* out, bool stream)
      : out_(out), stream_(stream && reinterpret_cast<uintptr_t>(out) % kBytes == 0) {}
  VectorWriter(const VectorWriter&) = delete;
  VectorWriter& operator=(const VectorWriter&) = delete;
  ~VectorWriter() {
    if (stream_) stream_fence();
  }

  // `at` is a multiple of a vector if the writer streams.
  WEFT_INLINE void store(int64_t at, typename Op::V value) const {
    if (!stream_) return Op::store(out_ + at, value);
    alignas(64) T held[Op::kWidth];
    Op::store(held, value);
    stream_block<kBytes>(out_ + at, held);
  }

 private:
  T* const out_;
  const bool stream_;
};

template <class Op, class T>
class PixelWalk {
 public:
  using V = typename Op::V;
  static constexpr int64_t kWidth = Op::kWidth;

  PixelWalk(const PoolProblem& p, const T* x)
      : p_(p),
        x_(x),
        tiles_(tiles_of(p)),
        rows_(p.window[0].size * p.window[1].size),
        places_(p.window_elements()) {}

  static int64_t items_of(const PoolProblem& p) { return tiles_of(p).items(p.outer); }
  int64_t width() const { return tiles_.width(); }

  // Items [begin, end) of RowTiles; see ValueWalk for `finish`.
  template <class Finish>
  void run(int64_t begin, int64_t end, T* y, Finish& finish) {
    RowPart part = tiles_.part(begin);
    const VectorWriter<Op, T> writer(y,
                                     p_.inner % kWidth == 0 && pool_streams(p_.out_elements(), p_));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t out = (tiles_.row(part) * p_.out[2] + part.begin) * p_.inner;
      const int64_t rows = find_rows(part);
      finish.start(part, 0);
      const Window& window = p_.window[2];
      int64_t count = 0, found_at = -1;  // the places of output `found_at`, whose window is whole
      for (int64_t o = part.begin, j = 0; o < part.end; ++o, j += p_.inner) {
        const int64_t first = window.first_input(o);
        const bool whole = first >= 0 && first + window.span() <= p_.in[2];
        if (!whole || found_at < 0) {
          count = find_places(rows, o);
          found_at = whole ? o : -1;
        }
        const int64_t shift = whole ? (o - found_at) * window.stride * p_.inner : 0;
        // The columns that the window before did not read.
        const int64_t fresh = count - rows * window.stride;
        reduce_places(count, fresh > 0 ? fresh : 0, shift,
                      [&](int64_t c, V value) { writer.store(out + j + c, finish(j + c, value)); });
      }
      part = tiles_.after(part);
    }
  }

 private:
  static RowTiles tiles_of(const PoolProblem& p) {
    return RowTiles(p.out, p.window[2].stride * p.inner * sizeof(T), 0);
  }

  // The input rows that the windows of an output row read.
  int64_t find_rows(const RowPart& part) {
    const T* plane = x_ + part.outer * p_.in_positions() * p_.inner;
    int64_t count = 0;
    for_places(p_.window[0], part.d, p_.in[0], [&](int64_t d, int64_t) {
      for_places(p_.window[1], part.h, p_.in[1], [&](int64_t h, int64_t) {
        rows_[count++] = plane + (d * p_.in[1] + h) * p_.in[2] * p_.inner;
      });
    });
    return count;
  }

  // The pixels of the window at output `o` of such a row, column by column.
  int64_t find_places(int64_t rows, int64_t o) {
    int64_t count = 0;
    for_places(p_.window[2], o, p_.in[2], [&](int64_t w, int64_t) {
      for (int64_t r = 0; r < rows; ++r) places_[count++] = rows_[r] + w * p_.inner;
    });
    return count;
  }

  // Calls emit(c, value) for vectors of the reduction of `count` places, `shift` elements on; the
  // last one may overlap the one before. From place `fresh` on they are read for the first time.
  template <class Emit>
  WEFT_INLINE void reduce_places(int64_t count, int64_t fresh, int64_t shift,
                                 const Emit& emit) const {
    int64_t c = 0;
    for (; p_.inner - c > (kBlock - 1) * kWidth; c += kBlock * kWidth)
      reduce_channels<kBlock>(count, fresh, shift, c, emit);
    if (p_.inner - c > 2 * kWidth) return reduce_channels<3>(count, fresh, shift, c, emit);
    if (p_.inner - c > kWidth) return reduce_channels<2>(count, fresh, shift, c, emit);
    if (p_.inner > c) reduce_channels<1>(count, fresh, shift, c, emit);
  }

  template <int kVectors, class Emit>
  WEFT_INLINE void reduce_channels(int64_t count, int64_t fresh, int64_t shift, int64_t c,
                                   const Emit& emit) const {
    int64_t at[kVectors];
    V sum[kVectors];
    for (int b = 0; b < kVectors; ++b) {
      const int64_t begin = c + b * kWidth;
      at[b] = b + 1 < kVectors || begin + kWidth <= p_.inner ? begin : p_.inner - kWidth;
      sum[b] = broadcast<V>(Op::kNeutral);
    }
    for (int64_t k = 0; k < fresh; ++k)
      for (int b = 0; b < kVectors; ++b)
        sum[b] = Op::reduce(sum[b], Op::load(places_[k] + shift + at[b]));
    for (int64_t k = fresh; k < count; ++k)
      for (int b = 0; b < kVectors; ++b) {
        prefetch_ahead(places_[k] + shift + at[b], 2048);
        sum[b] = Op::reduce(sum[b], Op::load(places_[k] + shift + at[b]));
      }
    for (int b = 0; b < kVectors; ++b) emit(at[b], sum[b]);
  }

  const PoolProblem& p_;
  const T* x_;
  const RowTiles tiles_;
  Scratch<const T*> rows_, places_;
};

template <class Op, class T>
class FlatWalk {
 public:
  using V = typename Op::V;
  using I = lane_index<typename Op::E>;
  static constexpr int64_t kWidth = Op::kWidth;

  FlatWalk(const PoolProblem& p, const T* x)
      : x_(x),
        elements_(p.in_elements()),
        row_(p.in[2] * p.inner),
        height_(p.in[1]),
        rows_{p.window[1].size, p.window[1].padding, p.window[1].dilation, p.in[1]},
        columns_{p.window[2].size, p.window[2].padding * p.inner, p.window[2].dilation * p.inner,
                 row_},
        before_(rows_.offset(0) * row_ + columns_.offset(0)),
        after_(rows_.offset(rows_.size - 1) * row_ + columns_.offset(columns_.size - 1)) {}

  // An item is a cache line of the output.
  static int64_t items_of(const PoolProblem& p) { return ceil_div(p.out_elements(), kItem); }

  int64_t width() const { return 1; }

  // Items [begin, end). `finish` treats all outputs alike.
  template <class Finish>
  void run(int64_t begin, int64_t end, T* y, Finish& finish) {
    finish.start(RowPart{0, 0, 0, 0, 1}, 0);
    if (rows_.size == 3 && columns_.size == 3) return run_windows<3, 3>(begin, end, y, finish);
    if (rows_.size == 1 && columns_.size == 3) return run_windows<1, 3>(begin, end, y, finish);
    run_windows<0, 0>(begin, end, y, finish);
  }

 private:
  static constexpr int64_t kItem = 64 / static_cast<int64_t>(sizeof(T));

  // Windows along rows or columns, in elements of a position on that axis.
  struct Axis {
    int64_t size, padding, dilation;
    int64_t extent;

    int64_t offset(int64_t place) const { return place * dilation - padding; }
    // From `at` on, how many have all places of their windows inside.
    int64_t run_inside(int64_t at) const {
      return at < padding ? 0 : extent - offset(size - 1) - at;
    }
    bool inside(int64_t at) const { return run_inside(at) > 0; }
    // The lanes, at positions `at`, whose `place` lies inside.
    WEFT_INLINE auto lanes_inside(Vec<I> at, int64_t place) const {
      const Vec<I> position = at + broadcast<Vec<I>>(static_cast<I>(offset(place)));
      return (position >= Vec<I>{}) & (position < broadcast<Vec<I>>(static_cast<I>(extent)));
    }
  };

  template <int kRows, int kColumns, class Finish>
  void run_windows(int64_t begin, int64_t end, T* y, const Finish& finish) const {
    const VectorWriter<Op, T> writer(
        y, elements_ * static_cast<int64_t>(sizeof(T)) >= kPoolStreamBytes);
    begin *= kItem;
    end = end * kItem < elements_ ? end * kItem : elements_;
    int64_t column = begin % row_, h = begin / row_ % height_;
    Vec<I> lane;
    for (int64_t l = 0; l < kWidth; ++l) lane[l] = static_cast<I>(l);
    for (int64_t j = begin; j < end;) {
      int64_t run = rows_.inside(h) ? columns_.run_inside(column) : 0;
      run = run < end - j ? run : end - j;
      int64_t vectors = run > 0 ? run / kWidth : 0;
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t at = j + v * kWidth;
        // Hidden from the compiler, which would keep a pointer for each place, most in memory.
        asm("" : "+r"(at));
        writer.store(at, finish(0, inner_windows<kRows, kColumns>(at)));
      }
      if (vectors == 0) {
        vectors = 1;
        int64_t last_h = h;
        for (int64_t past = column + kWidth - row_; past > 0; past -= row_) ++last_h;
        const bool inner = rows_.inside(h) && rows_.inside(last_h) && j + before_ >= 0 &&
                           j + kWidth + after_ <= elements_;
        const V value = finish(0, inner ? windows_at<kRows, kColumns, false>(j, column, h, lane)
                                        : windows_at<kRows, kColumns, true>(j, column, h, lane));
        if (j + kWidth <= end) {
          writer.store(j, value);
        } else {
          store_some<Op>(y + j, value, end - j);
        }
      }
      j += vectors * kWidth;
      column += vectors * kWidth;
      for (; column >= row_; column -= row_) h = h + 1 < height_ ? h + 1 : 0;
    }
  }

  // The window at element j, if all its places lie in the map, and so for the vector from there.
  template <int kRows, int kColumns>
  WEFT_INLINE V inner_windows(int64_t j) const {
    V sum = broadcast<V>(Op::kNeutral);
#pragma GCC unroll 4
    for (int64_t s = 0; s < (kColumns > 0 ? kColumns : columns_.size); ++s) {
      V part = broadcast<V>(Op::kNeutral);
#pragma GCC unroll 4
      for (int64_t r = 0; r < (kRows > 0 ? kRows : rows_.size); ++r) {
        const T* from = x_ + j + rows_.offset(r) * row_;
        if (s == 0) prefetch_ahead(from);
        part = Op::reduce(part, Op::load(from + columns_.offset(s)));
      }
      sum = Op::reduce(sum, part);
    }
    return sum;
  }

  // The windows of the vector whose first lane is element j, at `column` of row `h`. kBorder: some
  // may have rows outside the map.
  template <int kRows, int kColumns, bool kBorder>
  WEFT_INLINE V windows_at(int64_t j, int64_t column, int64_t h, Vec<I> lane) const {
    const V neutral = broadcast<V>(Op::kNeutral);
    Vec<I> columns = lane + broadcast<Vec<I>>(static_cast<I>(column));
    Vec<I> lines = broadcast<Vec<I>>(static_cast<I>(h));
    const Vec<I> row = broadcast<Vec<I>>(static_cast<I>(row_));
    const Vec<I> height = broadcast<Vec<I>>(static_cast<I>(height_));
    int64_t past = column + kWidth;  // once at least: most rows here are short
    do {
      const auto wraps = columns >= row;
      columns = wraps ? columns - row : columns;
      if constexpr (kBorder) {
        lines = wraps ? lines + static_cast<I>(1) : lines;
        lines = lines >= height ? Vec<I>{} : lines;
      }
      past -= row_;
    } while (past > row_);
    V sum = neutral;
#pragma GCC unroll 4
    for (int64_t s = 0; s < (kColumns > 0 ? kColumns : columns_.size); ++s) {
      V part = neutral;
#pragma GCC unroll 4
      for (int64_t r = 0; r < (kRows > 0 ? kRows : rows_.size); ++r) {
        const int64_t at = j + rows_.offset(r) * row_ + columns_.offset(s);
        if (s == 0) prefetch_ahead(x_ + at);
        if constexpr (kBorder) {
          part = Op::reduce(part, rows_.lanes_inside(lines, r) ? load_within(at) : neutral);
        } else {
          part = Op::reduce(part, Op::load(x_ + at));
        }
      }
      sum = Op::reduce(sum, columns_.lanes_inside(columns, s) ? part : neutral);
    }
    return sum;
  }

  // A vector of the array; what lies outside reads as anything.
  WEFT_INLINE V load_within(int64_t at) const {
    if (at >= 0 && at + kWidth <= elements_) return Op::load(x_ + at);
    T held[kWidth] = {};
    for (int64_t l = 0; l < kWidth; ++l)
      if (at + l >= 0 && at + l < elements_) held[l] = x_[at + l];
    return Op::load(held);
  }

  const T* x_;
  const int64_t elements_;
  const int64_t row_;  // elements
  const int64_t height_;
  const Axis rows_, columns_;
  const int64_t before_, after_;  // from an element to the first and the last of its window
};

}  // namespace
}  // namespace weft::WEFT_TARGET
