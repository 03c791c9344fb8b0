// What a target of a pooling's gather reads on one axis, in 32 bits: forward, and inverted.
//
// The functions of pool_window.h, for problems whose extents fit, so that a GPU thread divides
// 32-bit numbers; as tables of a tile need them: positions [begin, end), empty where there is none.
#pragma once

#include <algorithm>

#include "pool/pool.h"

namespace weft {

// The sources of one target on one axis: positions [begin, end).
struct Reach {
  int begin;
  int end;
  int place;  // forward: the window's place at `begin`
  int count;  // forward: the axis' factor of the divisor
};

struct PoolAxis {
  int in = 1;
  int out = 1;
  int size = 1;
  int stride = 1;
  int padding = 0;
  int dilation = 1;
  bool adaptive = false;
  bool count_include_pad = true;

  WEFT_HD int span() const { return dilation * (size - 1) + 1; }
  WEFT_HD int first_input(int output) const {
    return adaptive ? static_cast<int>(static_cast<unsigned>(output) * static_cast<unsigned>(in) /
                                       static_cast<unsigned>(out))
                    : output * stride - padding;
  }
};

WEFT_HD Reach adaptive_reach(int target, int sources, int targets) {
  const auto from = static_cast<unsigned>(sources);
  const auto to = static_cast<unsigned>(targets);
  const auto at = static_cast<unsigned>(target);
  const int begin = static_cast<int>(at * from / to);
  const int end = static_cast<int>(((at + 1) * from + to - 1) / to);
  return {begin, end, 0, end - begin};
}

WEFT_HD Reach forward_reach(const PoolAxis& axis, int output) {
  if (axis.adaptive) return adaptive_reach(output, axis.in, axis.out);
  const int first = axis.first_input(output);
  const int skipped = first >= 0 ? 0 : (-first + axis.dilation - 1) / axis.dilation;
  const int left = axis.in - first;
  int places = left <= 0 ? 0 : (left + axis.dilation - 1) / axis.dilation;
  if (places > axis.size) places = axis.size;
  // With ceil_mode a window may run past the padding; that part never counts.
  const int limit = axis.in + (axis.count_include_pad ? axis.padding : 0);
  const int last = first + axis.size < limit ? first + axis.size : limit;
  const int count = last - (first < 0 && !axis.count_include_pad ? 0 : first);
  if (places <= skipped) return {0, 0, skipped, count};
  return {first + skipped * axis.dilation, first + (places - 1) * axis.dilation + 1, skipped,
          count};
}

WEFT_HD Reach inverse_reach(const PoolAxis& axis, int input) {
  if (axis.adaptive) return adaptive_reach(input, axis.out, axis.in);
  const int padded = input + axis.padding;
  const int begin = padded < axis.span() ? 0 : (padded - axis.span()) / axis.stride + 1;
  int end = padded / axis.stride + 1;
  if (end > axis.out) end = axis.out;
  return begin < end ? Reach{begin, end, 0, 0} : Reach{0, 0, 0, 0};
}

// The source positions of targets [first, first + count): where they begin, and how many.
struct Hull {
  int begin;
  int size;
};

WEFT_HD Hull hull_of(const PoolAxis& axis, bool inverse, int first, int count) {
  const int last = first + count - 1;
  const int extent = inverse ? axis.out : axis.in;
  int begin;
  int end;
  if (axis.adaptive) {
    const int targets = inverse ? axis.in : axis.out;
    begin = adaptive_reach(first, extent, targets).begin;
    end = adaptive_reach(last, extent, targets).end;
  } else if (inverse) {
    const int padded = first + axis.padding;
    begin = padded < axis.span() ? 0 : (padded - axis.span()) / axis.stride + 1;
    end = (last + axis.padding) / axis.stride + 1;
  } else {
    begin = axis.first_input(first);
    end = axis.first_input(last) + axis.span();
  }
  begin = begin < 0 ? 0 : begin > extent ? extent : begin;
  end = end > extent ? extent : end < begin ? begin : end;
  return {begin, end - begin};
}

// The largest hull of `count` targets.
inline int64_t largest_hull(const PoolAxis& axis, bool inverse, int64_t count) {
  const int64_t sources = inverse ? axis.out : axis.in;
  const int64_t targets = inverse ? axis.in : axis.out;
  if (count >= targets) return sources;
  int64_t size;
  if (axis.adaptive)
    size = ceil_div(count * sources, targets) + (sources % targets == 0 ? 0 : 1);
  else if (inverse)
    size = ceil_div(count - 1 + axis.span(), axis.stride);
  else
    size = (count - 1) * axis.stride + axis.span();
  return std::min(size, sources);
}

inline PoolAxis axis_of(const PoolProblem& p, int a) {
  const PoolWindow& w = p.window[a];
  PoolAxis axis;
  axis.in = static_cast<int>(p.in[a]);
  axis.out = static_cast<int>(p.out[a]);
  axis.size = static_cast<int>(w.size);
  axis.stride = static_cast<int>(w.stride);
  axis.padding = static_cast<int>(w.padding);
  axis.dilation = static_cast<int>(w.dilation);
  axis.adaptive = w.adaptive();
  axis.count_include_pad = p.count_include_pad;
  return axis;
}

}  // namespace weft
