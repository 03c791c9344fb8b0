// The three products of a convolution as tile products: what their rows, columns and reductions
// are.
//
//   fprop  y[position, k]      = Σ_(c, place) x[position at place, c] · w[k, c, place]
//   dgrad  gx[position, c]     = Σ_(k, place) gy[position from place, k] · w[k, c, place]
//   wgrad  gw[k, (c, place)]   = Σ_position gy[position, k] · x[position at place, c]
//
// The order of channels and places in an index is the order of the weights in memory: channels last
// for channels-last maps, places last for contiguous ones. A strided dgrad is one product a phase
// (conv_phases.h).
#pragma once

#include "conv/conv.h"
#include "conv/conv_plan_cuda.h"
#include "gemm/tile_product.h"

namespace weft::WEFT_TARGET {
namespace {

// Steps in memory of a map of `channels` channels.
struct MapSteps {
  int64_t image, channel, position;
  int64_t axis[3];
};

inline MapSteps map_steps(int64_t channels, const int64_t (&extent)[3], bool channels_last) {
  const int64_t positions = extent[0] * extent[1] * extent[2];
  MapSteps s;
  s.image = channels * positions;
  s.channel = channels_last ? 1 : positions;
  s.position = channels_last ? channels : 1;
  s.axis[2] = s.position;
  s.axis[1] = s.axis[2] * extent[2];
  s.axis[0] = s.axis[1] * extent[1];
  return s;
}

inline MapSteps in_steps(const ConvProblem& p) {
  return map_steps(p.in_channels(), p.in, p.channels_last);
}
inline MapSteps out_steps(const ConvProblem& p) {
  return map_steps(p.out_channels(), p.out, p.channels_last);
}

// One axis of positions or places: how many, where the first is and how far the next, on the map.
struct Steps {
  int64_t count, from, step;
};

inline void set_extents(IndexMap& map, int64_t outer, const Steps (&axes)[3], int64_t inner) {
  map.count = static_cast<int>(outer * axes[0].count * axes[1].count * axes[2].count * inner);
  map.by_inner = WideDivider(std::max<int64_t>(inner, 1));
  map.by_w = WideDivider(std::max<int64_t>(axes[2].count, 1));
  map.by_h = WideDivider(std::max<int64_t>(axes[1].count, 1));
  map.by_d = WideDivider(std::max<int64_t>(axes[0].count, 1));
}

// Steps on a map, as positions and as offsets.
inline void set_positions(IndexMap& map, const Steps (&axes)[3], const int64_t (&memory)[3]) {
  map.offset = 0;
  for (int a = 0; a < 3; ++a) {
    map.from[a] = static_cast<int>(axes[a].from);
    map.step[a] = static_cast<int>(axes[a].step);
    map.offset += axes[a].from * memory[a];
  }
  map.d_step = axes[0].step * memory[0];
  map.h_step = axes[1].step * memory[1];
  map.w_step = axes[2].step * memory[2];
}

// Images and positions.
inline IndexMap position_map(int64_t images, const Steps (&axes)[3], const MapSteps& memory) {
  IndexMap map;
  set_extents(map, images, axes, 1);
  set_positions(map, axes, memory.axis);
  map.outer_step = memory.image;
  return map;
}

// Channels of a group and places of the window, as they lie in the weights.
inline IndexMap place_map(bool channels_last, int64_t channels, const Steps (&places)[3],
                          const MapSteps& memory) {
  IndexMap map;
  set_extents(map, channels_last ? 1 : channels, places, channels_last ? channels : 1);
  set_positions(map, places, memory.axis);
  (channels_last ? map.inner_step : map.outer_step) = memory.channel;
  return map;
}

// All positions of a map one after another; images apart where channels are planes.
inline IndexMap flat_positions(const ConvProblem& p, const MapSteps& memory, int64_t positions) {
  if (p.channels_last) return linear_map(p.n * positions, memory.position);
  IndexMap map;
  const Steps one[3] = {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}};
  set_extents(map, p.n, one, positions);
  map.outer_step = memory.image;
  map.inner_step = 1;
  return map;
}

inline void set_map_extent(Operand& operand, const int64_t (&extent)[3]) {
  for (int a = 0; a < 3; ++a) operand.extent[a] = static_cast<int>(extent[a]);
}

inline void set_tiles(TileProduct& t, const ConvProblem& p, const ConvCudaPlan& plan) {
  t.rows = t.a.rows.count;
  t.columns = t.b.rows.count;
  t.reduction = t.a.reduction.count;
  t.tiles_m = static_cast<int>(ceil_div(t.rows, plan.tile.m));
  t.tiles_n = static_cast<int>(ceil_div(t.columns, plan.tile.n));
  t.groups = static_cast<int>(p.groups);
  t.splits = static_cast<int>(plan.splits);
  t.split_steps = static_cast<int>(plan.split_steps);
}

// Windows on the input: of output positions, and of the places of a window.
inline void window_steps(const ConvProblem& p, Steps (&positions)[3], Steps (&places)[3]) {
  for (int a = 0; a < 3; ++a) {
    const Window& w = p.window[a];
    positions[a] = {p.out[a], -w.padding, w.stride};
    places[a] = {w.size, 0, w.dilation};
  }
}

inline TileProduct fprop_product(const ConvProblem& p, const ConvCudaPlan& plan) {
  TileProduct t;
  const MapSteps in = in_steps(p), out = out_steps(p);
  Steps positions[3], places[3];
  window_steps(p, positions, places);
  const int64_t weights = p.c * p.window_elements();  // of one output channel
  t.a.rows = position_map(p.n, positions, in);
  t.a.reduction = place_map(p.channels_last, p.c, places, in);
  set_map_extent(t.a, p.in);
  t.a.group_step = p.c * in.channel;
  t.b.rows = linear_map(p.k, weights);
  t.b.reduction = linear_map(weights, 1);
  t.b.group_step = p.k * weights;
  t.out_rows = flat_positions(p, out, p.out_positions());
  t.out_column_step = out.channel;
  t.out_group_step = p.k * out.channel;
  set_tiles(t, p, plan);
  return t;
}

// The product of one phase that inputs belong to.
inline TileProduct dgrad_product(const ConvProblem& p, const ConvCudaPlan& plan,
                                 const int64_t (&remainder)[3]) {
  TileProduct t;
  const MapSteps in = in_steps(p), out = out_steps(p);
  Steps inputs[3], outputs[3], places[3], weights[3];
  for (int a = 0; a < 3; ++a) {
    const conv_plan::Phase phase = conv_plan::phase_of(p.window[a], p.in[a], remainder[a]);
    inputs[a] = {phase.inputs, phase.first_input, p.window[a].stride};
    outputs[a] = {phase.inputs, phase.first_output, 1};
    places[a] = {phase.places, 0, phase.output_step};
    weights[a] = {phase.places, phase.first_place, phase.place_step};
  }
  t.a.rows = position_map(p.n, outputs, out);
  t.a.reduction = place_map(p.channels_last, p.k, places, out);
  set_map_extent(t.a, p.out);
  t.a.group_step = p.k * out.channel;
  // The weights as a map [k][place][c] or [k][c][place], whose channels are output channels.
  MapSteps w;
  w.position = p.channels_last ? p.c : 1;
  w.axis[2] = w.position;
  w.axis[1] = w.axis[2] * p.window[2].size;
  w.axis[0] = w.axis[1] * p.window[1].size;
  w.channel = p.c * p.window_elements();
  w.image = 0;
  t.b.rows = linear_map(p.c, p.channels_last ? 1 : p.window_elements());
  t.b.reduction = place_map(p.channels_last, p.k, weights, w);
  t.b.group_step = p.k * w.channel;
  t.out_rows = position_map(p.n, inputs, in);
  t.out_column_step = in.channel;
  t.out_group_step = p.c * in.channel;
  set_tiles(t, p, plan);
  t.split_steps = static_cast<int>(ceil_div(t.reduction, plan.tile.k));
  return t;
}

inline TileProduct wgrad_product(const ConvProblem& p, const ConvCudaPlan& plan) {
  TileProduct t;
  const MapSteps in = in_steps(p), out = out_steps(p);
  Steps positions[3], places[3];
  window_steps(p, positions, places);
  const int64_t weights = p.c * p.window_elements();
  t.a.rows = linear_map(p.k, out.channel);
  t.a.reduction = flat_positions(p, out, p.out_positions());
  t.a.group_step = p.k * out.channel;
  t.b.rows = place_map(p.channels_last, p.c, places, in);
  t.b.reduction = position_map(p.n, positions, in);
  set_map_extent(t.b, p.in);
  t.b.group_step = p.c * in.channel;
  t.out_rows = linear_map(p.k, weights);
  t.out_group_step = p.k * weights;
  t.out_split_step = p.weight_elements();
  set_tiles(t, p, plan);
  return t;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
