// Convolution of contiguous tensors on CPU: vectors along flattened planes.
//
// A task copies the source rows that a band of destination rows reads into scratch, widened to the
// accumulation type and split by the stride's phases, with zeros for the padding. Rows of scratch
// share one pitch with the destination, so that a whole band is one flat run of positions: position
// f of it reads, at each window place, scratch element f + an offset of that place. Nothing has
// edges then, and rows much shorter than a vector waste no more than the padding's columns, which
// are computed and dropped. A tile of a few destination channels × a few vectors of the run stays
// in registers while source channels and places are added; the rest of a run's sums wait in scratch
// and are copied out row by row. dgrad is the same with roles exchanged, a strided one phase by
// phase of its destination. wgrad sums places × channels over the run, each a vector that is folded
// at the end. Chains of additions are cut every `kTerms` and their sums added. Bound: FLOPs for
// dense problems, the copies and loads that straddle lines for depthwise ones. Tried and lost:
// vectors along each row by itself, which wastes most of a vector on rows of 7 and 14.
#pragma once

#include <utility>

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

// Accumulators that the target's registers hold: channels × vectors, the more of one the less of
// the other.
#if defined(__AVX512F__)
inline constexpr int kTileChannels = 6;
inline constexpr int kTileVectors = 4;
inline constexpr int kWgradPlaces = 4;
#else
inline constexpr int kTileChannels = 4;
inline constexpr int kTileVectors = 2;
inline constexpr int kWgradPlaces = 2;
#endif
inline constexpr int kSingleVectors = 8;  // of one channel
inline constexpr int kWgradChannels = 4;
inline constexpr int kWgradSinglePlaces = 8;  // of one channel
inline constexpr int64_t kScratchElements = 48 * 1024;

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Source positions of an axis in scratch: position i is in phase (i + lead) % phases, at place
// (i + lead) / phases of it.
struct AxisLayout {
  int64_t phases;
  int64_t lead;
  int64_t extent;  // places of a phase that are read
};

// For destinations [begin, end).
inline AxisLayout axis_layout(const Window& w, int64_t begin, int64_t end, bool transposed) {
  if (!transposed)
    return {w.stride, -w.first_input(begin), end - begin + (w.span() - 1) / w.stride};
  const int64_t lead = -floor_div(begin + w.padding - w.span() + 1, w.stride);
  return {1, lead, (end - 1 + w.padding) / w.stride + lead + 1};
}

// The source of a band of destination rows in scratch: [slice, row phase, column phase, row,
// pitch].
struct Planes {
  Range slices;
  Range source_rows;
  AxisLayout rows;
  AxisLayout columns;
  // A row's end is the next one's leading padding: the pitch is such that what is read past a row's
  // columns is zero in the next row too.
  int64_t pitch;

  int64_t plane() const { return rows.extent * pitch; }
  int64_t slice() const { return rows.phases * columns.phases * plane(); }
  int64_t channel() const { return (slices.end - slices.begin) * slice(); }
};

inline Planes band_planes(const ConvProblem& p, const Gather& g, int64_t d, int64_t first_row,
                          int64_t last_row) {
  Planes planes;
  planes.slices = sources_of(p.window[0], d, d + 1, g.src[0], g.transposed);
  planes.source_rows = sources_of(p.window[1], first_row, last_row, g.src[1], g.transposed);
  planes.rows = axis_layout(p.window[1], first_row, last_row, g.transposed);
  AxisLayout& columns = planes.columns;
  columns = axis_layout(p.window[2], 0, g.dst[2], g.transposed);
  if (columns.lead < 0) {  // the first columns are not read
    columns.extent -= columns.lead;
    columns.lead = 0;
  }
  const int64_t count = g.transposed ? ceil_div(g.dst[2], p.window[2].stride) : g.dst[2];
  planes.pitch = most(count, most(columns.extent - columns.lead / columns.phases,
                                  (columns.lead + g.src[2] - 1) / columns.phases + 1));
  return planes;
}

template <class T>
void narrow_row(T* out, const accumulate_t<T>* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(out + i, load_vec(in + i));
  if (i < count)
    store_part(out + i, load_part(in + i, static_cast<int>(count - i)),
               static_cast<int>(count - i));
}

// a and b, of 2n elements together: first those at even places, then those at odd ones; and back.
template <class V, int... Lane>
WEFT_INLINE void unzip(V& a, V& b, std::integer_sequence<int, Lane...>) {
  const V even = __builtin_shufflevector(a, b, 2 * Lane...);
  b = __builtin_shufflevector(a, b, (2 * Lane + 1)...);
  a = even;
}
template <class V, int... Lane>
WEFT_INLINE void zip(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  const V low = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kCount)...);
  b = __builtin_shufflevector(a, b, (kCount / 2 + Lane / 2 + Lane % 2 * kCount)...);
  a = low;
}
template <class V>
using LaneSequence = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;
template <class V>
WEFT_INLINE void unzip(V& a, V& b) {
  unzip(a, b, LaneSequence<V>{});
}
template <class V>
WEFT_INLINE void zip(V& a, V& b) {
  zip(a, b, LaneSequence<V>{});
}

// The even and the odd ones of `count` elements.
template <class T>
void split_row(accumulate_t<T>* even, accumulate_t<T>* odd, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
    Vec<accumulate_t<T>> a = load_vec(in + i), b = load_vec(in + i + kLanes<T>);
    unzip(a, b);
    store_vec(even + i / 2, a);
    store_vec(odd + i / 2, b);
  }
  if (i == count) return;
  const auto left = static_cast<int>(count - i);
  const int front = left < kLanes<T> ? left : kLanes<T>;
  Vec<accumulate_t<T>> a = load_part(in + i, front), b{};
  if (left > front) b = load_part(in + i + front, left - front);
  unzip(a, b);
  store_part(even + i / 2, a, (left + 1) / 2);
  store_part(odd + i / 2, b, left / 2);
}

inline bool phase_is_read(const Window& w, int64_t phase, int64_t phases) {
  for (int64_t k = 0; k < w.size; ++k)
    if (k * w.dilation % phases == phase) return true;
  return false;
}

// Copies one channel of the source into its planes; padding is not written.
template <class T>
void fill_planes(const ConvProblem& p, const Gather& g, const Planes& planes, const T* channel,
                 accumulate_t<T>* out) {
  const AxisLayout& columns = planes.columns;
  for (int64_t slice = planes.slices.begin; slice < planes.slices.end; ++slice)
    for (int64_t row = planes.source_rows.begin; row < planes.source_rows.end; ++row) {
      const T* from = channel + (slice * g.src[1] + row) * g.src[2];
      const int64_t padded = row + planes.rows.lead;
      if (planes.rows.phases > 1 &&
          !phase_is_read(p.window[1], padded % planes.rows.phases, planes.rows.phases))
        continue;
      accumulate_t<T>* to = out + (slice - planes.slices.begin) * planes.slice() +
                            padded % planes.rows.phases * columns.phases * planes.plane() +
                            padded / planes.rows.phases * planes.pitch;
      if (columns.phases == 1) {
        copy_row(to + columns.lead, from, g.src[2]);
        continue;
      }
      if (columns.phases == 2) {
        // Column 0 is in the phase of `lead`.
        accumulate_t<T>* const same = to + (columns.lead % 2) * planes.plane() + columns.lead / 2;
        accumulate_t<T>* const other =
            to + (columns.lead + 1) % 2 * planes.plane() + (columns.lead + 1) / 2;
        split_row(same, other, from, g.src[2]);
        continue;
      }
      for (int64_t phase = 0; phase < columns.phases; ++phase, to += planes.plane()) {
        if (!phase_is_read(p.window[2], phase, columns.phases)) continue;
        const int64_t first = ceil_div(most(columns.lead - phase, 0), columns.phases);
        const int64_t begin = first * columns.phases + phase - columns.lead;
        const int64_t count = begin < g.src[2] ? ceil_div(g.src[2] - begin, columns.phases) : 0;
        for (int64_t i = 0; i < count; ++i) to[first + i] = widen(from[begin + i * columns.phases]);
      }
    }
}

// One place of the window, as offsets into a channel's scratch and into its weights.
struct Tap {
  int64_t source;
  int64_t weight;
};

// ---- fprop and dgrad ---------------------------------------------------------------------------

// Destination positions first, first + step, ... of an axis.
struct AxisPhase {
  int64_t first;
  int64_t step;
  int64_t count;
};

inline AxisPhase axis_phase(const Window& w, int64_t begin, int64_t end, int64_t phase,
                            bool transposed) {
  if (!transposed) return {begin, 1, end - begin};
  const int64_t offset = (phase - w.padding - begin) % w.stride;
  const int64_t first = begin + (offset < 0 ? offset + w.stride : offset);
  return {first, w.stride, first < end ? ceil_div(end - first, w.stride) : 0};
}

// Where place k finds the source of an axis phase's first position in scratch; false if that phase
// does not meet it.
inline bool place_in_scratch(const Window& w, const AxisLayout& layout, const AxisPhase& phase,
                             int64_t k, bool transposed, int64_t* source_phase, int64_t* at) {
  const int64_t offset = k * w.dilation;
  if (!transposed) {
    *source_phase = offset % w.stride;
    *at = offset / w.stride;
    return true;
  }
  const int64_t padded = phase.first + w.padding - offset;
  *source_phase = 0;
  *at = padded / w.stride + layout.lead;
  return padded % w.stride == 0;
}

// The taps of one phase of a band's destination, and which of them each of its rows needs.
struct PhaseTaps {
  AxisPhase rows;
  AxisPhase columns;
  Tap* taps;
  Range* of_row;

  // Taps that one of the flat positions [begin, end) needs.
  Range of(int64_t begin, int64_t end, int64_t pitch) const {
    const int64_t last = least((end - 1) / pitch, rows.count - 1);
    Range all = of_row[begin / pitch];
    for (int64_t row = begin / pitch + 1; row <= last; ++row) {
      all.begin = least(all.begin, of_row[row].begin);
      all.end = most(all.end, of_row[row].end);
    }
    return all;
  }
};

// Returns how many taps there are.
inline int64_t list_taps(const ConvProblem& p, const Gather& g, const Planes& planes, int64_t d,
                         PhaseTaps& out) {
  const int64_t all = p.window_elements();
  for (int64_t row = 0; row < out.rows.count; ++row) out.of_row[row] = {all, 0};
  int64_t count = 0;
  for (int64_t j = 0; j < p.window[1].size; ++j) {
    int64_t row_phase, row_at;
    if (!place_in_scratch(p.window[1], planes.rows, out.rows, j, g.transposed, &row_phase, &row_at))
      continue;
    const int64_t begin = count;
    for (int64_t i = 0; i < p.window[0].size; ++i) {
      const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
      if (slice < 0) continue;
      for (int64_t l = 0; l < p.window[2].size; ++l) {
        int64_t phase, at;
        if (!place_in_scratch(p.window[2], planes.columns, out.columns, l, g.transposed, &phase,
                              &at))
          continue;
        out.taps[count++] = {(slice - planes.slices.begin) * planes.slice() +
                                 (row_phase * planes.columns.phases + phase) * planes.plane() +
                                 row_at * planes.pitch + at,
                             (i * p.window[1].size + j) * p.window[2].size + l};
      }
    }
    for (int64_t row = 0; row < out.rows.count; ++row) {
      const int64_t h = out.rows.first + row * out.rows.step;
      if (source_of(p.window[1], h, j, g.src[1], g.transposed) < 0) continue;
      out.of_row[row] = {least(out.of_row[row].begin, begin), count};
    }
  }
  return count;
}

template <class Acc>
struct PlaneTile {
  const Acc* source;
  int64_t source_step;  // from channel to channel
  int64_t channels;     // of the source
  const Acc* weight;
  int64_t weight_source_step;
  int64_t weight_step;  // from destination channel to destination channel
  Acc* out;
  int64_t out_step;  // from channel to channel
};

// out = start + the sum over source channels and taps, of kChannels runs of kVectors vectors; with
// no `start`, out itself is what is added to.
template <class Acc, int kChannels, int kVectors>
void plane_tile(const PlaneTile<Acc>& t, const Tap* begin, const Tap* end, const Acc* start) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Vec<Acc> sum[kChannels][kVectors];
  for (int k = 0; k < kChannels; ++k)
    for (int v = 0; v < kVectors; ++v)
      sum[k][v] = Vec<Acc>{} + (start != nullptr ? start[k] : Acc{0});
  for (int64_t c = 0; c < t.channels; ++c) {
    const Acc* source = t.source + c * t.source_step;
    const Acc* weight = t.weight + c * t.weight_source_step;
    for (const Tap* tap = begin; tap != end; ++tap) {
      Vec<Acc> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load_vec(source + tap->source + v * kCount);
      for (int k = 0; k < kChannels; ++k) {
        const Acc w = weight[tap->weight + k * t.weight_step];
        for (int v = 0; v < kVectors; ++v) sum[k][v] += w * x[v];
      }
    }
  }
  for (int k = 0; k < kChannels; ++k)
    for (int v = 0; v < kVectors; ++v) {
      Acc* to = t.out + k * t.out_step + v * kCount;
      store_vec(to, start != nullptr ? sum[k][v] : load_vec(to) + sum[k][v]);
    }
}

// All flat positions of kChannels destination channels.
template <class Acc, int kChannels>
void plane_run(const PlaneTile<Acc>& run, const PhaseTaps& phase, int64_t pitch, int64_t positions,
               const Acc* start) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  constexpr int kVectors = kChannels == 1 ? kSingleVectors : kTileVectors;
  in_steps<kVectors>(ceil_div(positions, kCount), [&](auto vectors, int64_t vector) {
    constexpr int kWidth = decltype(vectors)::value;
    const int64_t first = vector * kCount;
    const Range taps = phase.of(first, least(first + kWidth * kCount, positions), pitch);
    PlaneTile<Acc> tile = run;
    tile.out += first;
    const Acc* from = start;
    // Chains of about kTerms additions: channels together, or a window's places apart.
    const int64_t block = most(1, kTerms / most(taps.end - taps.begin, 1));
    int64_t c = 0;
    do {
      tile.channels = least(block, run.channels - c);
      tile.source = run.source + first + c * run.source_step;
      tile.weight = run.weight + c * run.weight_source_step;
      int64_t tap = taps.begin;
      do {
        const int64_t tap_end = most(tap, least(tap + 2 * kTerms, taps.end));
        plane_tile<Acc, kChannels, kWidth>(tile, phase.taps + tap, phase.taps + tap_end, from);
        from = nullptr;
        tap = tap_end;
      } while (tap < taps.end);
      c += block;
    } while (c < run.channels);
  });
}

// Destination rows of a task: as many as have their source in `scratch_elements`, but few enough
// for several tasks. Whole strides, so that each phase has the same rows.
inline int64_t band_rows(const ConvProblem& p, const Gather& g, int64_t scratch_elements) {
  const int64_t step = g.transposed ? p.window[1].stride : 1;
  const int64_t images = p.n * p.groups * g.dst[0];
  int64_t rows = round_up(g.dst[1], step);
  const auto elements = [&] {
    return g.src_channels * band_planes(p, g, g.dst[0] / 2, 0, least(rows, g.dst[1])).channel();
  };
  while (rows > step &&
         (elements() > scratch_elements || (rows > 8 && images * ceil_div(g.dst[1], rows) < 8)))
    rows = round_up(rows / 2, step);
  return rows;
}

template <class T>
void gather_planes(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                   const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements();
  const int64_t row_phases = g.transposed ? p.window[1].stride : 1;
  const int64_t column_phases = g.transposed ? p.window[2].stride : 1;
  const int64_t phases = row_phases * column_phases;
  const int64_t band = band_rows(p, g, kScratchElements);
  const int64_t bands = ceil_div(g.dst[1], band);
  const Widened<T> wide(weights, p.weight_elements(), context);
  constexpr int64_t kSlack =
      (kSingleVectors + 1) * kLanes<T>;  // a tile runs past the last position

  // Tasks of one band follow one another: they share taps, and padding that stays zero.
  const int64_t images = p.n * p.groups;
  parallel_for(context, g.dst[0] * bands * images, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> source, out, start(g.dst_channels);
    Scratch<Tap> taps(places);
    Scratch<Range> row_taps(column_phases * (band + row_phases));
    Scratch<PhaseTaps> phase_taps(phases);
    Planes planes{};
    int64_t of_band = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / images % bands * band;
      const int64_t last_row = least(first_row + band, g.dst[1]);
      const int64_t d = task / images / bands;
      const int64_t group = task % images % p.groups;
      if (of_band != task / images) {
        of_band = task / images;
        planes = band_planes(p, g, d, first_row, last_row);
        const int64_t elements = g.src_channels * planes.channel() + planes.pitch + kSlack;
        source.resize(elements);
        fill(source.data(), elements, Acc{0});
        int64_t longest = 0;
        Tap* next_tap = taps.data();
        Range* next_row = row_taps.data();
        for (int64_t i = 0; i < phases; ++i) {
          PhaseTaps& phase = phase_taps[i];
          phase.rows =
              axis_phase(p.window[1], first_row, last_row, i / column_phases, g.transposed);
          phase.columns = axis_phase(p.window[2], 0, g.dst[2], i % column_phases, g.transposed);
          phase.taps = next_tap;
          phase.of_row = next_row;
          next_tap += list_taps(p, g, planes, d, phase);
          next_row += phase.rows.count;
          longest = most(longest, phase.rows.count);
        }
        out.resize(kTileChannels * round_up(longest * planes.pitch, kLanes<T>));
      }
      const T* image = src + task % images * g.src_channels * g.src_positions();
      for (int64_t c = 0; c < g.src_channels; ++c)
        fill_planes(p, g, planes, image + c * g.src_positions(),
                    source.data() + c * planes.channel());
      for (int64_t k = 0; k < g.dst_channels; ++k)
        start[k] = bias != nullptr ? widen(bias[group * g.dst_channels + k]) : Acc{0};

      T* const to_image = dst + task % images * g.dst_channels * g.dst_positions();
      in_steps<kTileChannels>(g.dst_channels, [&](auto channels, int64_t k) {
        constexpr int kChannels = decltype(channels)::value;
        for (int64_t i = 0; i < phases; ++i) {
          const PhaseTaps& phase = phase_taps[i];
          if (phase.rows.count == 0 || phase.columns.count == 0) continue;
          const int64_t positions = (phase.rows.count - 1) * planes.pitch + phase.columns.count;
          PlaneTile<Acc> run{};
          run.source = source.data();
          run.source_step = planes.channel();
          run.channels = g.src_channels;
          run.weight_source_step = g.transposed ? p.c * places : places;
          run.weight_step = g.transposed ? places : p.c * places;
          run.weight = wide.data() + group * p.k * p.c * places + k * run.weight_step;
          run.out = out.data();
          run.out_step = round_up(positions, kLanes<T>);
          plane_run<Acc, kChannels>(run, phase, planes.pitch, positions, start.data() + k);
          for (int64_t channel = 0; channel < kChannels; ++channel)
            for (int64_t row = 0; row < phase.rows.count; ++row) {
              const int64_t h = phase.rows.first + row * phase.rows.step;
              const Acc* from = out.data() + channel * run.out_step + row * planes.pitch;
              T* to = to_image + (k + channel) * g.dst_positions() + (d * g.dst[1] + h) * g.dst[2] +
                      phase.columns.first;
              if (phase.columns.step == 1)
                narrow_row(to, from, phase.columns.count);
              else
                for (int64_t column = 0; column < phase.columns.count; ++column)
                  to[column * phase.columns.step] = narrow<T>(from[column]);
              activate_row(p, to, phase.columns.count);
            }
        }
      });
    }
  });
}

// ---- wgrad -------------------------------------------------------------------------------------

// Runs of a few images in scratch: planes of some input channels, flat gradients of all channels,
// which are zero between their rows.
template <class Acc>
struct WgradRuns {
  int64_t images;
  int64_t positions;  // of a run, a whole number of vectors
  const Acc* x;
  int64_t x_image;
  const Acc* gy;  // [image, channel, position]
  int64_t channels;
};

template <class Acc>
struct LaneMask {
  using type = int32_t;
};
template <>
struct LaneMask<double> {
  using type = int64_t;
};

// Adds to sums[taps[i].weight + k · sum_step] the product of the runs, for kPlaces taps i and
// kChannels channels k. `inside`, if there, keeps out what lies between the rows: the gradient is
// zero there, but the input may be infinite. Without it, a sum that is not finite adds nothing and
// returns false.
template <class Acc, int kPlaces, int kChannels>
bool wgrad_tile(const WgradRuns<Acc>& runs, const Tap* taps, int64_t channel,
                const typename LaneMask<Acc>::type* inside, Acc* sums, int64_t sum_step) {
  using V = Vec<Acc>;
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  V sum[kPlaces][kChannels] = {};
  for (int64_t n = 0; n < runs.images; ++n) {
    const Acc* x = runs.x + n * runs.x_image;
    const Acc* gy = runs.gy + (n * runs.channels + channel) * runs.positions;
    for (int64_t at = 0; at < runs.positions; at += kCount) {
      V g[kChannels];
      for (int k = 0; k < kChannels; ++k) g[k] = load_vec(gy + k * runs.positions + at);
      for (int i = 0; i < kPlaces; ++i) {
        V value = load_vec(x + taps[i].source + at);
        if (inside != nullptr) {
          Vec<typename LaneMask<Acc>::type> keep;
          memcpy(&keep, inside + at, sizeof(keep));
          value = keep ? value : V{};
        }
        for (int k = 0; k < kChannels; ++k) sum[i][k] += value * g[k];
      }
    }
  }
  Acc total[kPlaces][kChannels];
  bool finite = true;
  for (int i = 0; i < kPlaces; ++i)
    for (int k = 0; k < kChannels; ++k) {
      total[i][k] = sum_of_lanes<Acc>(sum[i][k]);
      finite = finite && total[i][k] - total[i][k] == 0;
    }
  if (inside == nullptr && !finite) return false;
  for (int i = 0; i < kPlaces; ++i)
    for (int k = 0; k < kChannels; ++k) sums[taps[i].weight + k * sum_step] += total[i][k];
  return true;
}

template <class T>
void wgrad_planes(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  using Mask = typename LaneMask<Acc>::type;
  const Gather g = fprop_gather(p);
  const int64_t places = p.window_elements();
  // Enough input channels at a time that copying the gradient's rows is little work.
  const int64_t block = least(p.c, most(1, ceil_div(32, places)));
  const int64_t blocks = ceil_div(p.c, block);
  const auto run_elements = [&](const Planes& planes, int64_t rows) {
    return block * planes.channel() + p.k * round_up(rows * planes.pitch, kLanes<T>);
  };
  int64_t band = p.out[1];
  const auto elements = [&] {
    return run_elements(band_planes(p, g, p.out[0] / 2, 0, band), band);
  };
  while (band > 1 && elements() > kScratchElements) band = (band + 1) / 2;
  const int64_t images =
      band < p.out[1] ? 1 : most(1, least(p.n, kScratchElements / most(elements(), 1)));
  const int64_t chunks = image_chunks(ceil_div(p.n, images), p.groups * blocks);
  const int64_t chunk_images = round_up(ceil_div(p.n, chunks), images);

  const int64_t count = p.weight_elements();
  Scratch<Acc> partial(chunks * count);
  parallel_for(context, chunks * p.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> x_scratch, gy_scratch;
    Scratch<Mask> mask;
    Scratch<Tap> taps(block * places);
    Scratch<Range> row_taps(p.out[1]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_c = task % blocks * block;
      const int64_t channels = least(block, p.c - first_c);
      const int64_t group = task / blocks % p.groups;
      const int64_t chunk = task / blocks / p.groups;
      // Weight (k, c, place) of this task is at sums[(k · C + c − first_c) · places + place].
      Acc* sums = partial.data() + chunk * count + (group * p.k * p.c + first_c) * places;
      for (int64_t k = 0; k < p.k; ++k) fill(sums + k * p.c * places, channels * places, Acc{0});
      const int64_t last = least(p.n, (chunk + 1) * chunk_images);
      for (int64_t d = 0; d < p.out[0]; ++d)
        for (int64_t first_row = 0; first_row < p.out[1]; first_row += band) {
          const int64_t rows = least(band, p.out[1] - first_row);
          const Planes planes = band_planes(p, g, d, first_row, first_row + rows);
          PhaseTaps phase{};
          phase.rows = axis_phase(p.window[1], first_row, first_row + rows, 0, false);
          phase.columns = axis_phase(p.window[2], 0, p.out[2], 0, false);
          phase.taps = taps.data();
          phase.of_row = row_taps.data();
          const int64_t window_taps = list_taps(p, g, planes, d, phase);
          for (int64_t c = 1; c < channels; ++c)
            for (int64_t i = 0; i < window_taps; ++i)
              taps[c * window_taps + i] = {taps[i].source + c * planes.channel(),
                                           taps[i].weight + c * places};
          WgradRuns<Acc> runs{};
          runs.positions = round_up((rows - 1) * planes.pitch + p.out[2], kLanes<T>);
          runs.x_image = channels * planes.channel();
          runs.channels = p.k;
          const int64_t slack = planes.pitch + kLanes<T>;
          // Padding and what lies between rows stay zero from one fill to the next.
          x_scratch.resize(images * runs.x_image + slack);
          fill(x_scratch.data(), images * runs.x_image + slack, Acc{0});
          gy_scratch.resize(images * p.k * runs.positions);
          fill(gy_scratch.data(), images * p.k * runs.positions, Acc{0});
          mask.resize(runs.positions);
          fill(mask.data(), runs.positions, Mask{0});
          for (int64_t row = 0; row < rows; ++row)
            fill(mask.data() + row * planes.pitch, p.out[2], Mask{-1});
          runs.x = x_scratch.data();
          runs.gy = gy_scratch.data();
          for (int64_t n = chunk * chunk_images; n < last; n += images) {
            runs.images = least(images, last - n);
            for (int64_t i = 0; i < runs.images; ++i) {
              const int64_t image = (n + i) * p.groups + group;
              for (int64_t c = 0; c < channels; ++c)
                fill_planes(p, g, planes, x + (image * p.c + first_c + c) * p.in_positions(),
                            x_scratch.data() + i * runs.x_image + c * planes.channel());
              for (int64_t k = 0; k < p.k; ++k)
                for (int64_t row = 0; row < rows; ++row)
                  copy_row(gy_scratch.data() + (i * p.k + k) * runs.positions + row * planes.pitch,
                           gy + (image * p.k + k) * p.out_positions() +
                               (d * p.out[1] + first_row + row) * p.out[2],
                           p.out[2]);
            }
            const auto tile = [&](auto tap_count, auto channel_count, int64_t tap, int64_t k) {
              constexpr int kPlaces = decltype(tap_count)::value;
              constexpr int kChannels = decltype(channel_count)::value;
              const Mask* const masks[] = {nullptr, mask.data()};
              for (const Mask* inside : masks)
                if (wgrad_tile<Acc, kPlaces, kChannels>(runs, taps.data() + tap, k, inside,
                                                        sums + k * p.c * places, p.c * places))
                  break;
            };
            const int64_t all = channels * window_taps;
            if (p.k == 1)
              in_steps<kWgradSinglePlaces>(
                  all, [&](auto tap_count, int64_t tap) { tile(tap_count, Count<1>{}, tap, 0); });
            else
              in_steps<kWgradPlaces>(all, [&](auto tap_count, int64_t tap) {
                in_steps<kWgradChannels>(p.k, [&](auto channel_count, int64_t k) {
                  tile(tap_count, channel_count, tap, k);
                });
              });
          }
        }
    }
  });
  parallel_for(context, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Acc sum = partial[i];
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
      gw[i] = narrow<T>(sum);
    }
  });
}

template <class T>
void bias_grad_planes(const ConvProblem& p, const T* gy, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kRun = 16 * 4 * kLanes<T>;
  const int64_t positions = p.out_positions();
  const int64_t channels = p.out_channels();
  parallel_for(context, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Vec<Acc> total = {};
      for (int64_t n = 0; n < p.n; ++n) {
        const T* const from = gy + (n * channels + k) * positions;
        // Sums of runs, of an image, of all: short chains of additions.
        Vec<Acc> image = {};
        for (int64_t run = 0; run < positions; run += kRun) {
          const int64_t end = least(run + kRun, positions);
          Vec<Acc> sum[4] = {};
          int64_t i = run;
          for (; i + 4 * kLanes<T> <= end; i += 4 * kLanes<T>)
            for (int v = 0; v < 4; ++v) sum[v] += load_vec(from + i + v * kLanes<T>);
          for (; i + kLanes<T> <= end; i += kLanes<T>) sum[0] += load_vec(from + i);
          if (i < end) sum[1] += load_part(from + i, static_cast<int>(end - i));
          image += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
        total += image;
      }
      gb[k] = narrow<T>(sum_of_lanes<Acc>(total));
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
