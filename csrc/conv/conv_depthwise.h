// Depthwise convolution of channels-last tensors on CPU: vectors along the channels, which are the
// groups.
//
// fprop and dgrad: a task is a row of destination pixels. Its taps, pairs of a source offset and a
// weight offset, are listed once; pixels whose taps all lie inside share the list, those at the
// edges get one of their own, so that no inner loop asks where it is. A tile of a few pixels × a
// few vectors stays in registers, its weights are loaded once for all pixels. A strided dgrad takes
// its pixels phase by phase, so that all of a tile meet the same places. wgrad: a task is a run of
// gradient rows; for a few places of a window row at a time, vectors of sums go along the pixels
// and are then added to the task's. Chains of additions are cut as everywhere. Bound: two loads a
// cycle, about one for each FMA; bytes where windows are small.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kDepthwisePixels = 6;
inline constexpr int kDepthwiseVectors = 4;
#else
inline constexpr int kDepthwisePixels = 4;
inline constexpr int kDepthwiseVectors = 2;
#endif
inline constexpr int kDepthwisePlaces = 4;

// Calls body(Count<vectors>, Count<whole>, first channel) over all channels; only a last single
// vector may not be whole.
template <class T, class Body>
WEFT_INLINE void for_each_vectors(int64_t channels, const Body& body) {
  const int64_t whole = channels / kLanes<T>;
  in_steps<kDepthwiseVectors>(
      whole, [&](auto vectors, int64_t vector) { body(vectors, Count<1>{}, vector * kLanes<T>); });
  if (whole * kLanes<T> < channels) body(Count<1>{}, Count<0>{}, whole * kLanes<T>);
}

template <class T, bool kWhole>
WEFT_INLINE Vec<accumulate_t<T>> load_channels(const T* address, int64_t lanes) {
  return kWhole ? load_vec(address) : load_part(address, static_cast<int>(lanes));
}

// ---- fprop and dgrad ---------------------------------------------------------------------------

// Destination columns first + q · step, q in [0, count): at place k, q reads source column
// offset(k) + q · source_step.
struct ColumnPhase {
  int64_t first;
  int64_t step;
  int64_t count;
  int64_t source_step;
};

inline ColumnPhase column_phase(const Gather& g, const Window& w, int64_t phase) {
  if (!g.transposed) return {0, 1, g.dst[2], w.stride};
  const int64_t first = ((phase - w.padding) % w.stride + w.stride) % w.stride;
  return {first, w.stride, first < g.dst[2] ? ceil_div(g.dst[2] - first, w.stride) : 0, 1};
}

// The offset of place k; false if the phase does not meet it.
inline bool column_offset(const Gather& g, const Window& w, const ColumnPhase& phase, int64_t k,
                          int64_t* offset) {
  if (!g.transposed) {
    *offset = k * w.dilation - w.padding;
    return true;
  }
  const int64_t padded = phase.first + w.padding - k * w.dilation;
  *offset = padded / w.stride;
  return padded % w.stride == 0;
}

struct DepthwiseTap {
  int64_t source;  // from pixel q = 0 of the phase
  int64_t weight;
  int64_t column;  // of the source, for q = 0
};

template <class T, int kPixels, int kVectors, bool kWhole>
void depthwise_tile(const DepthwiseTap* taps, int64_t count, const T* source, int64_t source_step,
                    const accumulate_t<T>* weights, const accumulate_t<T>* bias, T* dst,
                    int64_t dst_step, int64_t lanes) {
  using Acc = accumulate_t<T>;
  Vec<Acc> total[kPixels][kVectors];
  for (int q = 0; q < kPixels; ++q)
    for (int v = 0; v < kVectors; ++v) total[q][v] = load_vec(bias + v * kLanes<T>);
  for (const DepthwiseTap* const end = taps + count; taps < end;) {
    const DepthwiseTap* const stop = taps + least(end - taps, 2 * kTerms);
    Vec<Acc> sum[kPixels][kVectors] = {};
    for (; taps < stop; ++taps)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<Acc> by = load_vec(weights + taps->weight + v * kLanes<T>);
        for (int q = 0; q < kPixels; ++q)
          sum[q][v] += by * load_channels<T, kWhole>(
                                source + taps->source + q * source_step + v * kLanes<T>, lanes);
      }
    for (int q = 0; q < kPixels; ++q)
      for (int v = 0; v < kVectors; ++v) total[q][v] += sum[q][v];
  }
  for (int q = 0; q < kPixels; ++q)
    for (int v = 0; v < kVectors; ++v) {
      T* to = dst + q * dst_step + v * kLanes<T>;
      if (kWhole)
        store_vec(to, total[q][v]);
      else
        store_part(to, total[q][v], static_cast<int>(lanes));
    }
}

template <class T>
void depthwise_gather(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                      const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t channels = p.groups;
  const int64_t row_lanes = round_up(channels, kLanes<T>);
  const int64_t places = p.window_elements();
  Scratch<Acc> packed((places + 1) * row_lanes);  // [place, channel], then the bias
  for (int64_t place = 0; place <= places; ++place)
    for (int64_t c = 0; c < row_lanes; ++c) {
      Acc value = 0;
      if (c < channels && place < places) value = widen(weights[c * places + place]);
      if (c < channels && place == places && bias != nullptr) value = widen(bias[c]);
      packed[place * row_lanes + c] = value;
    }
  const Acc* const wide_bias = packed.data() + places * row_lanes;
  const int64_t phases = g.transposed ? p.window[2].stride : 1;

  parallel_for(context, p.n * g.dst[0] * g.dst[1], 1, [&](int64_t begin, int64_t end) {
    Scratch<DepthwiseTap> taps(places), edge_taps(places);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % g.dst[1];
      const int64_t d = task / g.dst[1] % g.dst[0];
      const T* const image = src + task / g.dst[1] / g.dst[0] * g.src_positions() * channels;
      for (int64_t i = 0; i < least(phases, g.dst[2]); ++i) {
        const ColumnPhase phase = column_phase(g, p.window[2], i);
        const int64_t pixel_step = phase.source_step * channels;
        T* const out = dst + (task * g.dst[2] + phase.first) * channels;
        int64_t count = 0;
        Range inner = {0, phase.count};  // pixels whose taps are all inside
        for (int64_t t = 0; t < p.window[0].size; ++t) {
          const int64_t slice = source_of(p.window[0], d, t, g.src[0], g.transposed);
          if (slice < 0) continue;
          for (int64_t j = 0; j < p.window[1].size; ++j) {
            const int64_t row = source_of(p.window[1], h, j, g.src[1], g.transposed);
            if (row < 0) continue;
            for (int64_t l = 0; l < p.window[2].size; ++l) {
              int64_t column;
              if (!column_offset(g, p.window[2], phase, l, &column)) continue;
              const int64_t place = (t * p.window[1].size + j) * p.window[2].size + l;
              taps[count++] = {((slice * g.src[1] + row) * g.src[2] + column) * channels,
                               place * row_lanes, column};
              const int64_t past = g.src[2] - column;
              inner.begin = most(inner.begin, ceil_div(most(-column, 0), phase.source_step));
              inner.end = least(inner.end, ceil_div(most(past, 0), phase.source_step));
            }
          }
        }
        inner.end = most(inner.begin, inner.end);
        // All pixels for a few channels at a time: what neighbours share stays in the cache.
        for_each_vectors<T>(channels, [&](auto vectors, auto whole, int64_t first) {
          const auto tile = [&](auto pixels, int64_t q, const DepthwiseTap* list, int64_t length) {
            depthwise_tile<T, decltype(pixels)::value, decltype(vectors)::value,
                           decltype(whole)::value == 1>(
                list, length, image + q * pixel_step + first, pixel_step, packed.data() + first,
                wide_bias + first, out + q * phase.step * channels + first, phase.step * channels,
                channels - first);
          };
          const auto edge = [&](int64_t q) {
            int64_t length = 0;
            for (int64_t k = 0; k < count; ++k) {
              const int64_t column = taps[k].column + q * phase.source_step;
              if (column >= 0 && column < g.src[2]) edge_taps[length++] = taps[k];
            }
            tile(Count<1>{}, q, edge_taps.data(), length);
          };
          for (int64_t q = 0; q < least(inner.begin, phase.count); ++q) edge(q);
          in_steps<kDepthwisePixels>(inner.end - inner.begin, [&](auto pixels, int64_t q) {
            tile(pixels, inner.begin + q, taps.data(), count);
          });
          for (int64_t q = inner.end; q < phase.count; ++q) edge(q);
        });
      }
      activate_row(p, dst + task * g.dst[2] * channels, g.dst[2] * channels);
    }
  });
}

// ---- wgrad -------------------------------------------------------------------------------------

// sums[i · sum_row] += Σ x[pixel · x_step + i · place_step] · gy[pixel · channels], places i.
template <class T, int kPlaces, int kVectors, bool kWhole>
void depthwise_wgrad_tile(const T* x, int64_t x_step, int64_t place_step, const T* gy,
                          int64_t channels, int64_t pixels, accumulate_t<T>* sums, int64_t sum_row,
                          int64_t lanes) {
  using Acc = accumulate_t<T>;
  Vec<Acc> sum[kPlaces][kVectors] = {};
  for (; pixels > 0; --pixels, x += x_step, gy += channels)
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Acc> g = load_channels<T, kWhole>(gy + v * kLanes<T>, lanes);
      for (int i = 0; i < kPlaces; ++i)
        sum[i][v] += g * load_channels<T, kWhole>(x + i * place_step + v * kLanes<T>, lanes);
    }
  for (int i = 0; i < kPlaces; ++i)
    for (int v = 0; v < kVectors; ++v) {
      Acc* to = sums + i * sum_row + v * kLanes<T>;
      store_vec(to, load_vec(to) + sum[i][v]);
    }
}

template <class T>
void depthwise_wgrad(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t channels = p.groups;
  const int64_t row_lanes = round_up(channels, kLanes<T>);
  const int64_t places = p.window_elements();
  const int64_t rows = p.n * p.out[0] * p.out[1];
  const int64_t chunks = image_chunks(rows, 1);
  const Window& w = p.window[2];
  Scratch<Acc> partial(chunks * places * row_lanes);

  // Adds places [l, l + kPlaces) of a window row, over output columns `columns`.
  const auto add = [&](auto place_count, const T* x_row, const T* gy_row, int64_t l, Range columns,
                       Acc* sums) {
    if (columns.begin >= columns.end) return;
    const int64_t column = w.first_input(columns.begin) + l * w.dilation;
    for_each_vectors<T>(channels, [&](auto vectors, auto whole, int64_t first) {
      depthwise_wgrad_tile<T, decltype(place_count)::value, decltype(vectors)::value,
                           decltype(whole)::value == 1>(
          x_row + column * channels + first, w.stride * channels, w.dilation * channels,
          gy_row + columns.begin * channels + first, channels, columns.end - columns.begin,
          sums + l * row_lanes + first, row_lanes, channels - first);
    });
  };
  parallel_for(context, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Acc* const chunk_sums = partial.data() + chunk * places * row_lanes;
      fill(chunk_sums, places * row_lanes, Acc{0});
      for (int64_t at = rows * chunk / chunks; at < rows * (chunk + 1) / chunks; ++at) {
        const int64_t h = at % p.out[1];
        const int64_t d = at / p.out[1] % p.out[0];
        const T* const image = x + at / p.out[1] / p.out[0] * p.in_positions() * channels;
        const T* const gy_row = gy + at * p.out[2] * channels;
        for (int64_t t = 0; t < p.window[0].size; ++t) {
          const int64_t slice = source_of(p.window[0], d, t, p.in[0], false);
          if (slice < 0) continue;
          for (int64_t j = 0; j < p.window[1].size; ++j) {
            const int64_t row = source_of(p.window[1], h, j, p.in[1], false);
            if (row < 0) continue;
            const T* const x_row = image + (slice * p.in[1] + row) * p.in[2] * channels;
            Acc* const sums =
                chunk_sums + (t * p.window[1].size + j) * p.window[2].size * row_lanes;
            in_steps<kDepthwisePlaces>(w.size, [&](auto place_count, int64_t l) {
              constexpr int kPlaces = decltype(place_count)::value;
              Range all = {0, p.out[2]};  // columns at which all places are inside
              Range own[kPlaces];
              for (int i = 0; i < kPlaces; ++i) {
                own[i] = columns_inside(w, (l + i) * w.dilation - w.padding, p.in[2], p.out[2]);
                all = {most(all.begin, own[i].begin), least(all.end, own[i].end)};
              }
              all.end = most(all.begin, all.end);
              add(place_count, x_row, gy_row, l, all, sums);
              for (int i = 0; i < kPlaces; ++i) {
                const Range before = {own[i].begin, least(own[i].end, all.begin)};
                const Range after = {most(own[i].begin, all.end), own[i].end};
                add(Count<1>{}, x_row, gy_row, l + i, before, sums);
                add(Count<1>{}, x_row, gy_row, l + i, after, sums);
              }
            });
          }
        }
      }
    }
  });
  parallel_for(context, channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t place = 0; place < places; ++place) {
        Acc sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sum += partial[(chunk * places + place) * row_lanes + c];
        gw[c * places + place] = narrow<T>(sum);
      }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
