// fprop and dgrad of stride-1 3x3 windows in float32 and float64 on CPU by Winograd's F(2x2, 3x3):
// four outputs of sixteen products a channel instead of thirty-six.
//
// Weights are transformed once per call into sixteen matrices, one for each point of a tile, packed
// as the tile product reads them (gemm/packed_cpu.h); those of 128 output channels at a time, which
// the cache still holds while all tiles go through them. A task takes a block of tiles of any rows
// and images: their inputs are transformed into [point, tile, channel], then, a panel of weights at
// a time, the products of all points are summed and transformed back, and go to the map with bias
// and activation. Both layouts are read and written as they lie (conv_winograd_tiles.h). A block
// stays in the second-level cache, where 48 tiles are enough that streaming the weights past it
// costs nothing. The slices of a 3x3x3 window are further channels of the sums; a task goes along
// the depth and transforms each slice once. An input gradient is the same with windows turned
// round. Bound: FLOPs, four fifths of the time and more from 64 channels on.
//
// Numbers: inputs of a tile are added up before they are multiplied, so an output's error is
// relative to the largest input of its tile, not of its window; sums over channels are made in
// runs (pack_cpu.h), with which the error against float64 is that of the direct way. The
// coefficients are 0, 1 and 1/2, so small integers stay exact. A value that is not finite, or
// overflows in a transform, reaches at least one output of each of its tiles as one that is not
// finite either, so the outputs of all tiles are looked at, also those beyond the map, and images
// with such ones are made again the direct way (conv_winograd_cpu.cpp).
//
// Memory: 16/9 of the weights of 128 channels, and for each thread 48 x 16 x (C x slices + one
// panel) numbers.
//
// Lost: sums of 64 terms, which err up to twice as much as PyTorch's; asking for the next weights
// ahead of time, a twentieth slower; all weights at once, a tenth to a third slower from 512
// channels on, though tiles are transformed once instead of in each pass. Single maps of 7 x 7 lose
// against the direct way (0.6 to 0.8), which leaves out the padding and does not transform the
// weights; the plan knows.
#pragma once

#include "conv/conv_panels.h"
#include "conv/conv_winograd_tiles.h"

namespace weft::WEFT_TARGET {
namespace {

// Transformed weights of some panels of each group, a panel [point, term, lane] after another;
// terms are slices of the window and source channels.
template <class T>
void transform_weights(const ConvProblem& p, const Gather& g, const PanelLayout& layout,
                       const Range& some, const T* weights, const T* bias, T* out,
                       WeightPanel<T>* panels, const Context& context) {
  constexpr int64_t kLane = kLanes<T>, kSquare = 9;
  const int64_t places = p.window_elements(), filter = places * p.c;
  const int64_t channels = g.src_channels, panel_terms = layout.terms();
  Scratch<int64_t> packed_place(places);  // an input gradient's windows are turned round
  for (int64_t i = 0; i < places; ++i) packed_place[i] = g.transposed ? places - 1 - i : i;
  const int64_t count = some.end - some.begin, first_vector = layout.begin(some.begin);
  const int64_t some_vectors = layout.begin(some.end) - first_vector;
  const auto panel_at = [&](int64_t group, int64_t first) {
    const int64_t vector = group * some_vectors + first - first_vector;
    return out + vector * kLane * winograd::kPoints * panel_terms;
  };
  for (int64_t i = 0; i < layout.groups * count; ++i) {
    const int64_t group = i / count, panel = some.begin + i % count;
    const int64_t first = layout.begin(panel), vectors = layout.begin(panel + 1) - first;
    panels[i] = {group,
                 group * g.dst_channels + first * kLane,
                 least(vectors * kLane, g.dst_channels - first * kLane),
                 static_cast<int>(vectors),
                 panel_at(group, first),
                 bias + (group * layout.vectors + first) * kLane};
  }
  // A task is a vector of a panel.
  parallel_for(context, layout.groups * some_vectors, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> packed(places * channels * kLane);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / some_vectors, vector = first_vector + i % some_vectors;
      int64_t panel = some.begin;
      while (layout.begin(panel + 1) <= vector) ++panel;
      const int64_t first = layout.begin(panel), vectors = layout.begin(panel + 1) - first;
      T* const to = panel_at(group, first) + (vector - first) * kLane;
      const int64_t column = vector * kLane, left = g.dst_channels - column;
      const T* const of_group = weights + group * p.k * filter;
      if (p.channels_last) {
        const int64_t term_step = g.transposed ? filter : 1;
        const int64_t column_step = g.transposed ? 1 : filter;
        for (int64_t place = 0; place < places; ++place)
          pack_vector(of_group + place * p.c + column * column_step, term_step, column_step, left,
                      channels, 1, packed.data() + packed_place[place] * channels * kLane);
      } else {
        pack_contiguous(p, g, of_group + column * (g.transposed ? places : filter), left,
                        packed_place.data(), channels, 1, packed.data());
      }
      for (int64_t term = 0; term < panel_terms; ++term)
        transform_window(
            packed.data() + (term / channels * kSquare * channels + term % channels) * kLane,
            channels * kLane, to + term * vectors * kLane, panel_terms * vectors * kLane);
    }
  });
}

// What a thread holds of a block of tiles.
template <class T>
class WinogradBlock {
 public:
  WinogradBlock(const ConvProblem& p, const Gather& g, int64_t tiles, const T* src, T* dst)
      : g_(g),
        taps_(p.window[0].size),
        tile_(round_up(g.src_channels, kLane)),
        point_(tiles * tile_ + kLane),
        sum_point_(tiles * kSumTile + kLane),
        map_(source_map(p, g, src)),
        reader_(map_, g.src_channels),
        writer_(p, g, dst),
        transformed_(taps_ * winograd::kPoints * point_),
        sums_(winograd::kPoints * sum_point_),
        runs_(tiles),
        table_(taps_ * tiles),
        ways_(tiles),
        most_tiles_(tiles) {}

  // Tiles [begin, end) of all images in destination slices [slice, last) for some panels; notes in
  // `failed` which images have a sum that is not finite.
  void run(const WinogradCut& cut, int64_t begin, int64_t end, int64_t slice, int64_t last,
           const WeightPanel<T>* panels, int64_t panel_count, uint8_t* failed) {
    const int64_t run_count = list_tile_runs(cut, begin, end, runs_.data());
    const int64_t lead = map_.lead[0];
    int64_t next = most(slice - lead, 0);  // the slice of the source to read
    for (; slice < last; ++slice) {
      const Range taps = {most(0, lead - slice), least(taps_, g_.src[0] + lead - slice)};
      for (; next < least(slice - lead + taps_, g_.src[0]); ++next)
        for (int64_t i = 0; i < run_count; ++i)
          reader_.read(runs_[i], panels->group * g_.src_channels, g_.src_channels, next,
                       slot(next));
      for (int64_t tap = taps.begin; tap < taps.end; ++tap) {
        const T* const from = slot(slice - lead + tap).data;
        for (int64_t t = 0; t < end - begin; ++t) table_[tap * most_tiles_ + t] = from + t * tile_;
      }
      for (int64_t i = 0; i < panel_count; ++i) {
        add_up(panels[i], taps, end - begin);
        for (int64_t r = 0; r < run_count; ++r) {
          const TileRun& run = runs_[r];
          if (!writer_.write(run, slice, panels[i], sums_.data() + run.first * kSumTile, kSumTile,
                             sum_point_))
            __atomic_store_n(failed + run.n, uint8_t{1}, __ATOMIC_RELAXED);
        }
      }
    }
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;
  static constexpr int64_t kSumTile = kPanelVectors * kLane;
  static constexpr int64_t kDepth = 128;  // channels whose products are summed at a time

  // Slices of the source take turns.
  TransformedTiles<T> slot(int64_t slice) {
    return {transformed_.data() + slice % taps_ * winograd::kPoints * point_, tile_, point_};
  }

  // The sums of all points of the block's tiles, for one panel.
  void add_up(const WeightPanel<T>& panel, const Range& taps, int64_t tiles) {
    const int64_t channels = g_.src_channels, width = panel.vectors * kLane;
    const int64_t parts = ceil_div(channels, kDepth);
    for (int64_t point = 0; point < winograd::kPoints; ++point) {
      T* const sums = sums_.data() + point * sum_point_;
      const T* const weights = panel.weights + point * taps_ * channels * width;
      for (int64_t t = 0; t < tiles; ++t) ways_[t] = sums + t * kSumTile;
      if (taps.begin >= taps.end) fill(sums, tiles * kSumTile, T{});
      bool add = false;
      for (int64_t tap = taps.begin; tap < taps.end; ++tap)
        for (int64_t part = 0; part < parts; ++part, add = true) {
          const int64_t first = channels * part / parts, last = channels * (part + 1) / parts;
          const T* const from = weights + (tap * channels + first) * width;
          const PackedBatch<T> batch{
              table_.data() + tap * most_tiles_, 0, &from, 1, point * point_ + first, last - first};
          with_count<kPanelVectors>(panel.vectors, [&](auto vectors) {
            packed_batch<decltype(vectors)::value, false, true>(batch, tiles,
                                                                JoinSums<T>{add, ways_.data()});
          });
        }
    }
  }

  const Gather& g_;
  int64_t taps_, tile_, point_, sum_point_;
  TileMap<T> map_;
  TileReader<T, 4> reader_;
  TileWriter<T> writer_;
  Scratch<T> transformed_, sums_;
  Scratch<TileRun> runs_;
  Scratch<const T*> table_;  // [slice of the window, tile]
  Scratch<T*> ways_;
  int64_t most_tiles_;
};

// Images whose sums are not all finite are left to the caller, in `failed`.
template <class T>
void gather_winograd(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                     const T* bias, T* dst, uint8_t* failed, const Context& context) {
  constexpr int64_t kLane = kLanes<T>;
  const WinogradCut cut = winograd_cut(p, g.transposed);
  const int64_t vectors = ceil_div(g.dst_channels, kLane);
  const PanelLayout layout{p.groups, vectors, ceil_div(vectors, kPanelVectors), g.src_channels,
                           p.window[0].size};
  const int64_t lanes = p.groups * vectors * kLane;
  Scratch<T> wide_bias(lanes);
  fill(wide_bias.data(), lanes, T{});
  if (bias != nullptr)
    for (int64_t i = 0; i < p.groups; ++i)
      for (int64_t k = 0; k < g.dst_channels; ++k)
        wide_bias[i * vectors * kLane + k] = bias[i * g.dst_channels + k];

  const int64_t passes = least(cut.passes, layout.panels);
  const int64_t most_panels = ceil_div(layout.panels, passes);
  Scratch<T> packed(p.groups * most_panels * kPanelVectors * kLane * winograd::kPoints *
                    layout.terms());
  Scratch<WeightPanel<T>> panels(p.groups * most_panels);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const Range some = {layout.panels * pass / passes, layout.panels * (pass + 1) / passes};
    transform_weights(p, g, layout, some, weights, wide_bias.data(), packed.data(), panels.data(),
                      context);
    const int64_t parts = cut.chunks * p.groups, count = some.end - some.begin;
    parallel_for(context, cut.blocks * parts, 1, [&](int64_t begin, int64_t end) {
      WinogradBlock<T> block(p, g, ceil_div(cut.tiles, cut.blocks), src, dst);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task / parts, chunk = task % parts / p.groups;
        block.run(cut, cut.tiles * at / cut.blocks, cut.tiles * (at + 1) / cut.blocks,
                  g.dst[0] * chunk / cut.chunks, g.dst[0] * (chunk + 1) / cut.chunks,
                  panels.data() + task % p.groups * count, count, failed);
      }
    });
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
