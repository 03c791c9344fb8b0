// One axis of a window walk, and the arithmetic of its output extent.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace weft {

// Output position `o` reads input positions `o * stride - padding + k * dilation`, k in [0, size).
struct Window {
  int64_t size = 1;
  int64_t stride = 1;
  int64_t padding = 0;
  int64_t dilation = 1;

  // Input positions from the first to the last that one window touches.
  constexpr int64_t span() const { return dilation * (size - 1) + 1; }

  WEFT_HD int64_t first_input(int64_t output) const { return output * stride - padding; }

  friend bool operator==(const Window&, const Window&) = default;
};

WEFT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A half-open range of positions.
struct Range {
  int64_t begin;
  int64_t end;
};

// The window places k whose input position lies inside [0, extent).
WEFT_HD Range places_inside(const Window& window, int64_t output, int64_t extent) {
  const int64_t first = window.first_input(output);
  const int64_t begin = first >= 0 ? 0 : ceil_div(-first, window.dilation);
  const int64_t last = extent - first;  // k * dilation < last
  const int64_t end = last <= 0 ? 0 : ceil_div(last, window.dilation);
  return {begin, end < window.size ? end : window.size};
}

// The outputs whose window span covers `input`; with dilation > 1 only some of them read it, see
// `place_of`.
WEFT_HD Range outputs_covering(const Window& window, int64_t input, int64_t outputs) {
  const int64_t padded = input + window.padding;
  const int64_t span = window.dilation * (window.size - 1) + 1;
  const int64_t begin = padded < span ? 0 : (padded - span) / window.stride + 1;
  const int64_t end = padded / window.stride + 1;
  return {begin, end < outputs ? end : outputs};
}

// The place k at which the window of `output` reads `input`, or -1. `output` must come from
// `outputs_covering`.
WEFT_HD int64_t place_of(const Window& window, int64_t input, int64_t output) {
  const int64_t offset = input - window.first_input(output);
  return offset % window.dilation == 0 ? offset / window.dilation : -1;
}

}  // namespace weft
