// The windows of pooling: fixed ones, and those of adaptive pooling.
//
// The functions of core/window.h, for both kinds: a kernel that walks windows by them serves both.
// Adaptive windows divide an axis of `from` positions among `to` outputs: output o reads
// [floor(o*from/to), ceil((o+1)*from/to)), so that input i is read by the outputs
// [floor(i*to/from), ceil((i+1)*to/from)): the same formula with the extents exchanged.
#pragma once

#include "core/window.h"

namespace weft {

struct PoolWindow : Window {
  int64_t from = 0;  // extents of an adaptive axis; 0 for fixed windows
  int64_t to = 0;

  // `size` is then the largest window's.
  WEFT_HD constexpr bool adaptive() const { return from > 0; }
  WEFT_HD int64_t first_input(int64_t output) const {
    return adaptive() ? output * from / to : Window::first_input(output);
  }
};

inline PoolWindow adaptive_window(int64_t from, int64_t to) {
  PoolWindow window;
  window.from = from;
  window.to = to;
  if (to == 0) return window;
  const int64_t rest = from % to;
  // Windows start and end off the outputs' grid unless the extents divide.
  window.size = from / to + (rest == 0 ? 0 : to % rest == 0 ? 1 : 2);
  return window;
}

WEFT_HD Range places_inside(const PoolWindow& window, int64_t output, int64_t extent) {
  if (!window.adaptive()) return places_inside(static_cast<const Window&>(window), output, extent);
  return {0, ceil_div((output + 1) * window.from, window.to) - window.first_input(output)};
}

WEFT_HD Range outputs_covering(const PoolWindow& window, int64_t input, int64_t outputs) {
  if (!window.adaptive())
    return outputs_covering(static_cast<const Window&>(window), input, outputs);
  return {input * window.to / window.from, ceil_div((input + 1) * window.to, window.from)};
}

WEFT_HD int64_t place_of(const PoolWindow& window, int64_t input, int64_t output) {
  if (!window.adaptive()) return place_of(static_cast<const Window&>(window), input, output);
  return input - window.first_input(output);
}

}  // namespace weft
