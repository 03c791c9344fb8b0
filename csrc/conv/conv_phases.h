// The phases of a strided input gradient.
//
// Inputs whose padded position leaves the same remainder by the stride are reached by the same
// places of the window, from outputs that follow each other: each phase is a product of stride 1
// without zeros in between. A stride of 1 has one phase, the whole gradient.
#pragma once

#include <algorithm>
#include <numeric>

#include "conv/conv.h"

namespace weft::conv_plan {

// Phases that share a launch; more take another.
constexpr int kMostPhases = 16;

// The inputs of one axis whose padded position leaves `remainder` by the stride.
constexpr int64_t phase_inputs(const Window& w, int64_t extent, int64_t remainder) {
  const int64_t first =
      ceil_div(w.padding - remainder, w.stride) * w.stride + remainder - w.padding;
  return first < extent ? ceil_div(extent - first, w.stride) : 0;
}

// body(remainders, inputs) for each phase of dgrad that has inputs.
template <class Body>
constexpr void for_phases(const ConvProblem& p, const Body& body) {
  const auto inputs = [&](int a, int64_t r) { return phase_inputs(p.window[a], p.in[a], r); };
  for (int64_t d = 0; d < p.window[0].stride; ++d) {
    if (inputs(0, d) == 0) continue;
    for (int64_t h = 0; h < p.window[1].stride; ++h) {
      if (inputs(1, h) == 0) continue;
      for (int64_t w = 0; w < p.window[2].stride; ++w)
        if (inputs(2, w) != 0) body({d, h, w}, p.n * inputs(0, d) * inputs(1, h) * inputs(2, w));
    }
  }
}

// The inputs and places of one axis that meet in a phase.
struct Phase {
  int64_t first_input = 0;  // the first input position ...
  int64_t inputs = 0;       // ... and how many follow, a stride apart each
  int64_t first_place = 0;
  int64_t places = 0;
  int64_t place_step = 1;
  int64_t first_output = 0;  // the output that reads the first input at the first place
  int64_t output_step = 0;   // to the one that reads it at the next place
};

// remainder: of input + padding by the stride.
constexpr Phase phase_of(const Window& w, int64_t extent, int64_t remainder) {
  Phase phase;
  const int64_t first = ceil_div(w.padding - remainder, w.stride);  // of first_input, in strides
  phase.first_input = first * w.stride + remainder - w.padding;
  phase.inputs = phase_inputs(w, extent, remainder);
  phase.place_step = w.stride / std::gcd(w.stride, w.dilation);
  while (phase.first_place < phase.place_step &&
         phase.first_place * w.dilation % w.stride != remainder)
    ++phase.first_place;
  const bool met = phase.first_place < std::min(phase.place_step, w.size);
  phase.places = met ? ceil_div(w.size - phase.first_place, phase.place_step) : 0;
  if (!met) phase.first_place = 0;
  phase.first_output =
      met ? first + (remainder - phase.first_place * w.dilation) / w.stride : int64_t{0};
  phase.output_step = -(phase.place_step * w.dilation / w.stride);
  return phase;
}

}  // namespace weft::conv_plan
