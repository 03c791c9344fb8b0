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
struct TransformedTiles {
  float* data;
  int64_t tile;   // from tile to tile
  int64_t point;  // from point to point: not a multiple of 4 KiB, where all would share cache sets
};

// Reads tiles of the source: of one group's channels, from the map itself (channels-last), or from
// rows that are turned round a vector of channels at a time (contiguous).
class TileReader {
 public:
  TileReader(const ConvProblem& p, const Gather& g, const float* src)
      : g_(g), src_(src), planes_(!p.channels_last), pixel_(p.groups * g.src_channels) {
    for (int axis = 0; axis < 3; ++axis) {
      const Window& w = p.window[axis];
      lead_[axis] = g.transposed ? w.size - 1 - w.padding : w.padding;
    }
    const int64_t edge = kSide * kSide * round_up(g.src_channels, kLane);
    const int64_t strip = kSide * (2 * winograd::kBlockTiles + 2) * kLane + kLane * kLane;
    held_.resize(planes_ ? strip : edge);
  }

  int64_t lead(int axis) const { return lead_[axis]; }

  // Tiles of the run in slice `slice`, at their places of the block.
  void read(const TileRun& run, int64_t group, int64_t slice, const TransformedTiles& out) {
    float* const to = out.data + run.first * out.tile;
    if (planes_)
      read_planes(run, group, slice, to, out);
    else
      read_pixels(run, group, slice, to, out);
  }

 private:
  static constexpr int64_t kLane = kLanes<float>;
  static constexpr int64_t kSide = 4;  // of a tile

  // `channels` of tiles whose corners lie `tile_step` apart.
  static void transform(const float* from, int64_t row, int64_t column, int64_t tile_step,
                        int64_t tiles, int64_t channels, float* to, const TransformedTiles& out) {
    for (int64_t t = 0; t < tiles; ++t, from += tile_step, to += out.tile)
      for (int64_t c = 0; c < channels; c += kLane) {
        FloatVec d[kSide][kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j)
            d[i][j] = load_lanes(from + i * row + j * column + c, channels - c);
        }
        transform_tile(d, to + c, out.point);
      }
  }

  void read_pixels(const TileRun& run, int64_t group, int64_t slice, float* to,
                   const TransformedTiles& out) {
    const int64_t height = g_.src[1], width = g_.src[2], channels = g_.src_channels;
    const float* const map =
        src_ + (run.n * g_.src[0] + slice) * height * width * pixel_ + group * channels;
    const int64_t top = 2 * run.row - lead_[1], row = width * pixel_;
    // Tiles [inner, end) lie inside.
    const int64_t last = run.column + run.count;
    int64_t inner = last, end = last;
    if (top >= 0 && top + kSide <= height && width + lead_[2] >= kSide) {
      inner = least(most(run.column, ceil_div(lead_[2], 2)), last);
      end = most(inner, least((width - kSide + lead_[2]) / 2 + 1, last));
    }
    for (int64_t t = run.column; t < last; ++t, to += out.tile) {
      const int64_t left = 2 * t - lead_[2];
      if (t >= inner && t < end) {
        transform(map + top * row + left * pixel_, row, pixel_, 2 * pixel_, end - t, channels, to,
                  out);
        to += (end - t - 1) * out.tile;
        t = end - 1;
        continue;
      }
      const int64_t pitch = round_up(channels, kLane);
      for (int64_t i = 0; i < kSide; ++i)
        for (int64_t j = 0; j < kSide; ++j) {
          float* const held = held_.data() + (i * kSide + j) * pitch;
          const int64_t y = top + i, x = left + j;
          if (y >= 0 && y < height && x >= 0 && x < width)
            copy_row(held, map + y * row + x * pixel_, channels);
          else
            fill(held, channels, 0.0f);
        }
      transform(held_.data(), kSide * pitch, pitch, 0, 1, channels, to, out);
    }
  }

  void read_planes(const TileRun& run, int64_t group, int64_t slice, float* to,
                   const TransformedTiles& out) {
    const int64_t height = g_.src[1], width = g_.src[2], positions = g_.src_positions();
    const float* const map =
        src_ + (run.n * pixel_ + group * g_.src_channels) * positions + slice * height * width;
    const int64_t top = 2 * run.row - lead_[1], left = 2 * run.column - lead_[2];
    const int64_t columns = 2 * run.count + 2;
    const int64_t begin = least(most(-left, 0), columns);
    const int64_t end = most(begin, least(width - left, columns));
    for (int64_t c = 0; c < g_.src_channels; c += kLane) {
      const int64_t channels = least(kLane, g_.src_channels - c);
      for (int64_t i = 0; i < kSide; ++i) {
        float* const held = held_.data() + i * columns * kLane;
        const int64_t y = top + i;
        if (y < 0 || y >= height) {
          fill(held, columns * kLane, 0.0f);
          continue;
        }
        fill(held, begin * kLane, 0.0f);
        const float* const from = map + c * positions + y * width + left;
        // A square runs past `end`: what follows is written after it.
        for (int64_t x = begin; x < end; x += kLane) {
          FloatVec square[kLane];
#pragma GCC unroll 16
          for (int64_t j = 0; j < kLane; ++j)
            square[j] = j < channels ? load_lanes(from + j * positions + x, end - x) : FloatVec{};
          transpose(square);
#pragma GCC unroll 16
          for (int64_t j = 0; j < kLane; ++j) store_vec(held + (x + j) * kLane, square[j]);
        }
        fill(held + end * kLane, (columns - end) * kLane, 0.0f);
      }
      transform(held_.data(), columns * kLane, kLane, 2 * kLane, run.count, kLane, to + c, out);
    }
  }

  const Gather& g_;
  const float* src_;
  bool planes_;
  int64_t pixel_;  // channels of a pixel
  int64_t lead_[3];
  Scratch<float> held_;
};

// Writes the outputs of finished tiles: of one panel's channels.
class TileWriter {
 public:
  TileWriter(const ConvProblem& p, const Gather& g, float* dst)
      : p_(p), g_(g), dst_(dst), pixel_(p.groups * g.dst_channels) {
    if (!p.channels_last) held_.resize(4 * winograd::kBlockTiles * kPanelVectors * kLane);
  }

  // `sums` are of the run's first tile, [point, tile, lane]. False if a sum is not finite.
  bool write(const TileRun& run, int64_t slice, const WeightPanel<float>& panel, const float* sums,
             int64_t tile, int64_t point) {
    FloatVec check{};
    const int64_t rows = least(2, g_.dst[1] - 2 * run.row);
    const int64_t columns = least(2 * run.count, g_.dst[2] - 2 * run.column);
    const int64_t at = (slice * g_.dst[1] + 2 * run.row) * g_.dst[2] + 2 * run.column;
    if (p_.channels_last) {
      float* const to = dst_ + (run.n * g_.dst_positions() + at) * pixel_ + panel.channel;
      for (int64_t t = 0; t < run.count; ++t, sums += tile) {
        const int64_t wide = least(2, columns - 2 * t);
        for (int64_t v = 0; v < panel.vectors; ++v) {
          FloatVec y[2][2];
          transform_sums(sums + v * kLane, point, y);
          const FloatVec bias = load_vec(panel.bias + v * kLane);
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
          FloatVec y[2][2];
          transform_sums(sums + v * kLane, point, y);
          for (int64_t i = 0; i < 2; ++i)
            for (int64_t j = 0; j < 2; ++j) {
              check += y[i][j] * 0;
              store_vec(held_.data() + (2 * (i * run.count + t) + j) * lanes + v * kLane, y[i][j]);
            }
        }
      float* const image = dst_ + (run.n * pixel_ + panel.channel) * g_.dst_positions();
      for (int64_t i = 0; i < rows; ++i)
        store_planes<false>(p_, {run.n, 0, 0, columns}, 1, held_.data() + 2 * i * run.count * lanes,
                            lanes, panel.bias, image + at + i * g_.dst[2], g_.dst_positions(),
                            panel.lanes);
    }
    return lanes_that_hold(check != check) == 0;
  }

 private:
  static constexpr int64_t kLane = kLanes<float>;

  const ConvProblem& p_;
  const Gather& g_;
  float* dst_;
  int64_t pixel_;
  Scratch<float> held_;  // contiguous: the outputs of a run, [row, column, lane]
};

}  // namespace
}  // namespace weft::WEFT_TARGET
