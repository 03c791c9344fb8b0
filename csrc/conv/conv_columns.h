// Few input channels, contiguous, on CPU: each column of the window has a copy of the input's rows
// that is as wide as the output.
//
// Tasks are bands of output rows of an image. For each channel and column of the window scratch
// holds what the outputs of a row read there, padding and stride resolved, row after row without
// gaps and split by the rows' stride. A place of the window is then an offset that all positions of
// the band share: positions are one flat run, of which no lane is wasted and which the output holds
// as it is. A tile of a few output channels × a few vectors of that run stays in registers over
// channels and places, and goes to the output from there, large ones past the cache. Copies cost
// the window's columns ÷ stride for each element of x, which the output channels share; windows
// that do not overlap are split straight into them. Bound: FLOPs; of few products for each copy,
// the copies. Tried and lost: several rows split before the first is read again, rows asked for
// ahead of time (no gain); large outputs whose planes are not whole vectors written through the
// cache (1.4 times the time where windows are of 2x2). The gradients are conv_columns_dgrad.h and
// conv_columns_wgrad.h, of the same scratch.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_bands.h"
#include "conv/conv_plan.h"
#include "core/transpose.h"

namespace weft::WEFT_TARGET {
namespace {

// Accumulators that the target's registers hold: broadcast numbers × vectors.
#if defined(__AVX512F__)
inline constexpr int kColumnRows = 8;
#else
inline constexpr int kColumnRows = 4;
#endif
inline constexpr int kColumnVectors = 3;
inline constexpr int64_t kColumnTerms = 64;  // of a sum in registers

inline constexpr int64_t kColumnStage = 12 * kColumnVectors;  // vectors, before they are streamed

// How the rows that a band of outputs reads lie in scratch: [channel, column of the window, slice
// of the window, row phase, row, output column].
struct ColumnRows {
  int64_t rows;    // outputs of a band
  int64_t width;   // of the output
  int64_t phases;  // of rows: their stride
  int64_t extent;  // rows of a phase
  int64_t slices;  // of the window
  int64_t columns;
  int64_t slack;  // a row's last vector may run over its end

  int64_t positions() const { return rows * width; }
  int64_t plane() const { return extent * width; }
  int64_t column() const { return slices * phases * plane() + slack; }
  int64_t channel() const { return columns * column(); }
  // Of the first output's row at a row of the window.
  int64_t row_offset(const Window& w, int64_t j) const {
    const int64_t at = j * w.dilation;
    return at % phases * plane() + at / phases * width;
  }
};

inline ColumnRows column_rows(const ConvProblem& p, int64_t rows, int64_t lanes) {
  const Window& w = p.window[1];
  return {rows,
          p.out[2],
          w.stride,
          rows + (w.span() - 1) / w.stride,
          p.window[0].size,
          p.window[2].size,
          kColumnVectors * lanes};
}

// Rows of a band: as many as fit, but few enough for several tasks. `copies`: rows of scratch.
inline int64_t column_band(const ConvProblem& p, int64_t copies, int64_t lanes, int64_t elements,
                           int64_t bands_elsewhere) {
  int64_t rows = p.out[1];
  const auto held = [&] {
    return copies * column_rows(p, rows, lanes).plane() * p.window[1].stride;
  };
  while (rows > 1 &&
         (held() > elements || (rows > 8 && bands_elsewhere * ceil_div(p.out[1], rows) < 8)))
    rows = (rows + 1) / 2;
  return rows;
}

// A row of the input as lines, split by the columns' stride, with its padding around it.
template <class Acc>
struct PhaseLines {
  int64_t phases, in, out;
  int64_t length;  // of a line
  bool apart;      // each column of the window is a line of its own
  Scratch<Acc> data;
  Scratch<Acc*> input;   // where the row's first elements are, one in each phase
  Scratch<Acc*> column;  // where the output row finds each column of the window

  explicit PhaseLines(const ConvProblem& p)
      : phases(p.window[2].stride),
        in(p.in[2]),
        out(p.out[2]),
        length(2 * kLanes<Acc> + most(out + (p.window[2].span() - 1) / phases,
                                      (in + p.window[2].padding - 1) / phases + 1)),
        apart(p.window[2].padding == 0 && p.window[2].dilation == 1 && p.window[2].size <= phases &&
              out * phases <= in),
        data(phases * length),
        input(phases),
        column(p.window[2].size) {
    const Window& w = p.window[2];
    const auto place = [&](int64_t at) { return data.data() + at % phases * length + at / phases; };
    for (int64_t i = 0; i < phases; ++i) input[i] = place(w.padding + i);
    for (int64_t l = 0; l < w.size; ++l) column[l] = place(l * w.dilation);
    clear(Acc{0});
  }
  void clear(Acc value) { fill(data.data(), phases * length, value); }
};

// `count` elements, of which those at i, i + phases, ... go to out[i]; whole vectors are written.
template <class T>
void split_wide(accumulate_t<T>* const* out, int64_t phases, const T* in, int64_t count) {
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t at = 0; at * phases < count; at += kLane)
    for (int64_t phase = 0; phase < phases; phase += kLane) {
      Vec<accumulate_t<T>> square[kLane];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i) {
        const int64_t first = (at + i) * phases + phase;
        const int64_t left = least(phases - phase, count - first);
        square[i] = left > 0 ? load_lanes(in + first, left) : Vec<accumulate_t<T>>{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i)
        if (i < phases - phase) store_vec(out[phase + i] + at, square[i]);
    }
}

template <class T>
void split_phases(accumulate_t<T>* const* out, int64_t phases, const T* in, int64_t count) {
  if (phases == 1) return copy_row(out[0], in, count);
  if (phases == 2) return split_row(out[0], out[1], in, count, false);
  if (phases == 3) return split_row<T, 3>({out[0], out[1], out[2]}, in, count);
  if (phases == 4) return split_row<T, 4>({out[0], out[1], out[2], out[3]}, in, count);
  if (phases == 6)
    return split_row<T, 6>({out[0], out[1], out[2], out[3], out[4], out[5]}, in, count);
  if (phases == 8)
    return split_row<T, 8>({out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]}, in,
                           count);
  split_wide(out, phases, in, count);
}

template <class T>
void split_lines(const T* row, PhaseLines<accumulate_t<T>>& lines) {
  split_phases(lines.input.data(), lines.phases, row, lines.in);
}

// What the outputs of a row read at each column of the window; whole vectors are written.
template <class Acc>
void store_columns(const PhaseLines<Acc>& lines, int64_t columns, Acc* to, int64_t column) {
  const int64_t out = lines.out;
  for (int64_t l = 0; l < columns; ++l, to += column) {
    const Acc* const from = lines.column[l];
    for (int64_t i = 0; i < out; i += kLanes<Acc>) store_vec(to + i, load_vec(from + i));
  }
}

// What the outputs of a band from row `first` of slice `d` on read of a channel.
template <class T>
void fill_columns(const ConvProblem& p, const ColumnRows& band, int64_t d, int64_t first,
                  const T* channel, PhaseLines<accumulate_t<T>>& lines, accumulate_t<T>* out) {
  for (int64_t i = 0; i < band.slices; ++i) {
    const int64_t slice = source_of(p.window[0], d, i, p.in[0], false);
    for (int64_t phase = 0; phase < band.phases; ++phase) {
      if (!phase_is_read(p.window[1], phase, band.phases)) continue;
      accumulate_t<T>* to = out + (i * band.phases + phase) * band.plane();
      int64_t h = p.window[1].first_input(first) + phase;
      for (int64_t row = 0; row < band.extent; ++row, to += band.width, h += band.phases) {
        if (slice < 0 || h < 0 || h >= p.in[1]) {
          for (int64_t l = 0; l < band.columns; ++l)
            fill(to + l * band.column(), band.width, accumulate_t<T>{0});
          continue;
        }
        const T* const in = channel + (slice * p.in[1] + h) * p.in[2];
        if (lines.apart) {  // what is split are the copies
          for (int64_t l = 0; l < band.columns; ++l) lines.input[l] = to + l * band.column();
          split_phases(lines.input.data(), lines.phases, in,
                       least(p.in[2], p.out[2] * lines.phases));
        } else {
          split_lines(in, lines);
          store_columns(lines, band.columns, to, band.column());
        }
      }
    }
  }
}

// Calls body(r, v) for each accumulator of a tile, unrolled: they stay in registers.
template <int kRows, int kVectors, class Body>
WEFT_INLINE void each_of(const Body& body) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) body(r, v);
  }
}

inline bool activates_in_registers(const ConvProblem& p) {
  return p.activation == Activation::none || p.activation == Activation::relu;
}

// out = activation(Σ source · weights + bias) of kRows channels × kVectors vectors, of which
// `left` elements are there.
template <class T>
struct ColumnTile {
  const accumulate_t<T>* source;
  const int64_t* offsets;  // of each term
  int64_t terms;
  int64_t part;                    // terms of a sum in registers
  const accumulate_t<T>* weights;  // [term, channel of the tile]
  const accumulate_t<T>* bias;
  T* out;
  int64_t out_step;  // from channel to channel
  int64_t left;
  bool streams;
};

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void column_tile(const ConvProblem& p, const ColumnTile<T>& t) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  constexpr int kLane = kLanes<T>;
  const Acc* weights = t.weights;
  V sum[kRows][kVectors] = {};
  const auto add_terms = [&](const int64_t* begin,
                             const int64_t* end) __attribute__((always_inline)) {
    for (const int64_t* offset = begin; offset != end; ++offset, weights += kRows) {
      const Acc* const source = t.source + *offset;
      V x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load_vec(source + v * kLane);
      each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] += weights[r] * x[v]; });
    }
  };
  add_terms(t.offsets, t.offsets + t.part);
  for (int64_t first = t.part; first < t.terms; first += t.part) {
    V total[kRows][kVectors];
    each_of<kRows, kVectors>([&](int r, int v) { total[r][v] = sum[r][v], sum[r][v] = V{}; });
    add_terms(t.offsets + first, t.offsets + least(first + t.part, t.terms));
    each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] += total[r][v]; });
  }
  each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] += t.bias[r]; });
  if (p.activation == Activation::relu)
    each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] = sum[r][v] <= 0 ? V{} : sum[r][v]; });
  const auto at = [&](int r, int v) { return t.out + r * t.out_step + v * kLane; };
  if (t.left < kVectors * kLane)
    each_of<kRows, kVectors>([&](int r, int v) {
      if (t.left > v * kLane) store_lanes(at(r, v), sum[r][v], t.left - v * kLane);
    });
  else if (t.streams)
    each_of<kRows, kVectors>([&](int r, int v) {
      const V value = sum[r][v];
      stream_block<kVectorBytes>(at(r, v), &value);
    });
  else
    each_of<kRows, kVectors>([&](int r, int v) { store_vec(at(r, v), sum[r][v]); });
  if (!activates_in_registers(p))
    for (int r = 0; r < kRows; ++r) activate_row(p, at(r, 0), least(t.left, kVectors * kLane));
}

// `count` elements past the cache, but for a vector's part at either end.
template <class T>
void stream_row(T* to, const T* from, int64_t count) {
  const int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
  const auto off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kVectorBytes / sizeof(T));
  const int64_t head = least(count, off == 0 ? 0 : lanes - off);
  const int64_t body = (count - head) / lanes * lanes;
  memcpy(static_cast<void*>(to), from, head * sizeof(T));
  stream_copy(to + head, from + head, body * sizeof(T));
  memcpy(static_cast<void*>(to + head + body), from + head + body,
         (count - head - body) * sizeof(T));
}

// weights [k, c, place] as [tile of channels, (c, place), channel of the tile].
template <class T>
void pack_columns(const T* weights, int64_t k, int64_t terms, accumulate_t<T>* packed) {
  for_equal_parts<kColumnRows>(k, [&](auto rows, int64_t first) {
    for (int64_t i = 0; i < terms; ++i)
      for (int64_t r = 0; r < decltype(rows)::value; ++r)
        *packed++ = widen(weights[(first + r) * terms + i]);
  });
}

template <class T>
void fprop_columns(const ConvProblem& p, const T* x, const T* w, const T* bias, T* y,
                   const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements(), terms = p.c * places;
  const int64_t band = column_band(p, p.c * p.window[0].size * p.window[2].size, kLanes<T>,
                                   kColumnElements, p.n * p.groups * p.out[0]);
  const ColumnRows layout = column_rows(p, band, kLanes<T>);
  const int64_t bands = ceil_div(p.out[1], band);
  Scratch<Acc> packed(p.weight_elements());
  for (int64_t group = 0; group < p.groups; ++group)
    pack_columns(w + group * p.k * terms, p.k, terms, packed.data() + group * p.k * terms);
  Scratch<int64_t> offsets(terms);
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t place = 0; place < places; ++place) {
      const int64_t l = place % layout.columns, j = place / layout.columns % p.window[1].size;
      offsets[c * places + place] =
          c * layout.channel() + l * layout.column() +
          place / layout.columns / p.window[1].size * layout.phases * layout.plane() +
          layout.row_offset(p.window[1], j);
    }
  const int64_t plane = p.out_positions(), size = static_cast<int64_t>(sizeof(T));
  const bool large = conv_streams(p.out_elements() * size);
  const auto aligned = [](int64_t bytes) { return bytes % kVectorBytes == 0; };
  const bool direct =
      !large || (std::is_same_v<T, Acc> && activates_in_registers(p) &&
                 aligned(reinterpret_cast<intptr_t>(y)) && aligned(plane * size) &&
                 aligned(p.out[1] * p.out[2] * size) && aligned(band * p.out[2] * size));

  parallel_for(context, p.n * p.groups * p.out[0] * bands, 1, [&](int64_t begin, int64_t end) {
    PhaseLines<Acc> lines(p);
    Scratch<Acc> rows(p.c * layout.channel()), start(p.k);
    Scratch<T> stage(direct ? 0 : kColumnRows * kColumnStage * kLanes<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * band;
      const int64_t d = task / bands % p.out[0];
      const int64_t image = task / bands / p.out[0], group = image % p.groups;
      for (int64_t c = 0; c < p.c; ++c)
        fill_columns(p, layout, d, first, x + (image * p.c + c) * p.in_positions(), lines,
                     rows.data() + c * layout.channel());
      for (int64_t k = 0; k < p.k; ++k)
        start[k] = bias != nullptr ? widen(bias[group * p.k + k]) : Acc{0};
      const int64_t positions = least(band, p.out[1] - first) * p.out[2];
      const int64_t vectors = ceil_div(positions, kLanes<T>);
      T* const out = y + image * p.k * plane + (d * p.out[1] + first) * p.out[2];
      for_equal_parts<kColumnRows>(p.k, [&](auto channels, int64_t k) {
        constexpr int kRows = decltype(channels)::value;
        for (int64_t staged = 0; staged < vectors; staged += kColumnStage) {
          const int64_t from = staged * kLanes<T>, step = kColumnStage * kLanes<T>;
          for_equal_parts<kColumnVectors>(
              least(kColumnStage, vectors - staged), [&](auto of_tile, int64_t vector) {
                const int64_t at = from + vector * kLanes<T>;
                column_tile<T, kRows, decltype(of_tile)::value>(
                    p, {rows.data() + at, offsets.data(), terms,
                        ceil_div(terms, ceil_div(terms, kColumnTerms)),
                        packed.data() + (group * p.k + k) * terms, start.data() + k,
                        direct ? out + k * plane + at : stage.data() + vector * kLanes<T>,
                        direct ? plane : step, positions - at, direct && large});
              });
          if (!direct)
            for (int64_t r = 0; r < kRows; ++r)
              stream_row(out + (k + r) * plane + from, stage.data() + r * step,
                         least(step, positions - from));
        }
      });
    }
    if (large) stream_fence();
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
