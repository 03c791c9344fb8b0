// When a contiguous convolution of few input channels goes by tiles of 2 x 2 outputs on CPU
// (conv_column_tiles.h), and what that costs: pure functions.
//
// Along an axis of stride s the places of a window fall into s phases. Those of a phase are a
// correlation of stride 1, cut into runs of at most three neighbours. Two outputs of a run of three
// places take four products instead of six, of two three instead of four, of one two.
#pragma once

#include "conv/conv.h"

namespace weft {

namespace column_tiles {

constexpr int64_t kElements = 128 * 1024;  // of a task's scratch
constexpr int64_t kChannelsAtATime = 64;   // whose outputs wait in scratch
constexpr int64_t kRun = 3;                // places

// Products for two outputs of an axis.
WEFT_HD constexpr int64_t products(const Window& w) {
  int64_t count = 0;
  for (int64_t phase = 0; phase < w.stride && phase < w.size; ++phase) {
    const int64_t places = ceil_div(w.size - phase, w.stride);
    count += places + ceil_div(places, kRun);
  }
  return count;
}

// Products for a tile and an output channel.
WEFT_HD constexpr int64_t terms(const ConvProblem& p) {
  return p.c * products(p.window[1]) * products(p.window[2]);
}

// The convolution whose outputs are tiles, and whose windows hold all that a tile reads.
WEFT_HD constexpr ConvProblem grid(const ConvProblem& p) {
  ConvProblem tiles = p;
  for (int axis = 1; axis < 3; ++axis) {
    tiles.out[axis] = ceil_div(p.out[axis], 2);
    Window& w = tiles.window[axis];
    w.size += w.stride;
    w.stride *= 2;
  }
  return tiles;
}

// Rows of tiles whose copies begin in the same row of tiles.
WEFT_HD constexpr int64_t rows_read(const ConvProblem& tiles) {
  return 1 + (tiles.window[1].size - 1) / tiles.window[1].stride;
}

// Elements of scratch for `rows` rows of tiles: copies of what they read, and their outputs.
WEFT_HD constexpr int64_t scratch(const ConvProblem& p, int64_t rows) {
  const ConvProblem tiles = grid(p);
  const int64_t copies = p.c * products(p.window[2]) * tiles.window[1].stride;
  const int64_t channels = p.k < kChannelsAtATime ? p.k : kChannelsAtATime;
  return (copies * (rows + rows_read(tiles) - 1) + 4 * channels * rows) * tiles.out[2];
}

WEFT_HD constexpr int64_t tiles_of_group(const ConvProblem& p) {
  return ceil_div(p.out[1], 2) * ceil_div(p.out[2], 2);
}

WEFT_HD constexpr int64_t operations(const ConvProblem& p) {
  return 2 * p.n * p.groups * p.k * terms(p) * tiles_of_group(p);
}

// Of an image of a group, in products, as measured: of turning the sums of a channel's tile into
// its outputs, more where a vector's tiles lie in several rows, which then go to the map in parts;
// of making a term's source; of a copied element; of a transformed weight, which a few images
// share.
WEFT_HD constexpr int64_t cost(const ConvProblem& p, int64_t lanes) {
  constexpr int64_t kOutputs = 40, kPart = 60, kSource = 8, kCopy = 16, kWeight = 40;
  const int64_t copies = p.c * products(p.window[2]) * 2 * p.window[1].stride;
  const int64_t width = ceil_div(p.out[2], 2);
  const int64_t outputs = kOutputs + (width % lanes == 0 ? 0 : kPart * lanes / width);
  const int64_t tiles = ceil_div(tiles_of_group(p), lanes) * lanes;
  return tiles * (p.k * (terms(p) + outputs) + kSource * terms(p) + kCopy * copies) +
         kWeight * p.k * terms(p);
}

}  // namespace column_tiles

// Whether an image's products are so few that this pays, also where outputs go to memory; the other
// way, that of conv_columns.h, makes each product of the sum. Does not look at the number of
// images: parts of a batch take the same way.
WEFT_HD constexpr bool conv_takes_column_tiles(const ConvProblem& p, int64_t lanes) {
  using namespace column_tiles;
  if (p.dtype != DType::f32 || p.channels_last || p.c >= lanes || lanes < 8) return false;
  if (p.window[0].size > 1 || p.in[0] > 1 || p.out[0] > 1) return false;
  for (int axis = 1; axis < 3; ++axis)
    if (p.window[axis].dilation > 1) return false;
  return 9 * cost(p, lanes) < 8 * p.k * p.c * p.window_elements() * p.out_positions() &&
         scratch(p, 1) <= kElements;
}

}  // namespace weft
