// Weight gradients of stride-1 3x3 windows in float32 and float64 on CPU by Winograd's tiles: the
// transpose of F(2x2, 3x3), see conv_winograd_transforms.h.
//
// A task is a block of weights, of input and output channels, × a chunk of tiles. Tiles of x and of
// gy are transformed a block at a time into [point, tile, channel]; for each point the block's
// tiles are the terms of a tile product (conv_pixels_wgrad.h) that is added to the task's sums
// [slice of the window, point, output channel, input channel], which stay in the second-level cache
// with them. A finished task's sums are transformed into weights, and those of the chunks added in
// order. Blocks of weights transform the same tiles again, which costs less than sums that do not
// stay in the cache. Bound: FLOPs.
//
// What is said of numbers in conv_winograd.h holds here: a gradient that is not finite says that
// one of its terms may not have been, and all go the direct way (conv_winograd_cpu.cpp).
//
// Memory: the weights once for each chunk but one, and for each thread about a megabyte.
//
// Lost: sums of 48 tiles in registers, which err up to twice as much as PyTorch's and gain three in
// a hundred; blocks of 128 x 128 weights, which transform less and wait for their sums.
#pragma once

#include "conv/conv_pixels_wgrad.h"
#include "conv/conv_winograd_tiles.h"

namespace weft::WEFT_TARGET {
namespace {

// What a thread holds of a task.
template <class T>
class WinogradWgradBlock {
 public:
  WinogradWgradBlock(const ConvProblem& p, const WinogradWgradCut& cut, const T* x, const T* gy)
      : p_(p),
        cut_(cut),
        taps_(p.window[0].size),
        lanes_(ceil_div(ceil_div(p.c, kLane), cut.c_blocks) * kLane),
        rows_(ceil_div(p.k, cut.k_blocks)),
        x_point_(winograd::kBlockTiles * lanes_ + kLane),
        gy_tile_(round_up(rows_, kLane)),
        gy_point_(winograd::kBlockTiles * gy_tile_ + kLane),
        x_map_(source_map(p, fprop_gather(p), x)),
        x_reader_(x_map_, lanes_),
        gy_reader_({gy, !p.channels_last, p.out_channels(), {0, 0, 0}, p.out}, rows_),
        x_tiles_(taps_ * winograd::kPoints * x_point_),
        gy_tiles_(winograd::kPoints * gy_point_),
        sums_(taps_ * winograd::kPoints * rows_ * lanes_) {}

  // gw [K, place, C] of a block of weights, from the tiles of a chunk.
  void run(int64_t group, const Range& rows, const Range& lanes, const Range& tiles, T* gw) {
    fill(sums_.data(), taps_ * winograd::kPoints * rows_ * lanes_, T{});
    const int64_t blocks = ceil_div(tiles.end - tiles.begin, winograd::kBlockTiles);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t count = tiles.end - tiles.begin;
      add_tiles(group, rows, lanes, tiles.begin + count * i / blocks,
                tiles.begin + count * (i + 1) / blocks);
    }
    const int64_t places = p_.window_elements();
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t k = rows.begin; k < rows.end; ++k)
        for (int64_t c = lanes.begin; c < lanes.end; c += kLane) {
          Vec<T> window[3][3];
          transform_gradient_sums(sums_of(tap, 0) + (k - rows.begin) * lanes_ + c - lanes.begin,
                                  rows_ * lanes_, window);
          T* const to = gw + ((group * p_.k + k) * places + tap * 9) * p_.c + c;
          for (int i = 0; i < 9; ++i)
            store_lanes(to + i * p_.c, window[i / 3][i % 3], lanes.end - c);
        }
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;
  // Tiles that are added up before they join the sums: with more the error is above the direct
  // way's.
  static constexpr int64_t kRunTiles = 16;

  T* sums_of(int64_t tap, int64_t point) {
    return sums_.data() + (tap * winograd::kPoints + point) * rows_ * lanes_;
  }
  // Slices of x take turns.
  TransformedTiles<T> slot(int64_t slice) {
    return {x_tiles_.data() + slice % taps_ * winograd::kPoints * x_point_, lanes_, x_point_};
  }

  void add_tiles(int64_t group, const Range& rows, const Range& lanes, int64_t begin, int64_t end) {
    const int64_t run_count = list_tile_runs(cut_.tiles, begin, end, runs_);
    const TransformedTiles<T> gradients = {gy_tiles_.data(), gy_tile_, gy_point_};
    for (int64_t t = 0; t < end - begin; ++t) gy_terms_[t] = gradients.data + t * gy_tile_;
    const int64_t lead = x_map_.lead[0];
    int64_t next = 0;  // the slice of x to read
    for (int64_t slice = 0; slice < p_.out[0]; ++slice) {
      const Range taps = {most(0, lead - slice), least(taps_, p_.in[0] + lead - slice)};
      if (taps.begin >= taps.end) continue;
      for (next = most(next, slice - lead); next < least(slice - lead + taps_, p_.in[0]); ++next)
        for (int64_t i = 0; i < run_count; ++i)
          x_reader_.read(runs_[i], group * p_.c + lanes.begin, lanes.end - lanes.begin, next,
                         slot(next));
      for (int64_t i = 0; i < run_count; ++i)
        gy_reader_.read(runs_[i], group * p_.k + rows.begin, rows.end - rows.begin, slice,
                        gradients);
      for (int64_t tap = taps.begin; tap < taps.end; ++tap) {
        const T* const from = slot(slice - lead + tap).data;
        for (int64_t t = 0; t < end - begin; ++t) x_terms_[t] = from + t * lanes_;
        add_products(tap, rows.end - rows.begin, lanes.end - lanes.begin, end - begin);
      }
    }
  }

  void add_products(int64_t tap, int64_t rows, int64_t lanes, int64_t tiles) {
    for (int64_t point = 0; point < winograd::kPoints; ++point) {
      T* const sums = sums_of(tap, point);
      for_equal_parts<kMaxVectors>(ceil_div(lanes, kLane), [&](auto of_panel, int64_t vector) {
        constexpr int kVectors = decltype(of_panel)::value;
        const int64_t lane = vector * kLane;
        for_equal_parts<kTileRows<kVectors>>(rows, [&](auto of_tile, int64_t row) {
          for (int64_t t = 0; t < tiles; t += kRunTiles)
            wgrad_tile<false, decltype(of_tile)::value, kVectors>(
                RunTerms<T>{gy_terms_ + t, point * gy_point_ + row},
                RunTerms<T>{x_terms_ + t, point * x_point_ + lane}, least(kRunTiles, tiles - t),
                true, sums + row * lanes_ + lane, lanes_);
        });
      });
    }
  }

  const ConvProblem& p_;
  const WinogradWgradCut& cut_;
  int64_t taps_, lanes_, rows_;
  int64_t x_point_, gy_tile_, gy_point_;  // strides of transformed tiles
  TileMap<T> x_map_;
  TileReader<T, 4> x_reader_;
  TileReader<T, 2> gy_reader_;
  Scratch<T> x_tiles_, gy_tiles_, sums_;
  TileRun runs_[winograd::kBlockTiles];
  const T* x_terms_[winograd::kBlockTiles];
  const T* gy_terms_[winograd::kBlockTiles];
};

// gw [K, place, C]; false if a weight is not finite.
template <class T>
bool wgrad_winograd(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  constexpr int64_t kLane = kLanes<T>;
  const WinogradWgradCut cut = winograd_wgrad_cut(p);
  const int64_t count = p.weight_elements(), blocks = p.groups * cut.k_blocks * cut.c_blocks;
  Scratch<T> partial((cut.chunks - 1) * count);
  parallel_for(context, cut.chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    WinogradWgradBlock<T> block(p, cut, x, gy);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, group = task % blocks / (cut.k_blocks * cut.c_blocks);
      const int64_t of_k = task / cut.c_blocks % cut.k_blocks, of_c = task % cut.c_blocks;
      const int64_t vectors = ceil_div(p.c, kLane);
      block.run(group, {p.k * of_k / cut.k_blocks, p.k * (of_k + 1) / cut.k_blocks},
                {vectors * of_c / cut.c_blocks * kLane,
                 least(vectors * (of_c + 1) / cut.c_blocks * kLane, p.c)},
                {cut.tiles.tiles * chunk / cut.chunks, cut.tiles.tiles * (chunk + 1) / cut.chunks},
                chunk == 0 ? gw : partial.data() + (chunk - 1) * count);
    }
  });
  uint8_t failed = 0;
  parallel_for(context, ceil_div(count, kLane), 4096 / kLane, [&](int64_t begin, int64_t end) {
    Vec<T> check{};
    for (int64_t i = begin * kLane; i < end * kLane; i += kLane) {
      Vec<T> sum = load_lanes(gw + i, count - i);
      for (int64_t chunk = 0; chunk + 1 < cut.chunks; ++chunk)
        sum += load_lanes(partial.data() + chunk * count + i, count - i);
      check += sum * 0;
      store_lanes(gw + i, sum, count - i);
    }
    if (lanes_that_hold(check != check) != 0)
      __atomic_store_n(&failed, uint8_t{1}, __ATOMIC_RELAXED);
  });
  return failed == 0;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
