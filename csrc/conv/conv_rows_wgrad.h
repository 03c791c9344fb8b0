// Weight gradients of depthwise convolution of contiguous tensors on CPU: vectors along W, shared
// between rows.
//
// A task is one channel of a chunk of images. As in conv_rows.h, a band of source rows lies in
// scratch, padded and split by phases; so do the gradient's rows, with zeros past their ends. A
// tile holds the sums of a few places of a few window columns as vectors. For each few rows of the
// gradient, held in registers, a row of the source is loaded once, shifted to each window column,
// and meets every row of the gradient that some place pairs it with. Sums join the task's totals
// after each band and are folded at the end, which keeps chains of additions short. Bound: as
// there.
#pragma once

#include "conv/conv_rows.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int kGradientRows = 4;
#if defined(__AVX512F__)
inline constexpr int kWgradSums = 12;
#else
inline constexpr int kWgradSums = 6;
#endif
// Window columns of a tile with so many places in each.
template <int places>
inline constexpr int kWgradColumns = places >= 4   ? kWgradSums / places
                                     : places == 1 ? 4
                                                   : 3;

// Vectors at kColumns shifts past one aligned address.
template <class Acc, int kColumns>
struct ShiftedLoads {
#if defined(__AVX512F__)
  typename ShiftedLoad<Acc>::Index index[kColumns];
  WEFT_INLINE explicit ShiftedLoads(const ColumnTap* taps) {
    for (int t = 0; t < kColumns; ++t) index[t] = ShiftedLoad<Acc>(taps[t].shift).index;
  }
  WEFT_INLINE void operator()(const Acc* address, Vec<Acc> (&value)[kColumns]) const {
    const Vec<Acc> aligned = load_vec(address);
    const Vec<Acc> next = load_vec(address + ShiftedLoad<Acc>::kCount);
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t) value[t] = __builtin_shuffle(aligned, next, index[t]);
  }
#else
  int64_t shift[kColumns];
  WEFT_INLINE explicit ShiftedLoads(const ColumnTap* taps) {
    for (int t = 0; t < kColumns; ++t) shift[t] = taps[t].shift;
  }
  WEFT_INLINE void operator()(const Acc* address, Vec<Acc> (&value)[kColumns]) const {
    for (int t = 0; t < kColumns; ++t) value[t] = load_vec(address + shift[t]);
  }
#endif
};

// The last vector of a row, which has `left` columns; all others are zero.
template <class Acc>
WEFT_INLINE Vec<Acc> first_lanes(Vec<Acc> value, int64_t left) {
  using Mask = typename LaneMask<Acc>::type;
  typename vector_of<Mask>::type lane;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(Acc)); ++i) lane[i] = i;
  return lane < static_cast<Mask>(left) ? value : Vec<Acc>{};
}

// totals[order[place]] += x · gy over `rows` × `columns`, for kPlaces places of kColumns taps. What
// x holds past the columns meets zeros of gy, but may be infinite.
template <class Acc, int kPlaces, int kColumns>
void row_wgrad_tile(const ColumnTap* taps, Range rows, int64_t columns, const Acc* x, int64_t pitch,
                    const Acc* gy, int64_t gy_pitch, const int64_t* order, Acc* totals) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Vec<Acc> sum[kColumns][kPlaces] = {};
  const ShiftedLoads<Acc, kColumns> load(taps);
  const auto add = [&](auto n, auto full, int64_t row, int64_t at) __attribute__((always_inline)) {
    constexpr int kRows = decltype(n)::value;
    const Acc* const from = x + taps[0].source + row * pitch + at;
    Vec<Acc> g[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) g[r] = load_vec(gy + (row + r) * gy_pitch + at);
#pragma GCC unroll 16
    for (int s = 0; s < kRows + kPlaces - 1; ++s) {
      Vec<Acc> value[kColumns];
      load(from + s * pitch, value);
#pragma GCC unroll 8
      for (int t = 0; t < kColumns; ++t) {
        if constexpr (decltype(full)::value == 0)
          value[t] = first_lanes<Acc>(value[t], columns - at);
#pragma GCC unroll 8
        for (int j = 0; j < kPlaces; ++j)
          if (s - j >= 0 && s - j < kRows) sum[t][j] += value[t] * g[s - j];
      }
    }
  };
  const int64_t whole = columns - columns % kCount;
  const auto walk = [&](auto row_count, int64_t row) __attribute__((always_inline)) {
    for (int64_t column = 0; column < whole; column += kCount)
      add(row_count, Count<1>{}, rows.begin + row, column);
    if (whole < columns) add(row_count, Count<0>{}, rows.begin + row, whole);
  };
  in_steps<kGradientRows>(rows.end - rows.begin, walk);
  for (int t = 0; t < kColumns; ++t)
    for (int j = 0; j < kPlaces; ++j) {
      Acc* const to = totals + order[taps[t].weights + j] * kCount;
      store_vec(to, load_vec(to) + sum[t][j]);
    }
}

template <class T>
void wgrad_rows(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const Gather g = fprop_gather(p);
  const int64_t places = p.window_elements();
  const int64_t band = band_rows(p, g, kBandElements);
  const int64_t gy_pitch = round_up(p.out[2], kLane);
  const int64_t chunks = image_chunks(p.n, p.groups);
  Scratch<Acc> partial(chunks * p.groups * places);
  parallel_for(context, chunks * p.groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> source, gradient(band * gy_pitch), totals(places * kLane);
    Scratch<ColumnTap> taps(places);
    Scratch<int64_t> order(places);
    Scratch<RowChunk> row_chunks(p.window[1].size);
    fill(gradient.data(), band * gy_pitch, Acc{0});
    Planes planes{};
    int64_t of_band = -1, count = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % p.groups;
      const int64_t chunk = task / p.groups;
      fill(totals.data(), places * kLane, Acc{0});
      for (int64_t d = 0; d < p.out[0]; ++d)
        for (int64_t first_row = 0; first_row < p.out[1]; first_row += band) {
          const int64_t rows = least(band, p.out[1] - first_row);
          if (of_band != d * p.out[1] + first_row) {
            of_band = d * p.out[1] + first_row;
            planes = band_planes(p, g, d, first_row, first_row + rows);
            planes.pitch = round_up(planes.pitch, kLane);
            const int64_t elements =
                planes.channel() + planes.pitch + 2 * kLane + p.window[2].span();
            source.resize(elements);
            fill(source.data(), elements, Acc{0});
            const AxisPhase of_rows =
                axis_phase(p.window[1], first_row, first_row + rows, 0, false);
            const AxisPhase of_columns = axis_phase(p.window[2], 0, p.out[2], 0, false);
            const int64_t chunk_count = list_chunks(p, planes, of_rows, false, row_chunks.data());
            int64_t listed = 0;
            count = list_columns(p, g, planes, d, row_chunks.data(), chunk_count, of_columns, kLane,
                                 taps.data(), order.data(), &listed);
          }
          for (int64_t n = p.n * chunk / chunks; n < p.n * (chunk + 1) / chunks; ++n) {
            const int64_t image = n * p.groups + channel;
            fill_planes(p, g, planes, x + image * p.in_positions(), source.data());
            const T* const from =
                gy + image * p.out_positions() + (d * p.out[1] + first_row) * p.out[2];
            for (int64_t row = 0; row < rows; ++row)
              copy_row(gradient.data() + row * gy_pitch, from + row * p.out[2], p.out[2]);
            for (int64_t tap = 0; tap < count;) {
              const auto walk = [&](auto place_count) {
                constexpr int kPlaces = decltype(place_count)::value;
                int64_t same = tap;  // taps of the same chunk of rows that load the same vectors
                while (same < count && taps[same].places == kPlaces &&
                       taps[same].source == taps[tap].source)
                  ++same;
                const Range needed = {most(0, taps[tap].rows.begin),
                                      least(rows, taps[tap].rows.end)};
                if (needed.begin < needed.end)
                  in_steps<kWgradColumns<kPlaces>>(same - tap, [&](auto columns, int64_t first) {
                    row_wgrad_tile<Acc, kPlaces, decltype(columns)::value>(
                        taps.data() + tap + first, needed, p.out[2], source.data(), planes.pitch,
                        gradient.data(), gy_pitch, order.data(), totals.data());
                  });
                tap = same;
              };
              switch (taps[tap].places) {
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
            }
          }
        }
      for (int64_t place = 0; place < places; ++place)
        partial[task * places + place] = sum_of_lanes<Acc>(load_vec(totals.data() + place * kLane));
    }
  });
  for (int64_t i = 0; i < p.groups * places; ++i) {
    Acc sum = partial[i];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += partial[chunk * p.groups * places + i];
    gw[i] = narrow<T>(sum);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
