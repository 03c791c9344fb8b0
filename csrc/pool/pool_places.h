// The places that the maximum keeps, walked output by output: where each lies in the input.
#pragma once

#include "core/parallel.h"
#include "core/simd.h"
#include "core/small_scratch.h"
#include "pool/pool_plan.h"

namespace weft::WEFT_TARGET {
namespace {

// The flat position of the first place of the windows of output row (od, oh), on the axes D and H;
// negative where that is padding.
WEFT_INLINE int64_t window_row(const PoolProblem& p, int64_t od, int64_t oh) {
  return (p.window[0].first_input(od) * p.in[1] + p.window[1].first_input(oh)) * p.in[2];
}

// Input positions of the windows' places.
class PlaceTable {
 public:
  explicit PlaceTable(const PoolProblem& p)
      : planes_(pool_tabulated_planes(p)),
        offset_(p.window_elements()),
        origin_(planes_ > 0 ? planes_ * p.out_positions() : p.out[2]) {
    int64_t place = 0;
    for (int64_t i = 0; i < p.window[0].size; ++i)
      for (int64_t j = 0; j < p.window[1].size; ++j)
        for (int64_t k = 0; k < p.window[2].size; ++k)
          offset_[place++] =
              (i * p.window[0].dilation * p.in[1] + j * p.window[1].dilation) * p.in[2] +
              k * p.window[2].dilation;
    int64_t* origin = origin_.data();
    for (int64_t r = 0; r < (planes_ > 0 ? planes_ * p.out[0] * p.out[1] : 1); ++r) {
      int64_t row = 0;
      if (planes_ > 0)  // there are outputs then
        row = r / (p.out[0] * p.out[1]) * p.in_positions() +
              window_row(p, r / p.out[1] % p.out[0], r % p.out[1]);
      for (int64_t o = 0; o < p.out[2]; ++o) *origin++ = row + p.window[2].first_input(o);
    }
  }
  // Of each place, relative to the window's first position.
  const int64_t* offsets() const { return offset_.data(); }
  // The windows' first positions, of the outputs of `planes()` planes; if that is 0, of those of a
  // row, from its `window_row`.
  const int64_t* origins() const { return origin_.data(); }
  int64_t planes() const { return planes_; }

 private:
  const int64_t planes_;
  SmallScratch<int64_t, 128> offset_, origin_;
};

// True if some window meets no input at all, which only dilation can cause; its place is void.
bool has_void_windows(const PoolProblem& p) {
  for (int axis = 0; axis < 3; ++axis) {
    if (p.window[axis].dilation == 1) continue;
    for (int64_t o = 0; o < p.out[axis]; ++o) {
      const Range inside = places_inside(p.window[axis], o, p.in[axis]);
      if (inside.begin >= inside.end) return true;
    }
  }
  return false;
}

bool is_void(const PoolProblem& p, const int64_t (&at)[3]) {
  for (int axis = 0; axis < 3; ++axis) {
    const Range inside = places_inside(p.window[axis], at[axis], p.in[axis]);
    if (inside.begin >= inside.end) return true;
  }
  return false;
}

// Planes [begin, end), or channels [c_begin, c_end) of one plane: what a thread owns at a time.
struct Piece {
  int64_t begin, end;
  int64_t c_begin, c_end;

  int64_t width() const { return c_end - c_begin; }
};

// Splits [outer, channels] into pieces: body(piece).
template <class Body>
WEFT_INLINE void parallel_pieces(const PoolProblem& p, const Context& context, const Body& body) {
  constexpr int64_t kChannels = 64;
  const int64_t chunks = ceil_div(p.inner, kChannels);
  const int64_t plane = (p.in_positions() + p.out_positions()) * p.inner / chunks;
  const int64_t planes = pool_tabulated_planes(p);
  const int64_t group = planes > 0 ? planes : 1;
  parallel_for(context, p.outer * chunks, 1 + kPoolGrain / (plane > 0 ? plane : 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; item += group) {
                   const int64_t outer = item / chunks, c = item % chunks * kChannels;
                   body(Piece{outer, item + group < end ? outer + group : outer + (end - item), c,
                              c + kChannels < p.inner ? c + kChannels : p.inner});
                 }
               });
}

// Apart from its callers, whose variables would crowd these out of the registers.
template <class Place, class Visit>
__attribute__((noinline)) void visit_run(const int64_t* origins, const int64_t* offsets,
                                         const Place* places, int64_t count, Visit visit) {
  for (int64_t k = 0; k < count; ++k) visit(k, origins[k] + offsets[places[k]], int64_t{0});
}

// Visits the outputs of a piece in order. `at(output, position)` makes, from an output element and
// a position of the input, what is called with (k, i, c): the maximum of element output + k, of
// channel c, lies at position + i. `at_void(output)` is called for the elements of void windows.
template <class Place, class At, class AtVoid>
WEFT_INLINE void for_each_place(const PoolProblem& p, const PlaceTable& table, bool voids,
                                const Place* places, const Piece& piece, const At& at,
                                const AtVoid& at_void) {
  const int64_t rows = p.out[0] * p.out[1];
  if (!voids && table.planes() > 0) {
    const int64_t output = piece.begin * p.out_positions();
    return visit_run(table.origins(), table.offsets(), places + output,
                     (piece.end - piece.begin) * p.out_positions(),
                     at(output, piece.begin * p.in_positions()));
  }
  for (int64_t outer = piece.begin; outer < piece.end; ++outer) {
    const int64_t plane = outer * p.in_positions();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t od = r / p.out[1], oh = r % p.out[1];
      const int64_t output = (outer * rows + r) * p.out[2] * p.inner;
      const int64_t row = window_row(p, od, oh);
      const auto visit = at(output, plane + row);
      if (!voids && p.inner == 1) {
        visit_run(table.origins(), table.offsets(), places + output, p.out[2], visit);
        continue;
      }
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const int64_t k = ow * p.inner;
        if (voids && is_void(p, {od, oh, ow})) {
          for (int64_t c = piece.c_begin; c < piece.c_end; ++c) at_void(output + k + c);
          continue;
        }
        const int64_t origin = p.window[2].first_input(ow);
        for (int64_t c = piece.c_begin; c < piece.c_end; ++c)
          visit(k + c, origin + table.offsets()[places[output + k + c]], c);
      }
    }
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
