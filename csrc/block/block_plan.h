// Convolution, activation and pooling as one: how the work is cut, as a pure function.
//
// A task convolves a part of an image's map into a buffer that stays in the second-level cache and
// pools it from there, so the unpooled map never goes to memory. A part is some groups of a
// contiguous image (all channels, if it is not depthwise) or a band of the rows of a channels-last
// one: each is a convolution and a pooling of their own, which the families' kernels run. Every
// element is summed as in the whole problem, so the bits are those of the two in sequence.
// Pointwise contiguous layers go in sequence: a part is a whole image there, which only the
// third-level cache holds, or some of its output channels, which load the image's input again each;
// both lost, the one 11 to 28 % where images are large, the other more.
#pragma once

#include "block/block.h"
#include "conv/conv_plan.h"
#include "pool/pool_plan.h"

namespace weft {

struct BlockPlan {
  enum class Path : uint8_t { sequence, groups, bands };

  Path path = Path::sequence;
  int axis = 1;        // bands: of which axis
  int64_t step = 1;    // groups, or pooled rows, of a task
  int64_t parts = 1;   // tasks of an image
  int64_t buffer = 0;  // elements: the largest part of the unpooled map
};

namespace block_plan {

constexpr int64_t kBufferBytes = 256 * 1024;
// Maps of fewer bytes stay in the cache anyway.
constexpr int64_t kLeastBytes = 1 << 20;
// Weights are packed again for each part: so many outputs for each are worth that.
constexpr int64_t kOutputsPerWeight = 4;

// Elements of a row of a channels-last map.
constexpr int64_t row_elements(const int64_t (&extent)[3], int axis, int64_t channels) {
  int64_t positions = 1;
  for (int i = axis + 1; i < 3; ++i) positions *= extent[i];
  return positions * channels;
}

// Rows of the unpooled map that pooled rows [begin, end) read.
inline Range band_rows(const PoolProblem& p, int axis, int64_t begin, int64_t end) {
  const PoolWindow& window = p.window[axis];
  const int64_t first = window.first_input(begin);
  const int64_t last = window.first_input(end - 1) + window.span();
  return {first > 0 ? first : 0, last < p.in[axis] ? last : p.in[axis]};
}

}  // namespace block_plan

// `lanes`: numbers of the accumulation type in a vector.
inline BlockPlan plan_block(const BlockProblem& b, int64_t lanes) {
  using namespace block_plan;
  const ConvProblem& p = b.conv;
  const int64_t image = p.out_channels() * p.out_positions();
  const int64_t size = size_of(p.dtype);
  const ConvPath path = conv_gather_path(p, false, lanes);
  const bool dense = path == ConvPath::product || path == ConvPath::planes ||
                     path == ConvPath::columns || path == ConvPath::column_tiles;
  // Planes of few channels pool in sequence; of more, they only save turning round, and fuse.
  const bool few_channels = path == ConvPath::planes && (p.channels_last || p.k < lanes);
  BlockPlan plan;
  if (b.pool.out_elements() == 0 || p.n * image * size < kLeastBytes || few_channels ||
      path == ConvPath::winograd || path == ConvPath::flat || pool_takes_lanes(b.pool) ||
      p.weight_elements() * kOutputsPerWeight > image)
    return plan;
  if (!p.channels_last) {
    const int64_t group = p.k * p.out_positions();
    plan.path = BlockPlan::Path::groups;
    // The product takes one group of few channels another way than several: all stay together.
    const int64_t fit = dense ? p.groups : kBufferBytes / (group * size);
    plan.parts = ceil_div(p.groups, fit > 1 ? fit : 1);
    plan.step = ceil_div(p.groups, plan.parts);
    plan.buffer = plan.step * group;
    return plan;
  }
  plan.axis = p.out[0] > 1 ? 0 : 1;
  // A part must not be a single output of the whole map: that is summed in another order.
  if (b.pool.out[2] <= 1 || (plan.axis == 0 && b.pool.out[1] <= 1)) return plan;
  const PoolWindow& window = b.pool.window[plan.axis];
  const int64_t rest = row_elements(p.out, plan.axis, p.out_channels()),
                rows = b.pool.out[plan.axis];
  const int64_t least = dense ? p.weight_elements() * kOutputsPerWeight : 0;
  const int64_t wanted = kBufferBytes / size > least ? kBufferBytes / size : least;
  const int64_t fit = (wanted / rest - window.span()) / window.stride + 1;
  plan.path = BlockPlan::Path::bands;
  plan.parts = ceil_div(rows, fit > 1 ? fit : 1);
  plan.step = ceil_div(rows, plan.parts);
  plan.parts = ceil_div(rows, plan.step);
  plan.buffer = ((plan.step - 1) * window.stride + window.span()) * rest;
  return plan;
}

// How the gradient of the unpooled map is cut: into planes of a contiguous map, into bands of rows
// of a channels-last one, each of which stays in the second-level cache until the activation's
// gradient is in it too.
struct BlockGradPlan {
  int axis;       // bands: of which axis
  int64_t step;   // planes, or rows of the map, of a task
  int64_t parts;  // of all planes, or of an image
};

inline BlockGradPlan plan_block_grad(const PoolProblem& pool, bool channels_last) {
  using namespace block_plan;
  const int axis = pool.in[0] > 1 ? 0 : 1;
  const int64_t unit =
      channels_last ? row_elements(pool.in, axis, pool.inner) : pool.in_positions();
  const int64_t units = channels_last ? pool.in[axis] : pool.outer;
  const int64_t fit = kBufferBytes / (unit * size_of(pool.dtype));
  const int64_t parts = ceil_div(units, fit > 1 ? fit : 1);
  const int64_t step = ceil_div(units, parts);
  return {axis, step, ceil_div(units, step)};
}

// Whether all gradients come of convolution's walk on CPU, which makes the map's as it goes: where
// planes are worth the calls, and the map is not in the cache anyway.
inline bool block_fuses_backward(const BlockProblem& b) {
  constexpr int64_t kLeastPlane = 2048;
  const ConvProblem& p = b.conv;
  return !p.channels_last && conv_is_depthwise(p) && p.in_elements() > 0 &&
         b.pool.out_elements() > 0 && p.out_positions() >= kLeastPlane &&
         p.out_elements() * size_of(p.dtype) >= block_plan::kLeastBytes;
}

// ---- the parts ---------------------------------------------------------------------------------

// A part as a problem of its own, and where its operands begin.
struct BlockPart {
  ConvProblem conv;
  PoolProblem pool;
  int64_t x, w, bias, y;  // elements
  int64_t sign;           // the first row of signs
  int64_t signs;          // rows of them: those that are not the next part's as well
};

inline BlockPart part_of(const BlockProblem& b, const BlockPlan& plan, int64_t task) {
  const ConvProblem& whole = b.conv;
  const int64_t n = task / plan.parts, begin = task % plan.parts * plan.step;
  BlockPart part{whole, b.pool, 0, 0, 0, 0, 0, 0};
  ConvProblem& conv = part.conv;
  PoolProblem& pool = part.pool;
  conv.direct = true;
  conv.n = 1;
  part.x = n * whole.in_channels() * whole.in_positions();
  part.y = n * whole.out_channels() * pool.out_positions();
  if (plan.path == BlockPlan::Path::groups) {
    conv.groups = whole.groups - begin < plan.step ? whole.groups - begin : plan.step;
    part.x += begin * whole.c * whole.in_positions();
    part.w = begin * whole.k * whole.c * whole.window_elements();
    part.bias = begin * whole.k;
    part.y += part.bias * pool.out_positions();
    part.sign = n * whole.out_channels() + part.bias;
    part.signs = pool.outer = conv.out_channels();
    return part;
  }
  using block_plan::row_elements;
  const int axis = plan.axis;
  const int64_t rows = pool.out[axis];
  const int64_t end = rows - begin < plan.step ? rows : begin + plan.step;
  const Range read = block_plan::band_rows(pool, axis, begin, end);
  part.y += begin * row_elements(pool.out, axis, pool.inner);
  const int64_t slice = axis == 0 ? whole.out[1] : 1;  // rows of signs
  part.sign = n * whole.out[0] * whole.out[1] + read.begin * slice;
  const int64_t next =
      end < rows ? block_plan::band_rows(pool, axis, end, end + 1).begin : read.end;
  part.signs = ((next < read.end ? next : read.end) - read.begin) * slice;
  conv.out[axis] = read.end - read.begin;
  // The band's own rows of the input alone, at least one: kernels copy what they are given.
  Window& window = conv.window[axis];
  window.padding -= read.begin * window.stride;
  const auto inside = [&](int64_t row, int64_t least) {
    return row < least ? least : row < whole.in[axis] ? row : whole.in[axis] - 1;
  };
  const int64_t first = inside(-window.padding, 0);
  const int64_t last = window.first_input(conv.out[axis] - 1) + window.span() - 1;
  part.x += first * row_elements(whole.in, axis, whole.in_channels());
  conv.in[axis] = inside(last, first) + 1 - first;
  window.padding += first;
  pool.outer = 1;
  pool.in[axis] = conv.out[axis];
  pool.out[axis] = end - begin;
  pool.window[axis].padding += read.begin - begin * pool.window[axis].stride;
  return part;
}

// A part of the gradient: a pooling of its own, where its operands begin, and its rows of signs.
struct BlockGradPart {
  PoolProblem pool;
  int64_t x, y;  // elements of the map and of what was pooled
  int64_t sign, signs;
};

inline BlockGradPart grad_part_of(const PoolProblem& whole, const BlockGradPlan& plan,
                                  bool channels_last, int64_t task) {
  const int64_t begin = task % plan.parts * plan.step, n = task / plan.parts;
  BlockGradPart part{whole, 0, 0, 0, 0};
  PoolProblem& pool = part.pool;
  const auto end_of = [&](int64_t extent) {
    return extent - begin < plan.step ? extent : begin + plan.step;
  };
  if (!channels_last) {
    pool.outer = end_of(whole.outer) - begin;
    part.x = begin * whole.in_positions();
    part.y = begin * whole.out_positions();
    part.sign = begin;
    part.signs = pool.outer;
    return part;
  }
  using block_plan::row_elements;
  const int axis = plan.axis;
  const int64_t end = end_of(whole.in[axis]), slice = axis == 0 ? whole.in[1] : 1;
  // The pooled rows whose windows hold one of the band's.
  PoolWindow& window = pool.window[axis];
  const int64_t last = outputs_covering(window, end - 1, whole.out[axis]).end;
  int64_t first = outputs_covering(window, begin, whole.out[axis]).begin;
  if (first > last) first = last;
  // Where none holds the band's first row, the one before: padding is never negative.
  if (begin + window.padding < first * window.stride) --first;
  part.x = (n * whole.in[0] * whole.in[1] + begin * slice) * whole.in[2] * whole.inner;
  part.y =
      n * whole.out_positions() * whole.inner + first * row_elements(whole.out, axis, whole.inner);
  part.sign = n * whole.in[0] * whole.in[1] + begin * slice;
  part.signs = (end - begin) * slice;
  pool.outer = 1;
  pool.in[axis] = end - begin;
  pool.out[axis] = last - first;
  window.padding += begin - first * window.stride;
  return part;
}

}  // namespace weft
