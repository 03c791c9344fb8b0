// fprop and dgrad of contiguous tensors of few channels on CPU: vectors along flattened planes.
//
// Rows of scratch (conv_bands.h) share one pitch with the destination, so that a whole band is one
// flat run of positions: position f of it reads, at each window place, scratch element f + an
// offset of that place. Nothing has edges then, and rows much shorter than a vector waste no more
// than the padding's columns, which are computed and dropped. A tile of a few destination channels
// × a few vectors of the run stays in registers while source channels and places are added; the
// rest of a run's sums wait in scratch and are copied out row by row, large outputs past the cache.
// Weights are packed tile by tile. dgrad is the same with roles exchanged, a strided one phase by
// phase of its destination. Chains of additions are cut every `kTerms` and their sums added. Bound:
// FLOPs. Tried and lost: vectors along each row by itself, which wastes most of a vector on rows of
// 7 and 14; bands of a half and a quarter of the scratch.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_bands.h"
#include "core/row_writer.h"

namespace weft::WEFT_TARGET {
namespace {

// Accumulators that the target's registers hold: channels × vectors, the more of one the less of
// the other.
#if defined(__AVX512F__)
inline constexpr int kTileChannels = 6;
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kTileChannels = 4;
inline constexpr int kTileVectors = 2;
#endif
inline constexpr int kSingleVectors = 8;  // of one channel

template <class Acc>
struct PlaneTile {
  const Acc* source;
  int64_t source_step;  // from channel to channel
  int64_t channels;     // of the source
  const Acc* weight;    // [source channel, place, destination channel of the tile]
  int64_t weight_source_step;
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
        const Acc w = weight[tap->weight * kChannels + k];
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

// The weights of tile after tile of destination channels: [source channel, place, channel of the
// tile].
template <class T>
void pack_tiles(const ConvProblem& p, const Gather& g, const T* weights, accumulate_t<T>* packed) {
  const int64_t places = p.window_elements();
  const int64_t source_step = (g.transposed ? p.c : 1) * places;
  const int64_t step = (g.transposed ? 1 : p.c) * places;
  for (int64_t group = 0; group < p.groups; ++group, weights += p.k * p.c * places)
    in_steps<kTileChannels>(g.dst_channels, [&](auto channels, int64_t k) {
      for (int64_t c = 0; c < g.src_channels; ++c)
        for (int64_t place = 0; place < places; ++place)
          for (int64_t i = 0; i < decltype(channels)::value; ++i)
            *packed++ = widen(weights[c * source_step + (k + i) * step + place]);
    });
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
  Scratch<Acc> packed(p.weight_elements());
  pack_tiles(p, g, weights, packed.data());
  const bool streams = phases == 1 && conv_streams(p.n * p.groups * g.dst_channels *
                                                   g.dst_positions() * size_of(p.dtype));
  constexpr int64_t kSlack =
      (kSingleVectors + 1) * kLanes<T>;  // a tile runs past the last position

  // Tasks of one band follow one another: they share taps, and padding that stays zero.
  const int64_t images = p.n * p.groups;
  parallel_for(context, g.dst[0] * bands * images, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> source, out, start(g.dst_channels);
    Scratch<Tap> taps(places);
    Scratch<Range> row_taps(column_phases * (band + row_phases));
    Scratch<PhaseTaps> phase_taps(phases);
    RowWriter<T> writer(nullptr, g.dst[2], streams);
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
          run.weight_source_step = places * kChannels;
          run.weight = packed.data() + (group * g.dst_channels + k) * g.src_channels * places;
          run.out = out.data();
          run.out_step = round_up(positions, kLanes<T>);
          plane_run<Acc, kChannels>(run, phase, planes.pitch, positions, start.data() + k);
          for (int64_t channel = 0; channel < kChannels; ++channel) {
            const Acc* from = out.data() + channel * run.out_step;
            T* const to_plane =
                to_image + (k + channel) * g.dst_positions() + d * g.dst[1] * g.dst[2];
            if (phases == 1) writer.restart(to_plane + first_row * g.dst[2]);
            for (int64_t row = 0; row < phase.rows.count; ++row, from += planes.pitch) {
              if (phases == 1) {
                narrow_row(writer.row(), from, g.dst[2]);
                activate_row(p, writer.row(), g.dst[2]);
                writer.advance(g.dst[2]);
                continue;
              }
              T* const to = to_plane + (phase.rows.first + row * phase.rows.step) * g.dst[2] +
                            phase.columns.first;
              if (phase.columns.step == 1)
                narrow_row(to, from, phase.columns.count);
              else
                for (int64_t column = 0; column < phase.columns.count; ++column)
                  to[column * phase.columns.step] = narrow<T>(from[column]);
            }
          }
        }
      });
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
