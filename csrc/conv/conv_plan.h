// Which way a convolution takes: pure functions of the problem, free of SIMD and of torch, so that
// they can be tested and explained without running anything.
#pragma once

#include "conv/conv_column_tiles_plan.h"
#include "conv/conv_winograd_plan.h"

namespace weft {

// Numbers of the accumulation type in a vector of a CPU target.
constexpr int64_t conv_lanes(Target target, DType dtype) {
  const int64_t bytes = target == Target::avx512 ? 64 : target == Target::avx2 ? 32 : 16;
  return bytes / (dtype == DType::f64 ? 8 : 4);
}

enum class ConvStep : uint8_t { fprop, dgrad, wgrad, bias_grad, backward };

constexpr const char* name_of(ConvStep step) {
  constexpr const char* kNames[] = {"conv_fprop", "conv_dgrad", "conv_wgrad", "conv_bias_grad",
                                    "conv_backward"};
  return kNames[static_cast<int>(step)];
}

enum class ConvPath : uint8_t {
  rows,          // depthwise, contiguous: vectors along W, rows share their loads
  pairs,         // the same of stride 2: rows in pairs, unzipped in registers
  short_rows,    // the same of rows that a vector holds: read where they lie
  pixels,        // depthwise, channels-last: vectors along the channels
  product,       // vectors along the channels, pixels are rows of a tile product
  planes,        // few channels or products: flat runs over a band of contiguous planes
  winograd,      // 3x3 windows: vectors along the channels, a tile product for each point of a tile
  flat,          // windows of one place, contiguous: vectors along an image's positions
  columns,       // few input channels, contiguous: a copy of x for each column of the window
  column_tiles,  // the same of float32, with fewer products: tiles of 2 x 2 outputs
};

constexpr const char* name_of(ConvPath path) {
  constexpr const char* kNames[] = {"rows",   "pairs",    "short_rows", "pixels",  "product",
                                    "planes", "winograd", "flat",       "columns", "column_tiles"};
  return kNames[static_cast<int>(path)];
}

// Depthwise, or contiguous without a channel that a vector would run along.
WEFT_HD constexpr bool conv_is_depthwise(const ConvProblem& p) {
  return p.c == 1 && p.k == 1 && (p.groups > 1 || !p.channels_last);
}

// Vectors of AVX-512, whose loads and stores take masks.
constexpr bool conv_has_masks(const ConvProblem& p, int64_t lanes) {
  return lanes * (p.dtype == DType::f64 ? 8 : 4) == 64;
}

// Square windows in a plane, of which `fits` tells whether an axis is right.
template <class Fits>
constexpr bool conv_square(const ConvProblem& p, const Fits& fits) {
  return p.in[0] == 1 && p.out[0] == 1 && p.window[0].size == 1 && fits(p.window[1]) &&
         fits(p.window[2]) && p.window[1].size == p.window[2].size;
}
constexpr int64_t kMostPairWindow = 4;
constexpr bool conv_goes_in_pairs(const ConvProblem& p) {
  return conv_square(p, [](const Window& w) {
    return w.stride == 2 && w.dilation == 1 && w.size >= 2 && w.size <= kMostPairWindow;
  });
}
// Maps of a window of 3 that are higher go faster down the rows of scratch (conv_row_stream.h).
constexpr bool conv_has_short_rows(const ConvProblem& p, int64_t lanes) {
  constexpr int64_t kStreamedRows = 14;
  const bool fits = conv_square(p, [](const Window& w) {
    return w.stride == 1 && w.dilation == 1 && (w.size == 3 || w.size == 5 || w.size == 7);
  });
  return fits && (p.window[1].size > 3 || p.out[1] <= kStreamedRows) && p.out[2] <= lanes;
}

// With AVX-512 alone, whose masks take the ends of rows, in other ways than `rows`.
constexpr ConvPath conv_depthwise_path(const ConvProblem& p, ConvStep step, int64_t lanes) {
  if (p.channels_last) return ConvPath::pixels;
  const bool fprop = step == ConvStep::fprop, masks = conv_has_masks(p, lanes);
  if (masks && (fprop || step == ConvStep::backward) && conv_goes_in_pairs(p))
    return ConvPath::pairs;
  return masks && fprop && conv_has_short_rows(p, lanes) ? ConvPath::short_rows : ConvPath::rows;
}

// Not depthwise. `lanes`: numbers of the accumulation type in a vector; `channels`: of one group,
// on the side that vectors would run along. Channels-last maps of a window are copied to planes
// where a vector would be `empty` times as long as the channels: then the copies are worth it.
WEFT_HD constexpr ConvPath conv_path(const ConvProblem& p, int64_t channels, int64_t lanes,
                                     int64_t empty) {
  const bool fills =
      p.channels_last ? empty * channels > lanes || p.window_elements() == 1 : channels >= lanes;
  return fills ? ConvPath::product : ConvPath::planes;
}

// Whether contiguous maps have few products for each element that the tile product would turn
// round: as planes they are taken as they lie. Not of bf16, where the product has two for one, nor
// with the few registers of narrower vectors.
WEFT_HD constexpr bool conv_turns_for_little(const ConvProblem& p, int64_t lanes) {
  constexpr int64_t kProducts = 32;
  return !p.channels_last && p.window_elements() > 1 && p.dtype != DType::bf16 &&
         conv_has_masks(p, lanes) &&
         p.out_elements() * p.c * p.window_elements() <
             kProducts * (p.in_elements() + p.out_elements());
}

// Whether contiguous maps and a window of one place are a product for each image, of vectors along
// its positions: where the lanes that are empty past the last position cost less than those past
// the last channel and turning both maps round. Not of bf16, whose products of pairs want channels
// as neighbours.
WEFT_HD constexpr bool conv_takes_flat(const ConvProblem& p, int64_t channels, int64_t lanes) {
  constexpr int64_t kTurn = 16;  // products that turning an element round costs
  if (p.channels_last || p.window_elements() > 1 || p.dtype == DType::bf16 || p.c < lanes ||
      p.k < lanes)
    return false;
  for (int a = 0; a < 3; ++a)
    if (p.window[a].stride > 1 || p.window[a].padding != 0 || p.in[a] != p.out[a]) return false;
  const int64_t positions = p.out_positions(), terms = p.c + p.k - channels;
  return ceil_div(positions, lanes) * lanes * channels * terms <=
         positions * (ceil_div(channels, lanes) * lanes * terms + kTurn * (p.c + p.k));
}

// Whether a contiguous map of few channels is copied for each column of the window
// (conv_columns.h): where output channels and rows of the window share what is copied, and outputs
// of one row find their source in scratch. Of bf16, where sums are short beside the product's,
// which has two for one; not with the narrowest vectors.
inline constexpr int64_t kColumnElements = 64 * 1024;  // of scratch
WEFT_HD constexpr bool conv_takes_columns(const ConvProblem& p, ConvStep step, int64_t lanes) {
  constexpr int64_t kLeastChannels = 8;
  const bool narrow = lanes * (p.dtype == DType::f64 ? 8 : 4) < 32;
  if (p.channels_last || p.window_elements() == 1 || p.c >= lanes || p.k < kLeastChannels || narrow)
    return false;
  const Window& rows = p.window[1];
  const int64_t slices = p.window[0].size, copies = p.c * slices * p.window[2].size;
  const int64_t read = (1 + (rows.span() - 1) / rows.stride) * rows.stride;
  if (copies * read * p.out[2] > kColumnElements) return false;
  const int64_t terms = p.c * p.window_elements();
  switch (step) {
    case ConvStep::fprop:
      return copies <= 256 && (slices == 1 || p.k * rows.size >= 32 * rows.stride * slices) &&
             (p.dtype != DType::bf16 || terms <= 32);
    case ConvStep::dgrad:  // planes fill their tiles with more channels
      return p.k > 5 * p.c;
    default:  // sums are folded once for all copies of a band
      return copies * slices * rows.stride <= 64 && p.out[2] >= 6 &&
             (p.dtype != DType::bf16 || terms <= 64);
  }
}

// fprop and dgrad, whose products of bf16 may be of pairs.
WEFT_HD constexpr ConvPath conv_gather_path(const ConvProblem& p, bool transposed, int64_t lanes) {
  if (conv_is_depthwise(p))
    return conv_depthwise_path(p, transposed ? ConvStep::dgrad : ConvStep::fprop, lanes);
  if (!transposed && conv_takes_column_tiles(p, lanes)) return ConvPath::column_tiles;
  if (conv_takes_columns(p, transposed ? ConvStep::dgrad : ConvStep::fprop, lanes))
    return ConvPath::columns;
  if (!transposed && conv_turns_for_little(p, lanes)) return ConvPath::planes;
  const int64_t channels = transposed ? p.c : p.k;
  if (conv_takes_flat(p, channels, lanes)) return ConvPath::flat;
  const ConvPath path = conv_path(p, channels, lanes, p.dtype == DType::bf16 ? 4 : 2);
  if (path == ConvPath::product && conv_takes_winograd(p, transposed)) return ConvPath::winograd;
  return path;
}
WEFT_HD constexpr ConvPath conv_wgrad_path(const ConvProblem& p, int64_t lanes) {
  if (conv_is_depthwise(p)) return conv_depthwise_path(p, ConvStep::wgrad, lanes);
  if (conv_takes_columns(p, ConvStep::wgrad, lanes)) return ConvPath::columns;
  if (conv_takes_flat(p, p.c, lanes)) return ConvPath::flat;
  const ConvPath path = conv_path(p, p.c > p.k ? p.c : p.k, lanes, 2);
  if (path == ConvPath::product && conv_wgrad_takes_winograd(p)) return ConvPath::winograd;
  return path;
}

// Whether all gradients come of one walk on CPU: of depthwise ones, and of flat ones where the sums
// of gw that its tasks hold are few beside the map that is read once instead of twice.
WEFT_HD constexpr bool conv_fuses_backward(const ConvProblem& p, int64_t lanes) {
  constexpr int64_t kTasks = 16;
  return conv_is_depthwise(p) ||
         (conv_takes_flat(p, p.c, lanes) && kTasks * p.weight_elements() <= p.out_elements());
}

WEFT_HD constexpr ConvPath conv_backward_path(const ConvProblem& p, int64_t lanes) {
  return conv_is_depthwise(p) ? conv_depthwise_path(p, ConvStep::backward, lanes) : ConvPath::flat;
}

// ---- costs -------------------------------------------------------------------------------------

// The three products of a convolution exchange roles, and cost the same.
WEFT_HD constexpr int64_t conv_flops(const ConvProblem& p, ConvStep step) {
  if (step == ConvStep::bias_grad) return p.out_elements();
  const int64_t products = step == ConvStep::backward ? 2 : 1;
  return products * 2 * p.out_elements() * p.c * p.window_elements();
}

// Every operand once.
WEFT_HD constexpr int64_t conv_least_bytes(const ConvProblem& p, ConvStep step) {
  if (step == ConvStep::bias_grad) return (p.out_elements() + p.out_channels()) * size_of(p.dtype);
  int64_t elements = p.in_elements() + p.weight_elements() + p.out_elements();
  if (step == ConvStep::backward) {
    elements += p.in_elements() + p.weight_elements();  // operands and their gradients
    if (p.activation != Activation::none) elements += p.out_elements();
  }
  return elements * size_of(p.dtype);
}

// With the copies that the product makes of contiguous operands, planes of channels-last maps and
// transformed weights: written and read once more.
WEFT_HD constexpr int64_t conv_bytes(const ConvProblem& p, ConvStep step, ConvPath path) {
  int64_t copied = 0;
  if (path == ConvPath::planes && p.channels_last) copied = p.in_elements() + p.out_elements();
  if (path == ConvPath::product && !p.channels_last) {
    if (step != ConvStep::dgrad) copied += p.in_elements();
    if (step != ConvStep::fprop) copied += p.out_elements();
  }
  if (path == ConvPath::winograd) copied = p.weight_elements() * winograd::kPoints / 9;
  return conv_least_bytes(p, step) + 2 * copied * size_of(p.dtype);
}

// ---- CUDA --------------------------------------------------------------------------------------

// The walk of conv.cu: a thread an element, a warp a weight, a block a channel's bias.
struct ConvWalk {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

WEFT_HD constexpr ConvWalk conv_walk(const ConvProblem& p, ConvStep step) {
  constexpr int kThreads = 256, kWarp = 32, kWgradThreads = 128;
  switch (step) {
    case ConvStep::fprop:
      return {ceil_div(p.out_elements(), kThreads), kThreads, 0};
    case ConvStep::dgrad:
      return {ceil_div(p.in_elements(), kThreads), kThreads, 0};
    case ConvStep::wgrad:
      return {ceil_div(p.weight_elements(), kWgradThreads / kWarp), kWgradThreads, 0};
    default:
      return {p.out_channels(), kThreads,
              kThreads / kWarp * (p.dtype == DType::f64 ? int64_t{8} : int64_t{4})};
  }
}

}  // namespace weft
