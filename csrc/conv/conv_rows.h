// Depthwise convolution of contiguous tensors on CPU: vectors along W, shared between rows.
//
// A task is a band of destination rows of one plane, whose source is copied into scratch as in
// conv_planes.h: padded, widened, split by the stride's phases. A tile of a few rows × a few
// vectors of the band stays in registers. For each column of the window a source row is loaded
// once, unaligned, and serves every row of the tile that some place of that column maps to it: R
// rows and M places need R + M − 1 loads for R · M products. Strided dgrad goes phase by phase; the
// two column phases of stride 2 are zipped on the way out. Bound: the copies into scratch where
// windows are small, FLOPs where they are large. Tried and lost: flat runs over the whole band,
// whose loads, one a product, cross cache lines; they remain for planes of several channels.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_bands.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kRowVectors = 4;
inline constexpr int kWindowRows = 5;  // weights held in registers
#else
inline constexpr int kRowVectors = 2;
inline constexpr int kWindowRows = 3;
#endif
// Destination rows of a tile: enough sums in flight to keep the FMA units busy.
template <int vectors>
inline constexpr int kTileRowsOf = vectors == 1 ? 8 : 4;
inline constexpr int64_t kBandElements = 8 * 1024;

// Neighbouring places of a column of the window, at most kWindowRows, that read neighbouring rows
// of scratch: those from `first` + the destination row on.
struct RowChunk {
  int64_t phase;  // of the rows
  int64_t first;
  int64_t places;
  int64_t j;       // the first place
  int64_t j_step;  // to the next one
};

// The chunks of one phase. Returns how many there are.
inline int64_t list_chunks(const ConvProblem& p, const Planes& planes, const AxisPhase& rows,
                           bool transposed, RowChunk* chunks) {
  const Window& window = p.window[1];
  int64_t count = 0;
  for (int64_t row_phase = 0; row_phase < planes.rows.phases; ++row_phase) {
    const int64_t begin = count;
    for (int64_t step = 0; step < window.size; ++step) {
      // Rows of scratch ascend with the place for fprop, against it for dgrad.
      const int64_t j = transposed ? window.size - 1 - step : step;
      int64_t phase, at;
      if (!place_in_scratch(window, planes.rows, rows, j, transposed, &phase, &at) ||
          phase != row_phase)
        continue;
      if (count > begin && chunks[count - 1].first + chunks[count - 1].places == at) {
        RowChunk& last = chunks[count - 1];
        if (last.places++ == 1) last.j_step = j - last.j;
      } else {
        chunks[count++] = {phase, at, 1, j, 0};
      }
    }
  }
  // Split evenly what is more than a tile's registers hold, from the back: chunks only move on.
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) all += ceil_div(chunks[i].places, kWindowRows);
  int64_t to = all;
  for (int64_t i = count - 1; i >= 0; --i) {
    const RowChunk run = chunks[i];
    const int64_t parts = ceil_div(run.places, kWindowRows);
    for (int64_t part = parts - 1; part >= 0; --part) {
      const int64_t begin = run.places * part / parts;
      const int64_t end = run.places * (part + 1) / parts;
      chunks[--to] = {run.phase, run.first + begin, end - begin, run.j + begin * run.j_step,
                      run.j_step};
    }
  }
  return all;
}

// A chunk of one column of one slice of the window.
struct ColumnTap {
  int64_t source;   // in scratch, for destination row 0, column 0, less the shift
  int64_t shift;    // past a vector's alignment
  int64_t places;   // as the chunk's
  int64_t weights;  // of the first place, among those listed
  Range rows;       // destination rows that it brings more than zeros
};

// The taps of one phase of a band, those of equally many places together, in them those of one
// chunk, in them those of one column phase; `order` gets the place of each listed weight. Returns
// how many taps there are.
inline int64_t list_columns(const ConvProblem& p, const Gather& g, const Planes& planes, int64_t d,
                            const RowChunk* chunks, int64_t chunk_count, const AxisPhase& columns,
                            int64_t lanes, ColumnTap* taps, int64_t* order, int64_t* listed) {
  int64_t count = 0;
  for (int64_t places = kWindowRows; places > 0; --places)
    for (int64_t i = 0; i < p.window[0].size; ++i) {
      const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
      if (slice < 0) continue;
      for (const RowChunk* c = chunks; c != chunks + chunk_count; ++c) {
        if (c->places != places) continue;
        const int64_t phases = planes.rows.phases;
        const int64_t lead = planes.rows.lead - c->phase;
        const int64_t from = ceil_div(most(planes.source_rows.begin + lead, 0), phases);
        const int64_t past = floor_div(planes.source_rows.end - 1 + lead, phases) + 1;
        for (int64_t at = 0; at < planes.columns.phases * p.window[2].size; ++at) {
          const int64_t l = at % p.window[2].size;
          int64_t column_phase, column;
          if (!place_in_scratch(p.window[2], planes.columns, columns, l, g.transposed,
                                &column_phase, &column) ||
              column_phase != at / p.window[2].size)
            continue;
          taps[count++] = {(slice - planes.slices.begin) * planes.slice() +
                               (c->phase * planes.columns.phases + column_phase) * planes.plane() +
                               c->first * planes.pitch + column - column % lanes,
                           column % lanes,
                           places,
                           *listed,
                           {from - c->first - places + 1, past - c->first}};
          for (int64_t j = 0; j < places; ++j)
            order[(*listed)++] =
                (i * p.window[1].size + c->j + j * c->j_step) * p.window[2].size + l;
        }
      }
    }
  return count;
}

// Vectors `shift` elements past an aligned address. A load that crosses a cache line costs about
// two cycles, an aligned one half a cycle; where the target can, neighbours are so joined by a
// shuffle.
template <class Acc>
struct ShiftedLoad {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
#if defined(__AVX512F__)
  using Index = typename vector_of<typename LaneMask<Acc>::type>::type;
  Index index;
  WEFT_INLINE explicit ShiftedLoad(int64_t shift) {
    for (int i = 0; i < kCount; ++i) index[i] = i;
    index += static_cast<typename LaneMask<Acc>::type>(shift);
  }
  template <int kVectors>
  WEFT_INLINE void operator()(const Acc* address, Vec<Acc> (&x)[kVectors]) const {
    Vec<Acc> aligned = load_vec(address);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Acc> next = load_vec(address + (v + 1) * kCount);
      x[v] = __builtin_shuffle(aligned, next, index);
      aligned = next;
    }
  }
#else
  int64_t shift;
  WEFT_INLINE explicit ShiftedLoad(int64_t shift) : shift(shift) {}
  template <int kVectors>
  WEFT_INLINE void operator()(const Acc* address, Vec<Acc> (&x)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) x[v] = load_vec(address + shift + v * kCount);
  }
#endif
};

// out[row · out_step + v] = start + the sum over taps, for kRows rows of kVectors vectors, of which
// the first is destination row `row` of the phase; `source` is its place in scratch.
template <class Acc, int kVectors, int kRows>
void row_tile(const ColumnTap* taps, int64_t count, const Acc* source, int64_t pitch, int64_t row,
              const Acc* weights, Acc start, Acc* out, int64_t out_step) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Vec<Acc> sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Acc>{} + start;
  const auto add = [&](auto n, const ColumnTap& tap) __attribute__((always_inline)) {
    constexpr int kPlaces = decltype(n)::value;
    const Acc* const from = source + tap.source;
    const ShiftedLoad<Acc> load(tap.shift);
    Vec<Acc> weight[kPlaces];
#pragma GCC unroll 8
    for (int j = 0; j < kPlaces; ++j) weight[j] = Vec<Acc>{} + weights[tap.weights + j];
#pragma GCC unroll 16
    for (int s = 0; s < kRows + kPlaces - 1; ++s) {
      Vec<Acc> x[kVectors];
      load(from + s * pitch, x);
#pragma GCC unroll 8
      for (int j = 0; j < kPlaces; ++j) {
        const int r = s - j;
        if (r < 0 || r >= kRows) continue;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += weight[j] * x[v];
      }
    }
  };
  int64_t terms = 0;
  bool first = true;
  const auto put = [&]() __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        Acc* to = out + r * out_step + v * kCount;
        store_vec(to, first ? sum[r][v] : load_vec(to) + sum[r][v]);
        sum[r][v] = Vec<Acc>{};
      }
    first = false;
    terms = 0;
  };
  // Taps of equally many places follow one another, so that the sums stay where they are.
  const ColumnTap* tap = taps;
  const ColumnTap* const end = taps + count;
  const auto walk = [&](auto places) __attribute__((always_inline)) {
    constexpr int kPlaces = decltype(places)::value;
    for (; tap != end && tap->places == kPlaces && terms < 2 * kTerms; ++tap) {
      terms += kPlaces;  // of all taps: where a sum is cut does not depend on the rows
      if (tap->rows.begin >= row + kRows || tap->rows.end <= row) continue;
      add(places, *tap);
    }
  };
  while (tap != end) {
    switch (tap->places) {
      case 1:
        walk(Count<1>{});
        break;
      case 2:
        walk(Count<2>{});
        break;
      case 3:
        walk(Count<3>{});
        break;
      case 4:
        if constexpr (kWindowRows >= 4) walk(Count<4>{});
        break;
      default:
        if constexpr (kWindowRows >= 5) walk(Count<5>{});
    }
    if (terms >= 2 * kTerms) put();
  }
  put();
}

// One phase of a band's destination.
struct RowPhase {
  AxisPhase rows;
  AxisPhase columns;
  const ColumnTap* taps;
  int64_t count;
};

// Calls tile(Count<vectors>, Count<rows>, vector, row) so as to cover `vectors` × `rows`.
template <class Tile>
WEFT_INLINE void for_each_row_tile(int64_t vectors, int64_t rows, const Tile& tile) {
  in_steps<kRowVectors>(vectors, [&](auto width, int64_t vector) {
    constexpr int kMost = kTileRowsOf<decltype(width)::value>;
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      const int64_t step = ceil_div(left, ceil_div(left, kMost));
      switch (step) {
        case 8:
          if constexpr (kMost >= 8) tile(width, Count<8>{}, vector, row);
          break;
        case 7:
          if constexpr (kMost >= 7) tile(width, Count<7>{}, vector, row);
          break;
        case 6:
          if constexpr (kMost >= 6) tile(width, Count<6>{}, vector, row);
          break;
        case 5:
          if constexpr (kMost >= 5) tile(width, Count<5>{}, vector, row);
          break;
        case 4:
          tile(width, Count<4>{}, vector, row);
          break;
        case 3:
          tile(width, Count<3>{}, vector, row);
          break;
        case 2:
          tile(width, Count<2>{}, vector, row);
          break;
        default:
          tile(width, Count<1>{}, vector, row);
      }
      row += step;
    }
  });
}

// to[i · step] = from[i], or both phases of step 2 at once.
template <class T>
void scatter_row(T* __restrict to, const accumulate_t<T>* __restrict from, int64_t count,
                 int64_t step) {
  for (int64_t i = 0; i < count; ++i) to[i * step] = narrow<T>(from[i]);
}
template <class T>
void zip_rows(T* __restrict to, const accumulate_t<T>* __restrict even,
              const accumulate_t<T>* __restrict odd, int64_t pairs) {
  int64_t i = 0;
  for (; i + kLanes<T> <= pairs; i += kLanes<T>) {
    Vec<accumulate_t<T>> low = load_vec(even + i), high = load_vec(odd + i);
    zip(low, high);
    store_vec(to + 2 * i, low);
    store_vec(to + 2 * i + kLanes<T>, high);
  }
  for (; i < pairs; ++i) {
    to[2 * i] = narrow<T>(even[i]);
    to[2 * i + 1] = narrow<T>(odd[i]);
  }
}

template <class T>
void gather_rows(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                 const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t places = p.window_elements();
  const int64_t row_phases = g.transposed ? p.window[1].stride : 1;
  const int64_t column_phases = g.transposed ? p.window[2].stride : 1;
  const int64_t phases = row_phases * column_phases;
  const int64_t band = band_rows(p, g, kBandElements);
  const int64_t bands = ceil_div(g.dst[1], band);
  const int64_t images = p.n * p.groups;
  parallel_for(context, g.dst[0] * bands * images, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> source, out, weight(places);
    Scratch<ColumnTap> taps(places);
    Scratch<int64_t> order(places);
    Scratch<RowChunk> chunks(p.window[1].size);
    Scratch<RowPhase> phase_of(phases);
    Planes planes{};
    int64_t of_band = -1, listed = 0, out_phase = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / images % bands * band;
      const int64_t last_row = least(first_row + band, g.dst[1]);
      const int64_t d = task / images / bands;
      const int64_t channel = task % images % p.groups;
      if (of_band != task / images) {
        of_band = task / images;
        planes = band_planes(p, g, d, first_row, last_row);
        planes.pitch = round_up(planes.pitch, kLane);  // rows are aligned
        const int64_t elements =
            planes.channel() + planes.pitch + (kRowVectors + 1) * kLane + p.window[2].span();
        source.resize(elements);
        fill(source.data(), elements, Acc{0});
        ColumnTap* next = taps.data();
        listed = 0;
        for (int64_t i = 0; i < phases; ++i) {
          RowPhase& phase = phase_of[i];
          phase.rows =
              axis_phase(p.window[1], first_row, last_row, i / column_phases, g.transposed);
          phase.columns = axis_phase(p.window[2], 0, g.dst[2], i % column_phases, g.transposed);
          phase.taps = next;
          const int64_t chunk_count =
              list_chunks(p, planes, phase.rows, g.transposed, chunks.data());
          phase.count = list_columns(p, g, planes, d, chunks.data(), chunk_count, phase.columns,
                                     kLane, next, order.data(), &listed);
          next += phase.count;
        }
        out_phase = band * round_up(g.dst[2], kLane);
        out.resize(most(column_phases * out_phase, 16 * kLane));
      }
      fill_planes(p, g, planes, src + task % images * g.src_positions(), source.data());
      for (int64_t i = 0; i < listed; ++i) weight[i] = widen(weights[channel * places + order[i]]);
      const Acc start = bias != nullptr ? widen(bias[channel]) : Acc{0};
      T* const to_slice = dst + (task % images * g.dst[0] + d) * g.dst[1] * g.dst[2];

      for (int64_t row_phase = 0; row_phase < row_phases; ++row_phase) {
        const RowPhase* const of_row = &phase_of[row_phase * column_phases];
        for (int64_t i = 0; i < column_phases; ++i) {
          const RowPhase& phase = of_row[i];
          const int64_t out_step = round_up(phase.columns.count, kLane);
          for_each_row_tile(
              ceil_div(phase.columns.count, kLane), phase.rows.count,
              [&](auto vectors, auto rows, int64_t vector, int64_t row) {
                constexpr int kRows = decltype(rows)::value;
                constexpr int kVectors = decltype(vectors)::value;
                const int64_t column = vector * kLane;
                const Acc* const from = source.data() + row * planes.pitch + column;
                const auto run = [&](Acc* to, int64_t step) {
                  row_tile<Acc, kVectors, kRows>(phase.taps, phase.count, from, planes.pitch, row,
                                                 weight.data(), start, to, step);
                };
                if (phases > 1)
                  return run(out.data() + i * out_phase + row * out_step + column, out_step);
                T* to = to_slice + (first_row + row) * g.dst[2] + column;
                const int64_t columns = least(g.dst[2] - column, kVectors * kLane);
                if constexpr (!Widened<T>::kCopies) {
                  if (columns == kVectors * kLane) return run(to, g.dst[2]);
                }
                run(out.data(), kVectors * kLane);
                for (int r = 0; r < kRows; ++r)
                  narrow_row(to + r * g.dst[2], out.data() + r * kVectors * kLane, columns);
              });
        }
        if (phases == 1) {
          activate_row(p, to_slice + first_row * g.dst[2], (last_row - first_row) * g.dst[2]);
          continue;
        }
        for (int64_t row = 0; row < of_row[0].rows.count; ++row) {
          const AxisPhase& rows = of_row[0].rows;
          T* const to = to_slice + (rows.first + row * rows.step) * g.dst[2];
          int64_t zipped = 0;
          if (column_phases == 2) {
            const bool odd = of_row[0].columns.first > 0;
            const RowPhase& front = of_row[odd ? 1 : 0];
            const RowPhase& back = of_row[odd ? 0 : 1];
            zipped = g.dst[2] / 2;
            zip_rows(
                to, out.data() + (odd ? out_phase : 0) + row * round_up(front.columns.count, kLane),
                out.data() + (odd ? 0 : out_phase) + row * round_up(back.columns.count, kLane),
                zipped);
          }
          for (int64_t i = 0; i < column_phases; ++i) {
            const AxisPhase& columns = of_row[i].columns;
            const Acc* from = out.data() + i * out_phase + row * round_up(columns.count, kLane);
            if (columns.count > zipped)
              scatter_row(to + columns.first + zipped * columns.step, from + zipped,
                          columns.count - zipped, columns.step);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
