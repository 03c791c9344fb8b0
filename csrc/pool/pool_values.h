// Forward pooling with fixed windows on CPU: the mean, the maximum without its place, and, by the
// keys of pool_keys.h, the maximum of large windows with it.
//
// A row is [W, inner], contiguous in both layouts. An output row is made in two steps. First the
// rows of its windows (along D and H) are reduced to one line where they lie, with unit stride,
// whatever the layout, the stride or the dtype; then the windows along W are reduced in that line,
// which is in the first-level cache. Where windows are high and overlap, the first step is done for
// a strip of rows at once, by doubling. Long rows are cut into tiles, so that the line stays small
// and one long row is work for many threads.
//
// Along W, strides are never split into phases: stride 1 and channels are unit-stride loads at
// shifts; stride 2 is reduced densely and its even elements kept by one shuffle; for larger strides
// as many windows as a vector has lanes are loaded, one in each vector, and reduced by transposing;
// windows of 4, 8, 16 ... that touch are reduced by halving the line, neighbour by neighbour.
//
// Small windows take the walks of pool_direct.h where those are cheaper, those of stride 2 along
// contiguous rows that of pool_pairs.h.
//
// Bound: bytes, in + out; outputs larger than the cache are streamed past it.
// Lost: a ring of rows reduced along W first (as the maximum with places does): stride 2 reduces
// every input row instead of every output row. Rows side by side without prefetch_ahead: four times
// slower on 112 floats. Picking every stride-th result one by one after a dense reduction: half the
// speed of transposing at stride 15. Reducing along W as soon as 2 KiB of the line are made, so
// that loads from memory pause less: no gain, and slower at stride 1 of channels-last maps.
#pragma once

#include "pool/pool_direct.h"
#include "pool/pool_keys.h"
#include "pool/pool_pairs.h"

namespace weft::WEFT_TARGET {
namespace {

template <class Op, class T>
class ValueWalk {
 public:
  using E = typename Op::E;
  using V = typename Op::V;
  static constexpr int64_t kWidth = Op::kWidth;

  ValueWalk(const PoolProblem& p, const T* x)
      : p_(p),
        x_(x),
        doubling_(pool_values_path(p) == PoolPath::passes),
        tiles_(tiles_of(p)),
        step_(p.window[2].dilation * p.inner),
        pitch_(round_up(span_of(tiles_.width()) * p.inner, kWidth)),
        strip_outputs_(doubling_ ? strip_outputs() : 0),
        line_(pitch_ + kSlack),
        spare_(pitch_ + kSlack),
        picked_(tiles_.width() * p.inner + kSlack),
        place_bits_(p),
        rows_(Op::kPlaces ? p.window[0].size * p.window[1].size : 0),
        columns_(Op::kPlaces ? pitch_ + kSlack : 0),
        sources_(p.window[0].size * p.window[1].size) {
    if (Op::kPlaces)
      for (int64_t j = 0; j < pitch_ + kSlack; ++j) columns_[j] = static_cast<int32_t>(j / p.inner);
    fill_lanes(line_.data(), pitch_ + kSlack, Op::kNeutral);
    fill_lanes(spare_.data(), pitch_ + kSlack, Op::kNeutral);
    fill_lanes(picked_.data(), tiles_.width() * p.inner + kSlack, Op::kNeutral);
    if (!doubling_) return;
    const int64_t rows = (strip_outputs_ - 1) * p.window[1].stride + p.window[1].span();
    strip_.resize(rows * pitch_ + kSlack);
    strip_spare_.resize(Op::kIdempotent ? 0 : rows * pitch_ + kSlack);
    fill_lanes(strip_.data(), rows * pitch_ + kSlack, Op::kNeutral);
    if (!Op::kIdempotent) fill_lanes(strip_spare_.data(), rows * pitch_ + kSlack, Op::kNeutral);
  }

  static int64_t items_of(const PoolProblem& p) { return tiles_of(p).items(p.outer); }
  int64_t width() const { return tiles_.width(); }
  bool by_strips() const { return doubling_; }

  // Items [begin, end) of RowTiles. `finish.start(part, strip row)` is called before each;
  // finish(j, sum) makes the stored value of the sum of element j.
  template <class Finish>
  void run(int64_t begin, int64_t end, T* y, Finish& finish) {
    RowPart part = tiles_.part(begin);
    RowWriter<T> writer(y + (tiles_.row(part) * p_.out[2] + part.begin) * p_.inner,
                        tiles_.width() * p_.inner, pool_streams(p_.out_elements(), p_));
    strip_end_ = 0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = (part.end - part.begin) * p_.inner;
      T* out = writer.row();
      const auto emit = [&](int64_t j, V value) { store_row<Op>(out, j, n, finish(j, value)); };
      const int64_t lead = span_lead(part);
      E* line = doubling_ ? strip_row(part, end - item) : reduced_rows(part, lead);
      finish.start(part, (part.h - strip_begin_) * p_.window[1].stride);
      reduce_line(line, part.end - part.begin, emit);
      writer.advance(n);
      part = tiles_.after(part);
    }
  }

 private:
  static constexpr int64_t kSlack = 4 * kWidth;  // read past a line's end
  static constexpr int64_t kStripBytes = 65536;

  static RowTiles tiles_of(const PoolProblem& p) {
    const Window& window = p.window[2];
    const bool whole_rows = pool_values_path(p) == PoolPath::passes;
    return RowTiles(p.out, whole_rows ? 0 : window.stride * p.inner * sizeof(E),
                    window.span() > window.stride ? window.span() / window.stride : 0);
  }

  int64_t span_of(int64_t outputs) const {
    return (outputs - 1) * p_.window[2].stride + p_.window[2].span();
  }

  int64_t strip_outputs() const {
    const int64_t stride = p_.window[1].stride;
    const int64_t span = p_.window[1].span();
    const int64_t rows = kStripBytes / (pitch_ * static_cast<int64_t>(sizeof(E)));
    // At least as many rows that are new as rows that the strips share.
    const int64_t fit = (rows > 2 * span ? rows - span : span) / stride + 1;
    return fit < p_.out[1] ? fit : p_.out[1];
  }

  // The first input position of a part; negative where that is padding.
  int64_t span_lead(const RowPart& part) const { return p_.window[2].first_input(part.begin); }

  // Writes the reduction of `count` sources, whole rows of the input, over the positions of `part`
  // to `line`, with the neutral element where those are padding.
  void reduce_sources(const RowPart& part, int64_t first, int64_t count, E* line) {
    const int64_t length = span_of(part.end - part.begin);
    const int64_t begin = first < 0 ? 0 : first;
    const int64_t end = first + length < p_.in[2] ? first + length : p_.in[2];
    if (count == 0 || begin >= end) {
      fill_lanes(line, length * p_.inner, Op::kNeutral);
      return;
    }
    const int64_t before = (begin - first) * p_.inner;
    const int64_t inside = (end - begin) * p_.inner;
    for (int64_t j = 0; j < before; ++j) line[j] = Op::kNeutral;
    for (int64_t k = 0; k < count; ++k) sources_[k] += begin * p_.inner;
    if constexpr (Op::kPlaces) {
      reduce_rows_to_keys(sources_.data(), rows_.data(), count, inside, columns_.data() + before,
                          line + before);
    } else {
      reduce_rows<Op>(sources_.data(), count, inside, line + before);
    }
    fill_lanes(line + before + inside, length * p_.inner - before - inside, Op::kNeutral);
  }

  E* reduced_rows(const RowPart& part, int64_t first) {
    const T* plane = x_ + part.outer * p_.in_positions() * p_.inner;
    const int64_t row_elements = p_.in[2] * p_.inner;
    int64_t count = 0;
    for_places(p_.window[0], part.d, p_.in[0], [&](int64_t d, int64_t i) {
      for_places(p_.window[1], part.h, p_.in[1], [&](int64_t h, int64_t j) {
        if constexpr (Op::kPlaces) rows_[count] = place_bits_.row(i, j);
        sources_[count++] = plane + (d * p_.in[1] + h) * row_elements;
      });
    });
    reduce_sources(part, first, count, line_.data());
    return line_.data();
  }

  // The line of one output row, from the strip that holds it.
  E* strip_row(const RowPart& part, int64_t rows_left) {
    const Window& height = p_.window[1];
    if (part.h == 0 || part.h >= strip_end_) {
      strip_begin_ = part.h;
      strip_end_ = part.h + strip_outputs_ < p_.out[1] ? part.h + strip_outputs_ : p_.out[1];
      if (strip_end_ > part.h + rows_left) strip_end_ = part.h + rows_left;
      make_strip(part);
    }
    E* from = strip_result_ + (part.h - strip_begin_) * height.stride * pitch_;
    memcpy(line_.data(), from, pitch_ * sizeof(E));  // reducing along W overwrites it
    return line_.data();
  }

  void make_strip(const RowPart& part) {
    const Window& height = p_.window[1];
    const T* plane = x_ + part.outer * p_.in_positions() * p_.inner;
    const int64_t row_elements = p_.in[2] * p_.inner;
    const int64_t outputs = (strip_end_ - strip_begin_ - 1) * height.stride + 1;
    const int64_t first = height.first_input(strip_begin_);
    for (int64_t r = 0; r < outputs + height.span() - 1; ++r) {
      E* line = strip_.data() + r * pitch_;
      const int64_t h = first + r;
      int64_t count = 0;
      if (h >= 0 && h < p_.in[1])
        for_places(p_.window[0], part.d, p_.in[0], [&](int64_t d, int64_t i) {
          if constexpr (Op::kPlaces) rows_[count] = place_bits_.row(i, r);
          sources_[count++] = plane + (d * p_.in[1] + h) * row_elements;
        });
      reduce_sources(part, span_lead(part), count, line);
    }
    strip_result_ = reduce_windows<Op>(strip_.data(), strip_spare_.data(), outputs * pitch_,
                                       height.size, height.dilation * pitch_);
  }

  // Windows far apart: each is a vector or a few, and as many as have lanes are reduced at once.
  template <class Emit>
  void reduce_lanes_of(const E* line, int64_t outputs, const Emit& emit) {
    const int64_t size = p_.window[2].size;
    const int64_t stride = p_.window[2].stride;
    const V neutral = broadcast<V>(Op::kNeutral);
    const auto rest = lanes_before<E>((size - 1) % kWidth + 1);
    for (int64_t j = 0; j < outputs; j += kWidth) {
      V values[kWidth];
      // Lanes past the last output repeat it.
      const auto start = [&](int l) {
        return line + (j + l < outputs ? j + l : outputs - 1) * stride;
      };
      if (size <= kWidth) {
#pragma GCC unroll 32
        for (int l = 0; l < kWidth; ++l) values[l] = rest ? load_lanes(start(l)) : neutral;
      } else {
#pragma GCC unroll 32
        for (int l = 0; l < kWidth; ++l) {
          const E* from = start(l);
          V sum = load_lanes(from);
          int64_t s = kWidth;
          for (; s + kWidth < size; s += kWidth) sum = Op::reduce(sum, load_lanes(from + s));
          values[l] = Op::reduce(sum, rest ? load_lanes(from + s) : neutral);
        }
      }
      emit(j, reduce_lanes<Op>(values));
    }
  }

  // Windows that touch, of a power of two: halves the line until each is one element.
  template <class Emit>
  void reduce_by_halving(E* line, int64_t outputs, const Emit& emit) {
    const auto pairs = [&](int64_t j) {
      V even, odd;
      deinterleave(load_lanes(line + 2 * j), load_lanes(line + 2 * j + kWidth), even, odd);
      return Op::reduce(even, odd);
    };
    for (int64_t size = p_.window[2].size; size > 2; size /= 2)
      for (int64_t j = 0; j < outputs * size / 2; j += kWidth) store_lanes(line + j, pairs(j));
    for (int64_t j = 0; j < outputs; j += kWidth) emit(j, pairs(j));
  }

  // Reduces the windows along one line: emit(j, value) for each vector of the outputs.
  template <class Emit>
  void reduce_line(E* line, int64_t outputs, const Emit& emit) {
    const Window& window = p_.window[2];
    const int64_t inner = p_.inner;
    const int64_t stride = window.stride;
    const int64_t n = outputs * inner;
    int64_t size = window.size;
    const bool dense = inner == 1 && window.dilation == 1;
    if (dense && stride > 2 && size == stride && (size & (size - 1)) == 0)
      return reduce_by_halving(line, outputs, emit);
    if (dense && stride > 2 && size <= 4 * kWidth) return reduce_lanes_of(line, outputs, emit);
    // Channels are read directly for each output: doubling pays where windows overlap enough.
    const int64_t passes = inner > 1 ? 3 * stride * pool_doubling_passes(size) / 2 : 0;
    if (size > kPoolDirectSize + passes) {
      line = reduce_windows<Op>(line, spare_.data(), ((outputs - 1) * stride + 1) * inner, size,
                                step_);
      size = 1;
    }
    const auto at = [&](const E* from) {
      V sum = load_lanes(from);
      for (int64_t s = 1; s < size; ++s) sum = Op::reduce(sum, load_lanes(from + s * step_));
      return sum;
    };
    if (stride == 1) {
      for (int64_t j = 0; j < n; j += kWidth) emit(j, at(line + j));
    } else if (inner > 1) {
      E* picked = picked_.data();
      const bool whole = inner % kWidth == 0;
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t c = 0; c < inner; c += kWidth) {
          const V value = at(line + o * stride * inner + c);
          // What a pixel's last vector writes too much, the next pixel overwrites.
          if (whole) {
            emit(o * inner + c, value);
          } else {
            store_lanes(picked + o * inner + c, value);
          }
        }
      if (!whole)
        for (int64_t j = 0; j < n; j += kWidth) emit(j, load_lanes(picked + j));
    } else if (stride == 2) {
      for (int64_t j = 0; j < n; j += kWidth)
        emit(j, evens(at(line + 2 * j), at(line + 2 * j + kWidth)));
    } else {
      if (size > 1)
        for (int64_t j = 0; j < (outputs - 1) * stride + 1; j += kWidth)
          store_lanes(line + j, at(line + j));
      E* picked = picked_.data();
      for (int64_t o = 0; o < outputs; ++o) picked[o] = line[o * stride];
      for (int64_t j = 0; j < n; j += kWidth) emit(j, load_lanes(picked + j));
    }
  }

  const PoolProblem& p_;
  const T* x_;
  const bool doubling_;
  const RowTiles tiles_;
  const int64_t step_;
  const int64_t pitch_;  // elements of a line
  const int64_t strip_outputs_;
  int64_t strip_begin_ = 0, strip_end_ = 0;  // output rows that the strip holds
  Scratch<E> line_, spare_, picked_, strip_, strip_spare_;
  E* strip_result_ = nullptr;
  const PlaceBits place_bits_;
  Scratch<int32_t> rows_;     // the places of the sources
  Scratch<int32_t> columns_;  // of the elements of a line
  Scratch<const T*> sources_;
};

template <class Walk, class T, class MakeFinish>
void run_walk(const PoolProblem& p, const T* x, T* y, const Context& context,
              const MakeFinish& make_finish) {
  const int64_t items = Walk::items_of(p);
  parallel_for(context, items, pool_grain(items, p.in_elements() + p.out_elements()),
               [&](int64_t begin, int64_t end) {
                 Walk walk(p, x);
                 auto finish = make_finish(walk);
                 walk.run(begin, end, y, finish);
               });
}

// Fixed windows, not global ones. `make_finish(walk)` makes what ValueWalk::run calls.
template <class Op, class T, class MakeFinish>
void pool_values(const PoolProblem& p, const T* x, T* y, const Context& context,
                 const MakeFinish& make_finish) {
  switch (pool_values_path(p)) {
    case PoolPath::flat:
      return run_walk<FlatWalk<Op, T>>(p, x, y, context, make_finish);
    case PoolPath::pixels:
      return run_walk<PixelWalk<Op, T>>(p, x, y, context, make_finish);
    case PoolPath::pairs:
      return run_walk<PairWalk<Op, T>>(p, x, y, context, make_finish);
    default:
      return run_walk<ValueWalk<Op, T>>(p, x, y, context, make_finish);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
