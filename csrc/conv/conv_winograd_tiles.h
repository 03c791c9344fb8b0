// The tiles of a block of conv_winograd.h: where they lie, how they are read from either layout and
// transformed, and how finished ones are written.
#pragma once

#include "conv/conv_pixel_walk.h"
#include "conv/conv_winograd_transforms.h"

namespace weft::WEFT_TARGET {
namespace {

// Neighbouring tiles of one row of an image's tiles.
struct TileRun {
  int64_t n, row, column;
  int64_t first;  // of the block
  int64_t count;
};

inline int64_t list_tile_runs(const WinogradCut& cut, int64_t begin, int64_t end, TileRun* runs) {
  int64_t count = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / cut.columns, column = at % cut.columns;
    const int64_t taken = least(cut.columns - column, end - at);
    runs[count++] = {row / cut.rows, row % cut.rows, column, at - begin, taken};
    at += taken;
  }
  return count;
}

// Transformed tiles [point, tile, channel].
template <class T>
struct TransformedTiles {
  T* data;
  int64_t tile;   // from tile to tile
  int64_t point;  // from point to point: not a multiple of 4 KiB, where all would share cache sets
};

// A map that tiles are read from.
template <class T>
struct TileMap {
  const T* data;
  bool planes;      // contiguous, else channels-last
  int64_t pixel;    // channels of a pixel
  int64_t lead[3];  // of padding
  const int64_t (&extent)[3];
};

template <class T>
TileMap<T> source_map(const ConvProblem& p, const Gather& g, const T* src) {
  const auto lead = [&](int axis) {
    const Window& w = p.window[axis];
    return g.transposed ? w.size - 1 - w.padding : w.padding;
  };
  return {src, !p.channels_last, p.groups * g.src_channels, {lead(0), lead(1), lead(2)}, g.src};
}

// Reads and transforms tiles of kSide x kSide positions, two apart: channels-last ones as they lie,
// contiguous ones from rows that are turned round a vector of channels at a time.
template <class T, int kSide>
class TileReader {
 public:
  TileReader(const TileMap<T>& map, int64_t most_channels) : map_(map) {
    const int64_t edge = kSide * kSide * round_up(most_channels, kLane);
    const int64_t strip = kSide * columns(winograd::kBlockTiles) * kLane + kLane * kLane;
    held_.resize(map.planes ? strip : edge);
  }

  // Some channels of the tiles of the run in slice `slice`, at their places of the block.
  void read(const TileRun& run, int64_t channel, int64_t channels, int64_t slice,
            const TransformedTiles<T>& out) {
    T* const to = out.data + run.first * out.tile;
    if (map_.planes)
      read_planes(run, channel, channels, slice, to, out);
    else
      read_pixels(run, channel, channels, slice, to, out);
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;

  static constexpr int64_t columns(int64_t tiles) { return 2 * tiles + kSide - 2; }

  // `channels` of tiles whose corners lie `tile_step` apart.
  static void transform(const T* from, int64_t row, int64_t column, int64_t tile_step,
                        int64_t tiles, int64_t channels, T* to, const TransformedTiles<T>& out) {
    for (int64_t t = 0; t < tiles; ++t, from += tile_step, to += out.tile)
      for (int64_t c = 0; c < channels; c += kLane) {
        Vec<T> d[kSide][kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j)
            d[i][j] = load_lanes(from + i * row + j * column + c, channels - c);
        }
        transform_tile(d, to + c, out.point);
      }
  }

  void read_pixels(const TileRun& run, int64_t channel, int64_t channels, int64_t slice, T* to,
                   const TransformedTiles<T>& out) {
    const int64_t height = map_.extent[1], width = map_.extent[2], pixel = map_.pixel;
    const T* const map =
        map_.data + (run.n * map_.extent[0] + slice) * height * width * pixel + channel;
    const int64_t top = 2 * run.row - map_.lead[1], lead = map_.lead[2], row = width * pixel;
    // Tiles [inner, end) lie inside.
    const int64_t last = run.column + run.count;
    int64_t inner = last, end = last;
    if (top >= 0 && top + kSide <= height && width + lead >= kSide) {
      inner = least(most(run.column, ceil_div(lead, 2)), last);
      end = most(inner, least((width - kSide + lead) / 2 + 1, last));
    }
    for (int64_t t = run.column; t < last;) {
      const int64_t left = 2 * t - lead;
      const int64_t taken = t == inner && end > inner ? end - inner : 1;
      if (taken > 1 || (t >= inner && t < end)) {
        transform(map + top * row + left * pixel, row, pixel, 2 * pixel, taken, channels, to, out);
      } else {
        const int64_t pitch = round_up(channels, kLane);
        for (int64_t i = 0; i < kSide; ++i)
          for (int64_t j = 0; j < kSide; ++j) {
            T* const held = held_.data() + (i * kSide + j) * pitch;
            const int64_t y = top + i, x = left + j;
            if (y >= 0 && y < height && x >= 0 && x < width)
              copy_row(held, map + y * row + x * pixel, channels);
            else
              fill(held, channels, T{});
          }
        transform(held_.data(), kSide * pitch, pitch, 0, 1, channels, to, out);
      }
      t += taken;
      to += taken * out.tile;
    }
  }

  void read_planes(const TileRun& run, int64_t channel, int64_t channels, int64_t slice, T* to,
                   const TransformedTiles<T>& out) {
    const int64_t height = map_.extent[1], width = map_.extent[2];
    const int64_t plane = map_.extent[0] * height * width;
    const int64_t top = 2 * run.row - map_.lead[1], left = 2 * run.column - map_.lead[2];
    const T* const map =
        map_.data + (run.n * map_.pixel + channel) * plane + slice * height * width + left;
    const int64_t all = columns(run.count);
    const int64_t begin = least(most(-left, 0), all);
    const int64_t end = most(begin, least(width - left, all));
    for (int64_t c = 0; c < channels; c += kLane) {
      for (int64_t i = 0; i < kSide; ++i) {
        T* const held = held_.data() + i * all * kLane;
        const int64_t y = top + i;
        if (y < 0 || y >= height) {
          fill(held, all * kLane, T{});
          continue;
        }
        fill(held, begin * kLane, T{});
        const T* const from = map + c * plane + y * width;
        // A square runs past `end`: what follows is written after it.
        for (int64_t x = begin; x < end; x += kLane) {
          Vec<T> square[kLane];
#pragma GCC unroll 16
          for (int64_t j = 0; j < kLane; ++j)
            square[j] = c + j < channels ? load_lanes(from + j * plane + x, end - x) : Vec<T>{};
          transpose(square);
#pragma GCC unroll 16
          for (int64_t j = 0; j < kLane; ++j) store_vec(held + (x + j) * kLane, square[j]);
        }
        fill(held + end * kLane, (all - end) * kLane, T{});
      }
      transform(held_.data(), all * kLane, kLane, 2 * kLane, run.count, kLane, to + c, out);
    }
  }

  TileMap<T> map_;
  Scratch<T> held_;
};

// Writes the outputs of finished tiles: of one panel's channels.
template <class T>
class TileWriter {
 public:
  TileWriter(const ConvProblem& p, const Gather& g, T* dst)
      : p_(p), g_(g), dst_(dst), pixel_(p.groups * g.dst_channels) {
    if (!p.channels_last) held_.resize(4 * winograd::kBlockTiles * kPanelVectors * kLane);
  }

  // `sums` are of the run's first tile, [point, tile, lane]. False if a sum is not finite.
  bool write(const TileRun& run, int64_t slice, const WeightPanel<T>& panel, const T* sums,
             int64_t tile, int64_t point) {
    Vec<T> check{};
    const int64_t rows = least(2, g_.dst[1] - 2 * run.row);
    const int64_t columns = least(2 * run.count, g_.dst[2] - 2 * run.column);
    const int64_t at = (slice * g_.dst[1] + 2 * run.row) * g_.dst[2] + 2 * run.column;
    if (p_.channels_last) {
      T* const to = dst_ + (run.n * g_.dst_positions() + at) * pixel_ + panel.channel;
      for (int64_t t = 0; t < run.count; ++t, sums += tile) {
        const int64_t wide = least(2, columns - 2 * t);
        for (int64_t v = 0; v < panel.vectors; ++v) {
          Vec<T> y[2][2];
          transform_sums(sums + v * kLane, point, y);
          const Vec<T> bias = load_vec(panel.bias + v * kLane);
          const int64_t left = panel.lanes - v * kLane;
          for (int64_t i = 0; i < 2; ++i)
            for (int64_t j = 0; j < 2; ++j) {
              check += y[i][j] * 0;
              if (i < rows && j < wide)
                store_lanes(to + (i * g_.dst[2] + 2 * t + j) * pixel_ + v * kLane, y[i][j] + bias,
                            left);
            }
        }
        if (p_.activation == Activation::none) continue;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < wide; ++j)
            activate_row(p_, to + (i * g_.dst[2] + 2 * t + j) * pixel_, panel.lanes);
      }
    } else {
      const int64_t lanes = panel.vectors * kLane;
      for (int64_t t = 0; t < run.count; ++t, sums += tile)
        for (int64_t v = 0; v < panel.vectors; ++v) {
          Vec<T> y[2][2];
          transform_sums(sums + v * kLane, point, y);
          for (int64_t i = 0; i < 2; ++i)
            for (int64_t j = 0; j < 2; ++j) {
              check += y[i][j] * 0;
              store_vec(held_.data() + (2 * (i * run.count + t) + j) * lanes + v * kLane, y[i][j]);
            }
        }
      T* const image = dst_ + (run.n * pixel_ + panel.channel) * g_.dst_positions();
      for (int64_t i = 0; i < rows; ++i)
        store_planes<false>(p_, {run.n, 0, 0, columns}, 1, held_.data() + 2 * i * run.count * lanes,
                            lanes, panel.bias, image + at + i * g_.dst[2], g_.dst_positions(),
                            panel.lanes);
    }
    return lanes_that_hold(check != check) == 0;
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;

  const ConvProblem& p_;
  const Gather& g_;
  T* dst_;
  int64_t pixel_;
  Scratch<T> held_;  // contiguous: the outputs of a run, [row, column, lane]
};

}  // namespace
}  // namespace weft::WEFT_TARGET
