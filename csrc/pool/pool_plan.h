// Which way the CPU takes through a pooling problem: pure functions of the problem, free of SIMD
// and of torch, so that they can be tested and explained without running anything.
#pragma once

#include <cstdint>

#include "pool/pool.h"

namespace weft {

enum class PoolPath : uint8_t {
  flat,    // small windows that keep the map's size: the array is one run of vectors
  pixels,  // small windows of channels, read where they lie
  pairs,   // small windows of stride 2 along contiguous rows, read where they lie
  rows,    // the rows of a window are reduced where they lie, then windows along that one row
  passes,  // a strip of rows is reduced along H and along W by doubling: log2(window) passes
  lanes,   // planes of few positions, one in each lane of a vector
  ring,    // with places: rows are reduced along W first and held while windows need them
  keys,    // with places, large windows: as `rows` or `passes`, with integers that hold both
  boxes,   // adaptive windows of unequal extents
  planes,  // one output per plane
  place,   // backward: each output's gradient goes to its place; windows do not overlap
  gather,  // backward: each input gathers from the outputs that cover it
  add,     // backward of large windows: a thread owns planes and adds each gradient at its place
};

constexpr const char* name_of(PoolPath path) {
  switch (path) {
    case PoolPath::flat:
      return "flat";
    case PoolPath::pixels:
      return "pixels";
    case PoolPath::pairs:
      return "pairs";
    case PoolPath::rows:
      return "rows";
    case PoolPath::passes:
      return "passes";
    case PoolPath::lanes:
      return "lanes";
    case PoolPath::ring:
      return "ring";
    case PoolPath::keys:
      return "keys";
    case PoolPath::boxes:
      return "boxes";
    case PoolPath::planes:
      return "planes";
    case PoolPath::place:
      return "place";
    case PoolPath::gather:
      return "gather";
    case PoolPath::add:
      return "add";
  }
  return "";
}

// Elements that are worth a thread: a few microseconds of work, some times what sharing it costs.
inline constexpr int64_t kPoolGrain = 16384;

// Windows along a row of up to this many elements are reduced one by one, larger ones by doubling.
inline constexpr int64_t kPoolDirectSize = 6;

// Passes over a line that doubling takes for a window: reads and writes count alike.
WEFT_HD constexpr int64_t pool_doubling_passes(int64_t size) {
  int64_t passes = 1;
  for (int64_t power = 2; power <= size; power *= 2) ++passes;
  return passes;
}

// Adaptive windows that divide every axis evenly are fixed windows that touch.
WEFT_HD constexpr PoolProblem pool_with_fixed_windows(PoolProblem p) {
  if (!p.adaptive()) return p;
  for (int axis = 0; axis < 3; ++axis)
    if (p.out[axis] == 0 || p.in[axis] % p.out[axis] != 0) return p;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t size = p.in[axis] / p.out[axis];
    p.window[axis] = PoolWindow{{size, size, 0, 1}, 0, 0};
  }
  return p;
}

// Every axis has one output, whose window is the whole axis.
WEFT_HD constexpr bool pool_is_global(const PoolProblem& p) {
  for (int axis = 0; axis < 3; ++axis)
    if (p.out[axis] != 1 || p.window[axis].adaptive() || p.window[axis].padding != 0 ||
        p.window[axis].span() != p.in[axis] || p.window[axis].dilation != 1)
      return false;
  return true;
}

// Outputs larger than this go past the cache: before they are read again they would have left it,
// and a line that is written whole need not be read first.
inline constexpr int64_t kPoolStreamBytes = int64_t{16} << 20;

WEFT_HD constexpr bool pool_streams(int64_t elements, const PoolProblem& p) {
  return elements * size_of(p.dtype) >= kPoolStreamBytes;
}

// Whether loading every element of every window costs less than making a line of the rows of an
// output row. Loads and stores count as 2, as 3 where they lie across two cache lines, and a half
// type's conversions as two loads; a row's line costs a start; and while it is reduced, loads from
// memory wait.
WEFT_HD constexpr bool pool_direct_is_cheaper(const PoolProblem& p) {
  constexpr int64_t kRowStart = 110, kVector = 64;
  const int64_t rows = p.window[0].size * p.window[1].size;
  const int64_t columns = p.window[2].size;
  const int64_t doubled = 2 * pool_doubling_passes(columns);
  const bool halves = size_of(p.dtype) == 2;
  const int64_t load = halves ? 3 : 1;
  const int64_t line =
      2 * (p.window[2].stride * (rows * load + 1) + (columns < doubled ? columns : doubled));
  const int64_t waits = pool_streams(p.in_elements(), p) ? line : 0;
  const int64_t direct =
      rows * columns * load * (p.inner * size_of(p.dtype) % kVector == 0 ? 2 : 3);
  const int64_t vectors = 1 + p.out[2] * p.inner * size_of(p.dtype) * (halves ? 2 : 1) / kVector;
  return direct * vectors <= (line + waits) * vectors + kRowStart;
}

// Fixed windows that keep the map's size and have one divisor, with rows that 16 bits can count.
WEFT_HD constexpr bool pool_is_flat(const PoolProblem& p) {
  constexpr int64_t kMostPositions = 16384;
  for (int axis = 0; axis < 3; ++axis)
    if (p.window[axis].stride != 1 || p.out[axis] != p.in[axis] ||
        !(p.count_include_pad || p.divisor != 0 || p.window[axis].padding == 0))
      return false;
  return p.window[0].size == 1 && p.in[2] * p.inner <= kMostPositions && p.in[1] <= kMostPositions;
}

// Small windows of stride 2 along contiguous rows.
inline constexpr int64_t kPoolMostPairs = 4, kPoolMostPairRows = 4;
WEFT_HD constexpr bool pool_goes_in_pairs(const PoolProblem& p) {
  constexpr int64_t kMostElements = 12;
  if (p.adaptive() || p.inner != 1) return false;
  for (const PoolWindow& window : p.window)
    if (window.dilation != 1) return false;
  return p.window[2].stride == 2 && p.window[2].size <= kPoolMostPairs &&
         p.window[0].size * p.window[1].size <= kPoolMostPairRows &&
         p.window_elements() <= kMostElements;
}

// Every window is divided by the same number.
WEFT_HD constexpr bool pool_has_one_divisor(const PoolProblem& p) {
  if (p.divisor != 0) return true;
  for (int axis = 0; axis < 3; ++axis) {
    const PoolWindow& window = p.window[axis];
    const int64_t end = (p.out[axis] - 1) * window.stride - window.padding + window.size;
    if (window.padding > 0 && !p.count_include_pad) return false;
    if (end > p.in[axis] + window.padding) return false;
  }
  return true;
}

// Forward, without places, of a problem as `pool_with_fixed_windows` leaves it.
WEFT_HD constexpr PoolPath pool_values_path(const PoolProblem& p) {
  constexpr int64_t kVector = 64;
  if (p.adaptive()) return PoolPath::boxes;
  if (pool_is_global(p)) return PoolPath::planes;
  // Directly, an output row reads `size` rows; by doubling, each of its `stride` rows is read and
  // written once per pass.
  const PoolWindow& height = p.window[1];
  const int64_t doubling = 3 * height.stride * pool_doubling_passes(height.size);
  if (height.size > doubling / 2 + 2) return PoolPath::passes;
  if (pool_goes_in_pairs(p)) return PoolPath::pairs;
  if (!pool_direct_is_cheaper(p)) return PoolPath::rows;
  if (pool_is_flat(p)) return PoolPath::flat;
  const bool channels = p.inner * size_of(p.dtype) >= kVector;
  return channels && pool_streams(p.in_elements(), p) ? PoolPath::pixels : PoolPath::rows;
}

// Windows that keep the map's size, and lie as far before as behind their position: parts of a map
// may have others.
WEFT_HD constexpr bool pool_is_symmetric(const PoolProblem& p) {
  for (const PoolWindow& window : p.window)
    if (2 * window.padding != window.span() - 1) return false;
  return true;
}

// Bits for a position on an axis of what fixed windows span, padding included.
WEFT_HD constexpr int pool_place_bits(const PoolProblem& p, int axis) {
  const int64_t positions = (p.out[axis] - 1) * p.window[axis].stride + p.window[axis].span();
  int bits = 0;
  while (int64_t{1} << bits < positions) ++bits;
  return bits;
}

// A key has 32 bits for the value and 31 for the place.
WEFT_HD constexpr bool pool_has_keys(const PoolProblem& p) {
  constexpr int kBits = 31, kExactInFloat = 22;
  const int h = pool_place_bits(p, 1), w = pool_place_bits(p, 2);
  const bool dense = p.window[1].dilation == 1 && p.window[2].dilation == 1;
  return p.dtype != DType::f64 && pool_place_bits(p, 0) + h + w <= kBits &&
         (dense || (h <= kExactInFloat && w <= kExactInFloat));
}

// Forward with places, of a problem as it was given: windows that divide a map evenly are faster as
// boxes, unless they are the map.
WEFT_HD constexpr PoolPath pool_places_path(const PoolProblem& p) {
  constexpr int64_t kSmallWindow = 9;
  const bool global = pool_is_global(pool_with_fixed_windows(p));
  if (global && p.inner == 1) return PoolPath::planes;
  if (global || p.adaptive()) return PoolPath::boxes;
  if (pool_goes_in_pairs(p)) return PoolPath::pairs;
  return p.window_elements() > kSmallWindow && pool_has_keys(p) ? PoolPath::keys : PoolPath::ring;
}

// No input is read by two windows.
WEFT_HD constexpr bool pool_windows_are_apart(const PoolProblem& p) {
  if (p.adaptive()) return false;
  for (const PoolWindow& window : p.window)
    if (window.stride < window.span()) return false;
  return true;
}

// Of how many planes a table holds the windows' first positions, so that their outputs are one run;
// 0 where rows are so long that what each of them costs does not matter.
WEFT_HD constexpr int64_t pool_tabulated_planes(const PoolProblem& p) {
  constexpr int64_t kShortRow = 64, kOutputs = 512, kMostOutputs = 4096, kLeastPlanes = 8;
  const int64_t outputs = p.out_positions();
  if (p.inner != 1 || p.out[2] > kShortRow || p.outer < kLeastPlanes || outputs == 0 ||
      outputs > kMostOutputs)
    return 0;
  return outputs < kOutputs ? kOutputs / outputs : 1;
}

// Whether gathering the gradients of the maximum is cheaper than storing each at its place, once
// what it goes to is cleared. Times are of one core with vectors of 64 bytes, in tenths of a
// nanosecond. A gather costs a start per input row; per output and window place a compare and an
// add, a vector at a time; and per input a merge of the phases of a stride, by vectors if possible.
WEFT_HD constexpr bool pool_gather_is_cheaper(const PoolProblem& p) {
  constexpr int64_t kRow = 400, kCompare = 5, kMerge = 20, kMergeToMemory = 30, kMergeOne = 10;
  constexpr int64_t kStore = 9;
  const int64_t lanes = p.dtype == DType::f64 ? 8 : 16;
  const int64_t rows = p.outer * p.in[0] * p.in[1];
  const int64_t stride = p.window[2].stride;
  const bool by_vectors = stride == 1 || p.inner >= lanes || (stride == 2 && p.inner == 1);
  const int64_t compares = p.out_elements() * p.window_elements() * kCompare / lanes;
  const int64_t merge = pool_streams(p.in_elements(), p) ? kMergeToMemory : kMerge;
  const int64_t merges = p.in_elements() * (by_vectors ? merge : kMergeOne * lanes) / lanes;
  return kRow * rows + compares + merges < kStore * p.out_elements();
}

// Whether gathering as vectors of either parity is: a start per input row, a compare and an add for
// each window place that a vector of positions may have.
WEFT_HD constexpr bool pool_pairs_are_cheaper(const PoolProblem& p) {
  constexpr int64_t kRow = 60, kTerm = 12, kStore = 9, kPositions = 32;
  const int64_t rows = p.outer * p.in[0] * p.in[1], vectors = ceil_div(p.in[2], kPositions);
  const int64_t met = p.outer * p.out[0] * p.out[1] * p.window[0].size * p.window[1].size;
  return kRow * rows + kTerm * vectors * met * p.window[2].size < kStore * p.out_elements();
}

// Backward of the maximum, of a problem as `pool_with_fixed_windows` leaves it.
WEFT_HD constexpr PoolPath pool_max_gradient_path(const PoolProblem& p) {
  if (p.out_positions() == 0 || p.adaptive()) return PoolPath::add;
  if (pool_goes_in_pairs(p) && pool_pairs_are_cheaper(p)) return PoolPath::pairs;
  if (pool_gather_is_cheaper(p)) return PoolPath::gather;
  const bool apart = pool_windows_are_apart(p) && pool_tabulated_planes(p) == 0;
  return apart ? PoolPath::place : PoolPath::add;
}

// Backward of the average, likewise: the forward's walk with input and output exchanged.
WEFT_HD constexpr PoolPath pool_avg_gradient_path(const PoolProblem& p) {
  if (p.adaptive()) return PoolPath::boxes;
  if (pool_is_global(p)) return PoolPath::planes;
  const PoolPath path = pool_values_path(p);
  if (path == PoolPath::pairs && pool_has_one_divisor(p)) return path;
  if (path == PoolPath::flat && pool_is_symmetric(p)) return path;
  return path == PoolPath::passes ? path : PoolPath::rows;
}

// Whether contiguous maps are pooled a plane in each lane (pool_lanes_cpu.cpp): that saves what a
// row costs at its start, and costs turning all round. Estimates are in half cycles, with vectors
// of 64 bytes; those of lanes hold where the maps between the axes stay in the first-level cache.
// `places`: of a maximum with places.
WEFT_HD constexpr bool pool_takes_lanes(const PoolProblem& p, bool places = false) {
  constexpr int64_t kLeastPlanes = 8, kLongRow = 512, kHeldBytes = 65536, kVector = 64;
  constexpr int64_t kTurn = 16, kTerm = 3, kRow = 180, kLine = 8, kLoad = 2;
  if (p.inner != 1 || p.outer < kLeastPlanes || p.out_positions() <= 1 || p.in_positions() == 0)
    return false;
  const int64_t depth = p.in[0] > p.out[0] ? p.in[0] : p.out[0];
  const int64_t height = p.in[1] > p.out[1] ? p.in[1] : p.out[1];
  const int64_t most_held = p.dtype == DType::f64 ? kHeldBytes / 2 : kHeldBytes;
  if (p.in[2] > kLongRow || depth * height * p.out[2] * kVector > most_held) return false;
  const PoolProblem fixed = pool_with_fixed_windows(p);
  const PoolWindow* window = fixed.window;
  const int64_t lanes = p.dtype == DType::f64 ? 8 : 16;
  const int64_t terms = p.in[0] * p.in[1] * p.out[2] * window[2].size +
                        p.in[0] * p.out[1] * p.out[2] * window[1].size +
                        p.out_positions() * window[0].size;
  const int64_t in_lanes = ceil_div(p.outer, lanes) * (kTurn * p.in_positions() + kTerm * terms);
  if (!places && !fixed.adaptive() && pool_values_path(fixed) == PoolPath::flat)
    return in_lanes < p.outer * p.in_positions() * (kTurn + kTerm * p.window_elements()) / lanes;
  const int64_t doubling = 3 * window[1].stride * pool_doubling_passes(window[1].size);
  const int64_t loads = window[0].size * (window[1].size < doubling ? window[1].size : doubling);
  return in_lanes <
         p.outer * p.out[0] * p.out[1] * (kRow + p.in[2] * (kLine + kLoad * loads) / lanes);
}

// Channels-last maps of a few channels with windows of unequal extents are pooled as planes.
WEFT_HD constexpr bool pool_transposes(const PoolProblem& p) {
  constexpr int64_t kFewChannels = 8;
  return p.inner > 1 && p.inner < kFewChannels && p.out_positions() > 1 && p.in_positions() > 0 &&
         pool_with_fixed_windows(p).adaptive();
}

}  // namespace weft
