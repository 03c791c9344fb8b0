// Weight gradients of few channels, contiguous, on CPU: vectors along flat positions.
//
// x lies in scratch as in conv_columns.h, so that gy is read where it lies and neither is turned
// round. A tile of a few places × a few output channels is summed over a band's positions, each as
// a vector; the vectors of a tile are folded together. A few channels' gradients stay in the
// first-level cache while all places go over them. Tasks are chunks of bands, whose sums are added
// in order. Bound: FLOPs; bytes of few places and channels.
#pragma once

#include "conv/conv_columns.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kFoldPlaces = 6, kFoldChannels = 4;
#else
inline constexpr int kFoldPlaces = 4, kFoldChannels = 3;
#endif

// Lane i of the result is the sum of v[i]'s lanes.
template <int kCount, class V, int L>
WEFT_INLINE V fold_lanes(V (&v)[L]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      V low, high;
      interleave(v[i], v[i + kCount / 2], low, high);
      v[i] = low + high;
    }
    return fold_lanes<kCount / 2>(v);
  }
}

// Sums of a tile, whole vectors of them: [place, channel].
template <class Acc>
inline constexpr int64_t kFoldSums =
    (kFoldPlaces * kFoldChannels + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;

// The runs of positions that a sum goes over: of some maps, a band of each.
template <class T>
struct FoldRuns {
  int64_t maps;
  int64_t positions;
  const accumulate_t<T>* x;
  int64_t x_map;       // from map to map
  const T* const* gy;  // of each map
  int64_t gy_channel;
};

// sums[i · kChannels + k] (+)= Σ x[offsets[i] + position] · gy[k, position]; asks for channel
// `ahead` meanwhile.
template <class T, int kPlaces, int kChannels>
__attribute__((noinline)) void fold_tile(const FoldRuns<T>& runs, const int64_t* offsets,
                                         int64_t channel, int64_t ahead, bool add,
                                         accumulate_t<T>* sums) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  constexpr int kLane = kLanes<T>;
  V sum[kPlaces * kChannels];
  each_of<kPlaces, kChannels>([&](int i, int k) { sum[i * kChannels + k] = V{}; });
  const int64_t positions = runs.positions;
  for (int64_t map = 0; map < runs.maps; ++map) {
    const Acc* from[kPlaces];
    for (int i = 0; i < kPlaces; ++i) from[i] = runs.x + map * runs.x_map + offsets[i];
    const T* g_from[kChannels];
    for (int k = 0; k < kChannels; ++k) g_from[k] = runs.gy[map] + (channel + k) * runs.gy_channel;
    const T* const asked = runs.gy[map] + ahead * runs.gy_channel;
    int64_t at = 0;
    for (; at + kLane <= positions; at += kLane) {
      __builtin_prefetch(asked + at);
      V g[kChannels];
      for (int k = 0; k < kChannels; ++k) g[k] = load_vec(g_from[k] + at);
      for (int i = 0; i < kPlaces; ++i) {
        const V value = load_vec(from[i] + at);
        for (int k = 0; k < kChannels; ++k) sum[i * kChannels + k] += value * g[k];
      }
    }
    if (at == positions) continue;
    const auto left = static_cast<int>(positions - at);
    V g[kChannels];
    for (int k = 0; k < kChannels; ++k) g[k] = load_part(g_from[k] + at, left);
    for (int i = 0; i < kPlaces; ++i) {
      const V value = load_part(from[i] + at, left);
      for (int k = 0; k < kChannels; ++k) sum[i * kChannels + k] += value * g[k];
    }
  }
#pragma GCC unroll 12
  for (int first = 0; first < kPlaces * kChannels; first += kLane) {
    V part[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i)
      part[i] = first + i < kPlaces * kChannels ? sum[first + i] : V{};
    const V folded = fold_lanes<kLane>(part);
    store_vec(sums + first, add ? load_vec(sums + first) + folded : folded);
  }
}

template <class T>
void wgrad_columns(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  // Of a band: a few channels' gradients fit the first-level cache.
  constexpr int64_t kPositions = 6144 / sizeof(Acc), kTasks = 16;
  const int64_t places = p.window_elements(), terms = p.c * places;
  const int64_t band = least(
      column_band(p, p.c * p.window[0].size * p.window[2].size, kLanes<T>, kColumnElements, 8),
      most(1, kPositions / p.out[2]));
  const ColumnRows layout = column_rows(p, band, kLanes<T>);
  const int64_t bands = ceil_div(p.out[1], band);
  // Small maps go a few at a time.
  const int64_t maps = p.n * p.out[0];
  const int64_t together = bands > 1
                               ? 1
                               : most(1, least(least(kPositions / layout.positions(),
                                                     kColumnElements / (p.c * layout.channel())),
                                               ceil_div(maps * p.groups, kTasks)));
  const int64_t units = ceil_div(maps, together) * bands;
  const int64_t chunks = most(1, least(units, ceil_div(kTasks, p.groups)));
  // Rows of the window are neighbours: they share the lines that they read.
  Scratch<int64_t> offsets(terms), weight(terms);
  const int64_t columns = p.window[2].size, area = columns * p.window[1].size;
  for (int64_t i = 0; i < terms; ++i) {
    const int64_t j = i % p.window[1].size, l = i / p.window[1].size % columns,
                  slice = i / area % p.window[0].size, c = i / places;
    offsets[i] = c * layout.channel() + l * layout.column() +
                 slice * layout.phases * layout.plane() + layout.row_offset(p.window[1], j);
    weight[i] = c * places + slice * area + j * columns + l;
  }
  const int64_t tiles = ceil_div(terms, kFoldPlaces);
  const int64_t group_sums = ceil_div(p.k, kFoldChannels) * tiles * kFoldSums<Acc>;
  const int64_t count = p.groups * group_sums;
  Scratch<Acc> partial(chunks * count);
  if (units == 0) fill(partial.data(), count, Acc{0});
  parallel_for(context, units > 0 ? chunks * p.groups : 0, 1, [&](int64_t begin, int64_t end) {
    PhaseLines<Acc> lines(p);
    Scratch<Acc> rows(together * p.c * layout.channel());
    Scratch<const T*> gradients(together);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / p.groups, group = task % p.groups;
      const int64_t first_unit = units * chunk / chunks, last_unit = units * (chunk + 1) / chunks;
      for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t first = unit % bands * band, first_map = unit / bands * together;
        const FoldRuns<T> runs = {least(together, maps - first_map),
                                  least(band, p.out[1] - first) * p.out[2],
                                  rows.data(),
                                  p.c * layout.channel(),
                                  gradients.data(),
                                  p.out_positions()};
        for (int64_t i = 0; i < runs.maps; ++i) {
          const int64_t d = (first_map + i) % p.out[0];
          const int64_t image = (first_map + i) / p.out[0] * p.groups + group;
          for (int64_t c = 0; c < p.c; ++c)
            fill_columns(p, layout, d, first, x + (image * p.c + c) * p.in_positions(), lines,
                         rows.data() + i * runs.x_map + c * layout.channel());
          gradients[i] = gy + image * p.k * p.out_positions() + (d * p.out[1] + first) * p.out[2];
        }
        Acc* sums = partial.data() + chunk * count + group * group_sums;
        for_equal_parts<kFoldChannels>(p.k, [&](auto channels, int64_t k) {
          int64_t ahead = k + decltype(channels)::value;
          for_equal_parts<kFoldPlaces>(terms, [&](auto of_tile, int64_t i) {
            fold_tile<T, decltype(of_tile)::value, decltype(channels)::value>(
                runs, offsets.data() + i, k, least(ahead++, p.k - 1), unit > first_unit, sums);
            sums += kFoldSums<Acc>;
          });
        });
      }
    }
  });
  parallel_for(context, count / kLanes<T>, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kLanes<T>; i < end * kLanes<T>; i += kLanes<T>) {
      Vec<Acc> sum = load_vec(partial.data() + i);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        sum += load_vec(partial.data() + chunk * count + i);
      store_vec(partial.data() + i, sum);
    }
  });
  const Acc* from = partial.data();
  for (int64_t group = 0; group < p.groups; ++group, gw += p.k * terms)
    for_equal_parts<kFoldChannels>(p.k, [&](auto channels, int64_t k) {
      constexpr int64_t kChannels = decltype(channels)::value;
      for_equal_parts<kFoldPlaces>(terms, [&](auto of_tile, int64_t first) {
        for (int64_t i = 0; i < decltype(of_tile)::value * kChannels; ++i)
          gw[(k + i % kChannels) * terms + weight[first + i / kChannels]] = narrow<T>(from[i]);
        from += kFoldSums<Acc>;
      });
    });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
