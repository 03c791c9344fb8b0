// When a convolution goes by Winograd's tiles on CPU, and how they are cut: pure functions.
//
// F(2x2, 3x3) makes four outputs of sixteen products instead of thirty-six, and pays with
// transforms of tiles and of weights. What that is worth is counted: products at the rate of the
// tile product, bytes of the transforms at that of the second-level cache, of the weights' at that
// of the third.
#pragma once

#include "conv/conv.h"

namespace weft {

namespace winograd {

constexpr int64_t kPoints = 16;         // of a tile: 4 x 4
constexpr int64_t kBlockTiles = 48;     // a multiple of every tile product's height
constexpr int64_t kLeastTiles = 12;     // of a block
constexpr int64_t kTaskSlices = 8;      // of a volume, that a task goes through
constexpr int64_t kPassChannels = 128;  // of the destination, whose weights are held at a time
constexpr int64_t kLeastChannels = 16;

}  // namespace winograd

// Tiles of all images one after another, in blocks of equal size, so that threads have equal work;
// slices of a volume in chunks.
struct WinogradCut {
  int64_t rows, columns;  // tiles of an image's slice
  int64_t tiles;          // of a slice of all images
  int64_t blocks;
  int64_t chunks;
  int64_t passes;  // over the tiles, each with some destination channels of a group
};

WEFT_HD constexpr WinogradCut winograd_cut(const ConvProblem& p, bool transposed) {
  using namespace winograd;
  const int64_t (&dst)[3] = transposed ? p.in : p.out;
  WinogradCut cut{};
  cut.rows = ceil_div(dst[1], 2);
  cut.columns = ceil_div(dst[2], 2);
  cut.tiles = p.n * cut.rows * cut.columns;
  cut.chunks = ceil_div(dst[0], kTaskSlices);
  cut.passes = ceil_div(transposed ? p.c : p.k, kPassChannels);
  // Several tasks, whatever the number of threads.
  constexpr int64_t kTasks = 8;
  const int64_t unit = ceil_div(kTasks, cut.chunks * p.groups);
  const int64_t wanted = ceil_div(ceil_div(cut.tiles, kBlockTiles), unit) * unit;
  const int64_t most = cut.tiles / kLeastTiles;
  cut.blocks = wanted < most ? wanted : most > 1 ? most : 1;
  return cut;
}

namespace winograd {

// Places of an axis that outputs read inside the map, all outputs together.
WEFT_HD constexpr int64_t places_read(const Window& w, int64_t in, int64_t out) {
  int64_t read = 0;
  for (int64_t k = 0; k < w.size; ++k) {
    const int64_t offset = k - w.padding;  // of the place, at stride 1
    const int64_t first = offset < 0 ? -offset : 0;
    const int64_t end = in - offset < out ? in - offset : out;
    if (end > first) read += end - first;
  }
  return read;
}

// Operations of the products of all points.
WEFT_HD constexpr int64_t operations(const ConvProblem& p, bool transposed) {
  const int64_t slices = places_read(p.window[0], p.in[0], p.out[0]);
  return 2 * p.groups * slices * winograd_cut(p, transposed).tiles * kPoints * p.c * p.k;
}

// Of the places of the window that lie inside: the tile product leaves the others out.
WEFT_HD constexpr int64_t direct_operations(const ConvProblem& p) {
  int64_t places = 1;
  for (int axis = 0; axis < 3; ++axis)
    places *= places_read(p.window[axis], p.in[axis], p.out[axis]);
  return 2 * p.n * p.groups * p.c * p.k * places;
}

// In operations, with what the transforms write and read again; the factors are what a byte of a
// float32 was measured to take, of a tile (second-level cache) and of a weight (third-level cache).
// A float64 has twice the bytes, and its operations take twice as long.
WEFT_HD constexpr int64_t cost(const ConvProblem& p, bool transposed) {
  constexpr int64_t kTileByte = 2, kWeightByte = 4;
  const int64_t slices = transposed ? p.in[0] : p.out[0];
  const int64_t of_tiles = 2 * kPoints * winograd_cut(p, transposed).tiles * slices * (p.c + p.k);
  const int64_t of_weights = (9 + 2 * kPoints) * p.window[0].size * p.c * p.k;
  return operations(p, transposed) +
         4 * p.groups * (kTileByte * of_tiles + kWeightByte * of_weights);
}

}  // namespace winograd

// Whether tiles serve at all.
WEFT_HD constexpr bool conv_has_tiles(const ConvProblem& p) {
  using namespace winograd;
  if (p.direct || (p.dtype != DType::f32 && p.dtype != DType::f64)) return false;
  if (p.c < kLeastChannels || p.k < kLeastChannels) return false;
  for (int axis = 0; axis < 3; ++axis)
    if (p.window[axis].stride != 1 || p.window[axis].dilation != 1) return false;
  return p.window[0].size <= 3 && p.window[1].size == 3 && p.window[2].size == 3;
}

// fprop and dgrad.
WEFT_HD constexpr bool conv_takes_winograd(const ConvProblem& p, bool transposed) {
  return conv_has_tiles(p) && winograd::cost(p, transposed) < winograd::direct_operations(p);
}

// ---- weight gradients --------------------------------------------------------------------------

// Tasks are blocks of weights, of nearly equal size, times chunks of the tiles.
struct WinogradWgradCut {
  WinogradCut tiles;
  int64_t k_blocks;
  int64_t c_blocks;  // cut between vectors
  int64_t chunks;
};

WEFT_HD constexpr WinogradWgradCut winograd_wgrad_cut(const ConvProblem& p) {
  using namespace winograd;
  constexpr int64_t kTasks = 8, kSide = 64, kLeastBlocks = 2;
  WinogradWgradCut cut{};
  cut.tiles = winograd_cut(p, false);
  cut.k_blocks = ceil_div(p.k, kSide);
  // A block's sums of all slices of the window are to stay in the cache.
  cut.c_blocks = ceil_div(p.c, p.window[0].size > 1 ? kSide / 2 : kSide);
  const int64_t wanted = ceil_div(kTasks, p.groups * cut.k_blocks * cut.c_blocks);
  const int64_t most = cut.tiles.tiles / (kLeastBlocks * kBlockTiles);
  cut.chunks = wanted < most ? wanted : most > 1 ? most : 1;
  return cut;
}

WEFT_HD constexpr bool conv_wgrad_takes_winograd(const ConvProblem& p) {
  using namespace winograd;
  if (!conv_has_tiles(p)) return false;
  constexpr int64_t kTileByte = 2, kWeightByte = 4;  // see cost
  const WinogradWgradCut cut = winograd_wgrad_cut(p);
  const int64_t of_tiles =
      2 * kPoints * cut.tiles.tiles * p.out[0] * (p.c * cut.k_blocks + p.k * cut.c_blocks);
  const int64_t of_weights = (9 + 2 * kPoints) * p.window[0].size * p.c * p.k * cut.chunks;
  // A block's sums are loaded and stored for every block of tiles.
  const int64_t products = operations(p, false) / 8 * 9;
  return products + 4 * p.groups * (kTileByte * of_tiles + kWeightByte * of_weights) <
         direct_operations(p);
}

}  // namespace weft
