// Pooling on CPU: the two row passes of pool_rows.h, with maximum or sum as the reduction.
//
// Forward: threads own runs of output rows. Bound: bytes; a 3x3 window costs about as many vector
// operations as the copy it is measured against has bytes to wait for.
// Maximum, backward: each input row gathers from the output rows that cover it, by vector compares
// of places; its cost grows with the window's elements, so beyond 32 a thread owns whole planes and
// adds each output's gradient at its place in order, one owner per plane keeping the bits (adding
// lost by 3 to 5 times on 2x2 and 3x3).
// Average, backward: the forward's passes with input and output exchanged: outputs' rows are
// divided and summed over the rows that cover an input row, then spread over the window's W axis.
#include <limits>

#include "core/parallel.h"
#include "pool/pool_adaptive.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kBlock = 4;  // vectors of accumulators that a pass keeps in registers

struct Maximum {
  template <class V>
  static WEFT_INLINE V reduce(V best, V value) {
    const V larger = value > best ? value : best;
    return value == value ? larger : value;  // NaN stays
  }
};

struct Sum {
  template <class V>
  static WEFT_INLINE V reduce(V sum, V value) {
    return sum + value;
  }
};

// Calls emit(j, reduce_k source(k)[j ...]) for each vector of [0, round_up(n, lanes)); count > 0.
template <class Op, class T, class Source, class Emit>
WEFT_INLINE void reduce_rows(int64_t count, int64_t n, const Source& source, const Emit& emit) {
  using A = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  int64_t j = 0;
  for (; j + kBlock * kLane <= n; j += kBlock * kLane) {
    Vec<A> sum[kBlock];
    const T* first = source(0) + j;
    for (int b = 0; b < kBlock; ++b) sum[b] = load_vec(first + b * kLane);
    for (int64_t k = 1; k < count; ++k) {
      const T* next = source(k) + j;
      for (int b = 0; b < kBlock; ++b) sum[b] = Op::reduce(sum[b], load_vec(next + b * kLane));
    }
    for (int b = 0; b < kBlock; ++b) emit(j + b * kLane, sum[b]);
  }
  for (; j < n; j += kLane) {
    Vec<A> sum = load_vec(source(0) + j);
    for (int64_t k = 1; k < count; ++k) sum = Op::reduce(sum, load_vec(source(k) + j));
    emit(j, sum);
  }
}

template <class T, class V>
WEFT_INLINE void store_row(T* row, int64_t j, int64_t n, V value) {
  if (j + kLanes<T> <= n) {
    store_vec(row + j, value);
  } else {
    store_part(row + j, value, static_cast<int>(n - j));
  }
}

// Walks output rows [begin, end) of [outer, D, H]. For each one `first_pass(x_row, slot)` has run
// on every row of its windows, then second_pass(output row index, od, oh, rows) runs.
template <class T, class First, class Second>
WEFT_INLINE void walk_rows(const PoolProblem& p, const T* x, int64_t begin, int64_t end,
                           const First& first_pass, const Second& second_pass) {
  WindowRows rows(p);
  const int64_t row_elements = p.in[2] * p.inner;
  Scratch<int64_t> held(WindowRows::ring_rows(p));  // which input row each slot holds
  fill(held.data(), WindowRows::ring_rows(p), int64_t{-1});
  for (int64_t index = begin; index < end; ++index) {
    const int64_t oh = index % p.out[1];
    const int64_t od = index / p.out[1] % p.out[0];
    const int64_t outer = index / (p.out[1] * p.out[0]);
    rows.select(p, od, oh);
    for (int64_t k = 0; k < rows.count; ++k) {
      const int64_t row = outer * p.in[0] * p.in[1] + rows.row[k];
      if (held[rows.slot[k]] == row) continue;
      first_pass(x + row * row_elements, rows.slot[k]);
      held[rows.slot[k]] = row;
    }
    second_pass(index, od, oh, rows);
  }
}

// out[w] = phase (w + padding) % stride at (w + padding) / stride.
template <class T, class A>
void merge_phases(const A* phases, int64_t pitch, const Window& window, int64_t inner,
                  int64_t positions, T* out) {
  const int64_t stride = window.stride;
  int64_t w = 0;
  if (stride == 1) {
    const A* row = phases + window.padding * inner;
    for (int64_t j = 0; j < positions * inner; j += kLanes<T>)
      store_row(out, j, positions * inner, load_vec(row + j));
    return;
  }
  if (stride == 2 && inner == 1) {
    if (window.padding % 2 == 1 && positions > 0) {
      out[w++] = narrow<T>(phases[pitch + window.padding / 2]);
    }
    for (int64_t i = (w + window.padding) / 2; w + 2 * kLanes<T> <= positions;
         w += 2 * kLanes<T>, i += kLanes<T>) {
      Vec<A> low, high;
      interleave(load_vec(phases + i), load_vec(phases + pitch + i), low, high);
      store_vec(out + w, low);
      store_vec(out + w + kLanes<T>, high);
    }
  }
  for (; w < positions; ++w) {
    const int64_t t = w + window.padding;
    const A* from = phases + t % stride * pitch + t / stride * inner;
    for (int64_t j = 0; j < inner; j += kLanes<T>) {
      if (inner < kLanes<T>) {
        for (int64_t c = 0; c < inner; ++c) out[w * inner + c] = narrow<T>(from[c]);
      } else {
        store_row(out + w * inner, j, inner, load_vec(from + j));
      }
    }
  }
}

// The first pass over one row: out[i*inner + c] = reduce over the window's places s of the row at
// i*stride - padding + s*dilation. Rows of pixels as wide as a vector are read where they are.
template <class Op, class T>
void reduce_along_row(const PoolProblem& p, PhaseRow<T>& phases, const T* row,
                      accumulate_t<T> padding_value, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  const Window& window = p.window[2];
  const int64_t n = p.out[2] * p.inner;
  if (p.inner % kLanes<T> != 0) {
    phases.split(row);
    reduce_rows<Op, A>(
        window.size, n, [&](int64_t s) { return phases.place(s); },
        [&](int64_t j, Vec<A> value) { store_vec(out + j, value); });
    return;
  }
  const int64_t step = window.dilation * p.inner;
  for (int64_t i = 0; i < p.out[2]; ++i) {
    const Range places = places_inside(window, i, p.in[2]);
    A* pixel = out + i * p.inner;
    if (places.begin >= places.end) {
      fill(pixel, p.inner, padding_value);
      continue;
    }
    const T* first = row + (window.first_input(i) + places.begin * window.dilation) * p.inner;
    reduce_rows<Op, T>(
        places.end - places.begin, p.inner, [&](int64_t s) { return first + s * step; },
        [&](int64_t c, Vec<A> value) { store_vec(pixel + c, value); });
  }
}

// ---- maximum ---------------------------------------------------------------------------------

template <class T>
void max_values(const PoolProblem& p, const T* x, T* y, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  const int64_t n = p.out[2] * p.inner;
  const int64_t pitch = round_up(n, kLanes<T>);
  PhaseRow<T> phases(p.window[2], p.in[2], p.out[2], p.inner, kLowest);
  Scratch<A> ring(WindowRows::ring_rows(p) * pitch);
  walk_rows(
      p, x, begin, end,
      [&](const T* row, int64_t slot) {
        reduce_along_row<Maximum>(p, phases, row, kLowest, ring.data() + slot * pitch);
      },
      [&](int64_t index, int64_t, int64_t, const WindowRows& rows) {
        T* out = y + index * n;
        if (rows.count == 0) return fill(out, n, narrow<T>(kLowest));
        reduce_rows<Maximum, A>(
            rows.count, n, [&](int64_t k) { return ring.data() + rows.slot[k] * pitch; },
            [&](int64_t j, Vec<A> value) { store_row(out, j, n, value); });
      });
}

template <class Place, class I>
WEFT_INLINE void store_places(Place* row, int64_t j, int64_t n, Vec<I> code) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(I));
  using Narrow = typename vector_of<Place, kCount>::type;
  const Narrow places = __builtin_convertvector(code, Narrow);
  const int64_t left = n - j;
  memcpy(row + j, &places, (left < kCount ? left : kCount) * sizeof(Place));
}

// The larger of two candidates and its code; the first of equal ones, the last NaN.
template <class V, class C>
WEFT_INLINE void take_larger(V& best, C& code, V value, C value_code) {
  const auto replace = (value > best) | (value != value);
  best = replace ? value : best;
  code = replace ? value_code : code;
}

template <class T, class Place>
void max_values_and_places(const PoolProblem& p, const T* x, T* y, Place* places, int64_t begin,
                           int64_t end) {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  const int64_t n = p.out[2] * p.inner;
  const int64_t pitch = round_up(n, kLanes<T>);
  const int64_t size_w = p.window[2].size;
  PhaseRow<T> phases(p.window[2], p.in[2], p.out[2], p.inner, kLowest);
  Scratch<A> ring(WindowRows::ring_rows(p) * pitch);
  Scratch<I> ring_codes(WindowRows::ring_rows(p) * pitch);
  // A window without anything above -inf keeps its first place that is not padding.
  Scratch<I> first_place(pitch);
  fill(first_place.data(), pitch, I{0});
  for (int64_t j = 0; j < n; ++j)
    first_place[j] = static_cast<I>(places_inside(p.window[2], j / p.inner, p.in[2]).begin);

  walk_rows(
      p, x, begin, end,
      [&](const T* row, int64_t slot) {
        phases.split(row);
        A* out = ring.data() + slot * pitch;
        I* out_codes = ring_codes.data() + slot * pitch;
        for (int64_t j = 0; j < n; j += kLanes<T>) {
          Vec<A> best = broadcast<Vec<A>>(kLowest);
          auto code = detail::load_bits<I, kLanes<T>>(first_place.data() + j);
          for (int64_t s = 0; s < size_w; ++s)
            take_larger(best, code, load_vec(phases.place(s) + j),
                        broadcast<Vec<I>>(static_cast<I>(s)));
          store_vec(out + j, best);
          memcpy(out_codes + j, &code, sizeof(code));
        }
      },
      [&](int64_t index, int64_t, int64_t, const WindowRows& rows) {
        for (int64_t j = 0; j < n; j += kLanes<T>) {
          Vec<A> best = broadcast<Vec<A>>(kLowest);
          Vec<I> code = {};
          for (int64_t k = 0; k < rows.count; ++k) {
            const int64_t at = rows.slot[k] * pitch + j;
            const auto value = load_vec(ring.data() + at);
            const auto value_code = detail::load_bits<I, kLanes<T>>(ring_codes.data() + at) +
                                    static_cast<I>(rows.place[k] * size_w);
            if (k == 0) {
              best = value;
              code = value_code;
            } else {
              take_larger(best, code, value, value_code);
            }
          }
          store_row(y + index * n, j, n, best);
          store_places<Place, I>(places + index * n, j, n, code);
        }
      });
}

// Calls `body(Place{})` with the integer that holds a place.
template <class Body>
WEFT_INLINE void dispatch_place(const PoolProblem& p, const Body& body) {
  if (p.place_bytes() == 1) return body(uint8_t{});
  return body(int32_t{});
}

// Output rows below which a thread is not worth waking: about 32 thousand elements of work.
int64_t row_grain(const PoolProblem& p) {
  const int64_t work = (p.in[2] + p.out[2]) * p.inner * p.window[1].stride;
  return 1 + 32768 / (work > 0 ? work : 1);
}

// The same for `rows` rows of adaptive pooling, of input or output.
int64_t adaptive_grain(const PoolProblem& p, int64_t rows) {
  return 1 + 32768 / (1 + (p.in_elements() + p.out_elements()) / rows);
}

void max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* input = static_cast<const T*>(x);
    auto* output = static_cast<T*>(y);
    const int64_t rows = p.outer * p.out[0] * p.out[1];
    if (p.adaptive()) {
      dispatch_place(p, [&](auto place) {
        auto* kept = static_cast<decltype(place)*>(places);
        parallel_for(context, rows, adaptive_grain(p, rows), [&](int64_t begin, int64_t end) {
          adaptive_max_values(p, input, output, kept, begin, end);
        });
      });
      return;
    }
    if (places == nullptr) {
      parallel_for(context, rows, row_grain(p),
                   [&](int64_t begin, int64_t end) { max_values(p, input, output, begin, end); });
      return;
    }
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      parallel_for(context, rows, row_grain(p), [&](int64_t begin, int64_t end) {
        max_values_and_places(p, input, output, static_cast<Place*>(places), begin, end);
      });
    });
  });
}

// Input rows [begin, end) of [outer, D, H], for small windows. The gradient of padded position
// t = w + padding is the sum, over the output rows r that cover its row and the window places s of
// phase t % stride, of gy[r] at t / stride - offset(s) where the place kept there is (r, s): a
// masked sum of unit-stride rows.
template <class T, class Place>
void max_gather_gradients(const PoolProblem& p, const T* gy, const Place* places, T* gx,
                          int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  const Window& window = p.window[2];
  const int64_t inner = p.inner;
  const int64_t n = p.out[2] * inner;
  const int64_t margin = window.dilation * (window.size - 1) / window.stride * inner;
  const int64_t phase_positions = ceil_div(p.in[2] + window.padding, window.stride);
  const int64_t phase_pitch = round_up(phase_positions * inner, kLanes<T>) + kLanes<T>;
  Scratch<A> phases(phase_pitch * window.stride);

  // The covering output rows, widened once, with nothing (place -1) before and after them.
  const int64_t height = (p.window[1].span() - 1) / p.window[1].stride + 1;
  const int64_t depth = (p.window[0].span() - 1) / p.window[0].stride + 1;
  const int64_t pitch = margin + phase_pitch + round_up(n, kLanes<T>) + kLanes<T>;
  Scratch<A> grads(depth * height * pitch);
  Scratch<I> codes(depth * height * pitch);
  Scratch<int64_t> held(depth * height);
  fill(grads.data(), depth * height * pitch, A{0});
  fill(codes.data(), depth * height * pitch, I{-1});
  fill(held.data(), depth * height, int64_t{-1});

  struct Cover {
    int64_t at;    // element of grads and codes that belongs to output 0
    int64_t code;  // of the window's place (i, j, 0)
  };
  struct Term {  // adds grads[at + x] where codes[at + x] == code
    int64_t at;
    int64_t code;
  };
  Scratch<Cover> covers(depth * height);
  Scratch<Term> terms(depth * height * window.size);

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % p.in[1];
    const int64_t d = index / p.in[1] % p.in[0];
    const int64_t outer = index / (p.in[1] * p.in[0]);
    const Range ds = outputs_covering(p.window[0], d, p.out[0]);
    const Range hs = outputs_covering(p.window[1], h, p.out[1]);
    int64_t count = 0;
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const int64_t i = place_of(p.window[0], d, od);
        const int64_t j = place_of(p.window[1], h, oh);
        if (i < 0 || j < 0) continue;
        const int64_t slot = od % depth * height + oh % height;
        const int64_t row = (outer * p.out[0] + od) * p.out[1] + oh;
        const int64_t at = slot * pitch + margin;
        if (held[slot] != row) {
          held[slot] = row;
          widen_row(gy + row * n, n, grads.data() + at);
          for (int64_t k = 0; k < n; ++k) codes[at + k] = static_cast<I>(places[row * n + k]);
        }
        covers[count++] = {at, (i * p.window[1].size + j) * window.size};
      }
    for (int64_t q = 0; q < window.stride; ++q) {
      int64_t term_count = 0;
      for (int64_t k = 0; k < count; ++k)
        for (int64_t s = 0; s < window.size; ++s) {
          const int64_t offset = s * window.dilation;
          if (offset % window.stride == q)
            terms[term_count++] = {covers[k].at - offset / window.stride * inner,
                                   covers[k].code + s};
        }
      A* phase = phases.data() + q * phase_pitch;
      const auto sum_terms = [&](int64_t x, auto block) {
        constexpr int kVectors = decltype(block)::value;
        Vec<A> sum[kVectors] = {};
        for (int64_t k = 0; k < term_count; ++k) {
          const auto code = broadcast<Vec<I>>(static_cast<I>(terms[k].code));
          for (int v = 0; v < kVectors; ++v) {
            const int64_t at = terms[k].at + x + v * kLanes<T>;
            const auto mine = detail::load_bits<I, kLanes<T>>(codes.data() + at) == code;
            sum[v] += mine ? load_vec(grads.data() + at) : Vec<A>{};
          }
        }
        for (int v = 0; v < kVectors; ++v) store_vec(phase + x + v * kLanes<T>, sum[v]);
      };
      int64_t x = 0;
      for (; x + kBlock * kLanes<T> <= phase_positions * inner; x += kBlock * kLanes<T>)
        sum_terms(x, std::integral_constant<int, kBlock>{});
      for (; x < phase_positions * inner; x += kLanes<T>)
        sum_terms(x, std::integral_constant<int, 1>{});
    }
    merge_phases(phases.data(), phase_pitch, window, inner, p.in[2], gx + index * p.in[2] * inner);
  }
}

// The input position of a window's place, relative to the window's first position, for places in
// order; and whether it can lie outside the map.
class PlaceTable {
 public:
  explicit PlaceTable(const PoolProblem& p) : offset_(p.window_elements()) {
    int64_t place = 0;
    for (int64_t i = 0; i < p.window[0].size; ++i)
      for (int64_t j = 0; j < p.window[1].size; ++j)
        for (int64_t k = 0; k < p.window[2].size; ++k)
          offset_[place++] =
              (i * p.window[0].dilation * p.in[1] + j * p.window[1].dilation) * p.in[2] +
              k * p.window[2].dilation;
  }
  int64_t offset(int64_t place) const { return offset_[place]; }

 private:
  Scratch<int64_t> offset_;
};

// The flat position of the first place of the windows of output row (od, oh), on the axes D and H;
// negative where that is padding.
WEFT_INLINE int64_t window_row(const PoolProblem& p, int64_t od, int64_t oh) {
  return (p.window[0].first_input(od) * p.in[1] + p.window[1].first_input(oh)) * p.in[2];
}

// True if some window meets no input at all, which only dilation can cause; its place is void.
bool has_void_windows(const PoolProblem& p) {
  for (int axis = 0; axis < 3; ++axis)
    for (int64_t o = 0; o < p.out[axis]; ++o) {
      const Range inside = places_inside(p.window[axis], o, p.in[axis]);
      if (inside.begin >= inside.end) return true;
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

// Calls body(output element, input position, c) for the outputs of plane `outer` and channels
// [c_begin, c_end), in order; the position counts from the first plane's and is -1 for void
// windows.
template <class Place, class Body>
WEFT_INLINE void for_each_place(const PoolProblem& p, const PlaceTable& table, bool voids,
                                const Place* places, int64_t outer, int64_t c_begin, int64_t c_end,
                                const Body& body) {
  const int64_t plane = outer * p.in_positions();
  int64_t position = outer * p.out_positions();
  for (int64_t od = 0; od < p.out[0]; ++od)
    for (int64_t oh = 0; oh < p.out[1]; ++oh) {
      const int64_t row = plane + window_row(p, od, oh);
      for (int64_t ow = 0; ow < p.out[2]; ++ow, ++position) {
        if (voids && is_void(p, {od, oh, ow})) {
          for (int64_t c = c_begin; c < c_end; ++c) body(position * p.inner + c, int64_t{-1}, c);
          continue;
        }
        const int64_t origin = row + p.window[2].first_input(ow);
        for (int64_t c = c_begin; c < c_end; ++c) {
          const int64_t output = position * p.inner + c;
          body(output, origin + table.offset(places[output]), c);
        }
      }
    }
}

// Splits [outer, channels] into pieces that one thread owns: body(outer, c_begin, c_end).
template <class Body>
WEFT_INLINE void parallel_planes(const PoolProblem& p, const Context& context, const Body& body) {
  constexpr int64_t kChannels = 64;
  const int64_t chunks = ceil_div(p.inner, kChannels);
  const int64_t work = (p.in_positions() + p.out_positions()) * p.inner / chunks;
  parallel_for(context, p.outer * chunks, 1 + 32768 / (work > 0 ? work : 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t c = item % chunks * kChannels;
                   body(item / chunks, c, c + kChannels < p.inner ? c + kChannels : p.inner);
                 }
               });
}

// One plane and channels [c_begin, c_end), for large windows: adds each output's gradient at its
// place, in order.
template <class T, class Place>
void max_scatter_gradients(const PoolProblem& p, const PlaceTable& table, bool voids, const T* gy,
                           const Place* places, T* gx, int64_t outer, int64_t c_begin,
                           int64_t c_end) {
  using A = accumulate_t<T>;
  const int64_t width = c_end - c_begin;
  const int64_t base = outer * p.in_positions();
  Scratch<A> sum(p.in_positions() * width);  // halves add up in float
  fill(sum.data(), p.in_positions() * width, A{0});
  for_each_place(p, table, voids, places, outer, c_begin, c_end,
                 [&](int64_t output, int64_t position, int64_t c) {
                   if (voids && position < 0) return;
                   sum[(position - base) * width + c - c_begin] += widen(gy[output]);
                 });
  if (width == p.inner) {
    T* out = gx + base * p.inner;
    const int64_t n = p.in_positions() * width;
    for (int64_t j = 0; j < n; j += kLanes<T>) store_row(out, j, n, load_vec(sum.data() + j));
    return;
  }
  for (int64_t i = 0; i < p.in_positions(); ++i)
    for (int64_t c = 0; c < width; ++c)
      gx[(base + i) * p.inner + c_begin + c] = narrow<T>(sum[i * width + c]);
}

void max_backward(const PoolProblem& p, const void* gy, const void* places, void* gx,
                  const Context& context) {
  constexpr int64_t kSmallWindow = 32;  // elements up to which gathering is faster than adding
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* grad = static_cast<const T*>(gy);
    auto* out = static_cast<T*>(gx);
    dispatch_place(p, [&](auto place) {
      const auto* kept = static_cast<const decltype(place)*>(places);
      if (p.window_elements() <= kSmallWindow && !p.adaptive()) {
        parallel_for(context, p.outer * p.in[0] * p.in[1], row_grain(p),
                     [&](int64_t begin, int64_t end) {
                       max_gather_gradients(p, grad, kept, out, begin, end);
                     });
        return;
      }
      const PlaceTable table(p);
      const bool voids = has_void_windows(p);
      parallel_planes(p, context, [&](int64_t outer, int64_t c_begin, int64_t c_end) {
        max_scatter_gradients(p, table, voids, grad, kept, out, outer, c_begin, c_end);
      });
    });
  });
}

void max_pick(const PoolProblem& p, const void* x, const void* places, void* y,
              const Context& context) {
  const PlaceTable table(p);
  const bool voids = has_void_windows(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* input_values = static_cast<const T*>(x);
    auto* out = static_cast<T*>(y);
    dispatch_place(p, [&](auto place) {
      const auto* kept = static_cast<const decltype(place)*>(places);
      parallel_planes(p, context, [&](int64_t outer, int64_t c_begin, int64_t c_end) {
        for_each_place(p, table, voids, kept, outer, c_begin, c_end,
                       [&](int64_t output, int64_t position, int64_t c) {
                         out[output] = position < 0 ? T{} : input_values[position * p.inner + c];
                       });
      });
    });
  });
}

void max_indices(const PoolProblem& p, const void* places, int64_t* indices,
                 const Context& context) {
  const PlaceTable table(p);
  const bool voids = has_void_windows(p);
  dispatch_place(p, [&](auto place) {
    const auto* kept = static_cast<const decltype(place)*>(places);
    parallel_planes(p, context, [&](int64_t outer, int64_t c_begin, int64_t c_end) {
      const int64_t base = outer * p.in_positions();
      for_each_place(p, table, voids, kept, outer, c_begin, c_end,
                     [&](int64_t output, int64_t position, int64_t) {
                       indices[output] = position < 0 ? 0 : position - base;
                     });
    });
  });
}

// ---- average ---------------------------------------------------------------------------------

// The divisors of one output row, recomputed only where the row's own count changes.
template <class A>
class Divisors {
 public:
  Divisors(const PoolProblem& p, int64_t pitch) : p_(p), values_(pitch) {
    fill(values_.data(), pitch, A{1});
  }
  const A* row(int64_t od, int64_t oh) {
    const int64_t middle = pool_divisor(p_, od, oh, p_.out[2] / 2);
    if (middle != middle_) {
      middle_ = middle;
      for (int64_t w = 0, j = 0; w < p_.out[2]; ++w) {
        const A divisor = static_cast<A>(pool_divisor(p_, od, oh, w));
        for (int64_t c = 0; c < p_.inner; ++c) values_[j++] = divisor;
      }
    }
    return values_.data();
  }

 private:
  const PoolProblem& p_;
  Scratch<A> values_;
  int64_t middle_ = 0;
};

template <class T>
void avg_values(const PoolProblem& p, const T* x, T* y, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t n = p.out[2] * p.inner;
  const int64_t pitch = round_up(n, kLanes<T>);
  PhaseRow<T> phases(p.window[2], p.in[2], p.out[2], p.inner, A{0});
  Scratch<A> ring(WindowRows::ring_rows(p) * pitch);
  Divisors<A> divisors(p, pitch);
  walk_rows(
      p, x, begin, end,
      [&](const T* row, int64_t slot) {
        reduce_along_row<Sum>(p, phases, row, A{0}, ring.data() + slot * pitch);
      },
      [&](int64_t index, int64_t od, int64_t oh, const WindowRows& rows) {
        const A* divisor = divisors.row(od, oh);
        reduce_rows<Sum, A>(
            rows.count, n, [&](int64_t k) { return ring.data() + rows.slot[k] * pitch; },
            [&](int64_t j, Vec<A> value) {
              store_row(y + index * n, j, n, value / load_vec(divisor + j));
            });
      });
}

void avg_forward(const PoolProblem& p, const void* x, void* y, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.adaptive()) {
      const int64_t rows = p.outer * p.out[0] * p.out[1];
      parallel_for(context, rows, adaptive_grain(p, rows), [&](int64_t begin, int64_t end) {
        adaptive_avg_values(p, static_cast<const T*>(x), static_cast<T*>(y), begin, end);
      });
      return;
    }
    parallel_for(context, p.outer * p.out[0] * p.out[1], row_grain(p),
                 [&](int64_t begin, int64_t end) {
                   avg_values(p, static_cast<const T*>(x), static_cast<T*>(y), begin, end);
                 });
  });
}

// Input rows [begin, end) of [outer, D, H]. The gradient of padded position t = w + padding is the
// sum over the window places s of phase t % stride of the row-summed gradient at
// t / stride - s / stride, so each phase of gx is again a sum of unit-stride rows.
template <class T>
void avg_gradients(const PoolProblem& p, const T* gy, T* gx, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Window& window = p.window[2];
  const int64_t inner = p.inner;
  const int64_t n = p.out[2] * inner;
  const int64_t pitch = round_up(n, kLanes<T>);
  const int64_t margin = (window.size - 1) / window.stride;  // places before output 0
  const int64_t phase_positions = ceil_div(p.in[2] + window.padding, window.stride);
  const int64_t phase_pitch = round_up(phase_positions * inner, kLanes<T>) + kLanes<T>;
  const int64_t sum_elements = (margin + phase_positions + p.out[2]) * inner + 2 * kLanes<T>;
  Scratch<A> summed(sum_elements);  // over the covering output rows, zeros around it
  fill(summed.data(), sum_elements, A{0});
  A* sum = summed.data() + margin * inner;
  Scratch<A> phases(phase_pitch * window.stride);
  Divisors<A> divisors(p, pitch);

  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % p.in[1];
    const int64_t d = index / p.in[1] % p.in[0];
    const int64_t outer = index / (p.in[1] * p.in[0]);
    const Range ds = outputs_covering(p.window[0], d, p.out[0]);
    const Range hs = outputs_covering(p.window[1], h, p.out[1]);
    fill(sum, n, A{0});
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const T* row = gy + ((outer * p.out[0] + od) * p.out[1] + oh) * n;
        const A* divisor = divisors.row(od, oh);
        int64_t j = 0;
        for (; j + kLanes<T> <= n; j += kLanes<T>)
          store_vec(sum + j, load_vec(sum + j) + load_vec(row + j) / load_vec(divisor + j));
        for (; j < n; ++j) sum[j] += widen(row[j]) / divisor[j];
      }
    T* out = gx + index * p.in[2] * inner;
    for (int64_t q = 0; q < window.stride; ++q) {
      A* phase = phases.data() + q * phase_pitch;
      const int64_t places = q < window.size ? (window.size - 1 - q) / window.stride + 1 : 0;
      if (places == 0) {
        fill(phase, phase_positions * inner, A{0});
        continue;
      }
      reduce_rows<Sum, A>(
          places, phase_positions * inner, [&](int64_t k) { return sum - k * inner; },
          [&](int64_t j, Vec<A> value) { store_vec(phase + j, value); });
    }
    merge_phases(phases.data(), phase_pitch, window, inner, p.in[2], out);
  }
}

void avg_backward(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.adaptive()) {
      const int64_t rows = p.outer * p.in[0] * p.in[1];
      parallel_for(context, rows, adaptive_grain(p, rows), [&](int64_t begin, int64_t end) {
        adaptive_avg_gradients(p, static_cast<const T*>(gy), static_cast<T*>(gx), begin, end);
      });
      return;
    }
    parallel_for(context, p.outer * p.in[0] * p.in[1], row_grain(p),
                 [&](int64_t begin, int64_t end) {
                   avg_gradients(p, static_cast<const T*>(gy), static_cast<T*>(gx), begin, end);
                 });
  });
}

}  // namespace

const PoolKernels pool_kernels = {max_forward, max_backward, max_pick,
                                  max_indices, avg_forward,  avg_backward};

}  // namespace weft::WEFT_TARGET
