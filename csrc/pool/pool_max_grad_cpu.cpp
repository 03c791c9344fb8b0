// Maximum pooling on CPU: backward, its transpose, and the indices that torch returns.
//
// Small windows of stride 2 along contiguous rows gather by vectors (pool_pairs_grad.h). Otherwise
// three ways, the cheapest by count (pool_max_gradient_path). Each output's gradient is added at
// its place, in order; a thread owns whole planes, which keeps the bits. Or, where windows do not
// overlap, it is put there, row of outputs by row of outputs, in a band of input rows that is
// cleared before. Or each input row gathers from the output rows that cover it, by vector compares
// of places, which is for small windows of many channels: the cost grows with the window's
// elements, and with the rows.
// Bound: bytes; clearing and writing gx. Lost: finding the terms of a gather by division, once a
// row (a third of its time on 3x3); putting by input rows, which meet each output once a window's
// row; planes of few positions turned round to channels and back, three times what adding costs.
#include <limits>

#include "pool/pool_cpu.h"
#include "pool/pool_lines.h"
#include "pool/pool_pairs_grad.h"
#include "pool/pool_places.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

// out[w] = phase (w + padding) % stride at (w + padding) / stride.
template <class T, class A>
void merge_phases(const A* phases, int64_t pitch, const Window& window, int64_t inner,
                  int64_t positions, T* out) {
  const int64_t stride = window.stride;
  if (stride == 1) {
    const A* row = phases + window.padding * inner;
    for (int64_t j = 0; j < positions * inner; j += kLanes<T>)
      store_row<SumOf<T>>(out, j, positions * inner, load_vec(row + j));
    return;
  }
  int64_t phase = window.padding % stride;
  const A* from = phases + phase * pitch + window.padding / stride * inner;
  int64_t w = 0;
  if (stride == 2 && inner == 1 && positions > 0) {
    const A* even = phases + (window.padding + 1) / 2;
    if (phase == 1) out[w++] = narrow<T>(*from);
    for (; w < positions; w += 2 * kLanes<T>, even += kLanes<T>) {
      Vec<A> low, high;
      interleave(load_vec(even), load_vec(even + pitch), low, high);
      store_row<SumOf<T>>(out, w, positions, low);
      if (w + kLanes<T> < positions) store_row<SumOf<T>>(out, w + kLanes<T>, positions, high);
    }
  }
  for (; w < positions; ++w) {
    for (int64_t j = 0; j < inner; j += kLanes<T>) {
      if (inner < kLanes<T>) {
        for (int64_t c = 0; c < inner; ++c) out[w * inner + c] = narrow<T>(from[c]);
      } else {
        store_row<SumOf<T>>(out + w * inner, j, inner, load_vec(from + j));
      }
    }
    from += pitch;
    if (++phase < stride) continue;
    phase = 0;
    from += inner - stride * pitch;
  }
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
  struct Tap {  // of a place of the window: it reads phase `phase` of its row, `shift` further on
    int64_t phase, shift;
  };
  struct Term {  // adds grads[at + x] where codes[at + x] == code
    int64_t at;
    int64_t code;
  };
  Scratch<Cover> covers(depth * height);
  Scratch<Term> terms(depth * height * window.size);
  Scratch<Tap> taps(window.size);
  for (int64_t s = 0; s < window.size; ++s) {
    const int64_t offset = s * window.dilation;
    taps[s] = {offset % window.stride, offset / window.stride * inner};
  }
  // What each row takes divisions to find.
  const Covers depth_covers(p.window[0], p.in[0], p.out[0], depth);
  const Covers height_covers(p.window[1], p.in[1], p.out[1], height);

  int64_t h = begin % p.in[1];
  int64_t d = begin / p.in[1] % p.in[0];
  int64_t outer = begin / (p.in[1] * p.in[0]);
  for (int64_t index = begin; index < end; ++index) {
    const Range ds = depth_covers.outputs[d];
    const Range hs = height_covers.outputs[h];
    int64_t count = 0;
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const int64_t i = depth_covers.place(d, od);
        const int64_t j = height_covers.place(h, oh);
        if (i < 0 || j < 0) continue;
        const int64_t slot = depth_covers.slot[od] * height + height_covers.slot[oh];
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
        for (int64_t s = 0; s < window.size; ++s)
          if (taps[s].phase == q)
            terms[term_count++] = {covers[k].at - taps[s].shift, covers[k].code + s};
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
    if (++h < p.in[1]) continue;
    h = 0;
    if (++d < p.in[0]) continue;
    d = 0;
    ++outer;
  }
}
// Zeros that stay in the cache, where a few gradients are then put among them. memset, which the
// compiler makes of such loops, writes runs of this size past it on some CPUs: each gradient then
// waits for memory.
__attribute__((noinline, optimize("no-tree-loop-distribute-patterns"))) void clear(void* out,
                                                                                   int64_t bytes) {
  auto* at = static_cast<char*>(out);
  const Vec<int32_t> zero = {};
  for (; bytes >= kVectorBytes; bytes -= kVectorBytes, at += kVectorBytes)
    memcpy(at, &zero, kVectorBytes);
  memset(at, 0, bytes);
}

// Windows that do not overlap, and of which each meets some input: an input has one output at most,
// so gradients are put, not added. Output rows [begin, end) of [outer, D, H]; each owns the band of
// input rows from its windows' first to the next windows' first, which it clears before.
template <class T, class Place>
void max_place_gradients(const PoolProblem& p, const PlaceTable& table, const T* gy,
                         const Place* places, T* gx, int64_t begin, int64_t end) {
  const int64_t inner = p.inner;
  const int64_t n = p.out[2] * inner;
  const int64_t row_elements = p.in[2] * inner;
  const auto band = [&](int axis, int64_t output) {
    const Window& window = p.window[axis];
    return Range{output == 0 ? 0 : window.first_input(output),
                 output + 1 == p.out[axis] ? p.in[axis] : window.first_input(output + 1)};
  };
  int64_t oh = begin % p.out[1];
  int64_t od = begin / p.out[1] % p.out[0];
  int64_t outer = begin / (p.out[1] * p.out[0]);
  for (int64_t index = begin; index < end; ++index) {
    T* plane = gx + outer * p.in_positions() * inner;
    const Range ds = band(0, od);
    const Range hs = band(1, oh);
    for (int64_t d = ds.begin; d < ds.end; ++d)
      clear(plane + (d * p.in[1] + hs.begin) * row_elements,
            (hs.end - hs.begin) * row_elements * sizeof(T));
    const int64_t stride = p.window[2].stride;
    int64_t origin = window_row(p, od, oh) - p.window[2].padding;
    if (inner == 1) {
      for (int64_t j = index * n; j < (index + 1) * n; ++j, origin += stride)
        plane[origin + table.offsets()[places[j]]] = gy[j];
    } else {
      for (int64_t j = index * n; j < (index + 1) * n; origin += stride)
        for (int64_t c = 0; c < inner; ++c, ++j)
          plane[(origin + table.offsets()[places[j]]) * inner + c] = gy[j];
    }
    if (++oh < p.out[1]) continue;
    oh = 0;
    if (++od < p.out[0]) continue;
    od = 0;
    ++outer;
  }
}

// Adds the gradient of each output of a piece at its place, in order.
template <class T, class Place>
void max_scatter_gradients(const PoolProblem& p, const PlaceTable& table, bool voids, const T* gy,
                           const Place* places, T* gx, const Piece& piece) {
  using A = accumulate_t<T>;
  const int64_t width = piece.width();
  const int64_t base = piece.begin * p.in_positions();
  const int64_t positions = (piece.end - piece.begin) * p.in_positions();
  // `sum` holds the piece's channels of its positions, `pitch` elements apart.
  const auto add_to = [&](auto* sum, int64_t pitch) {
    for_each_place(
        p, table, voids, places, piece,
        [&](int64_t output, int64_t position) {
          return [to = sum + (position - base) * pitch - piece.c_begin, from = gy + output, pitch](
                     int64_t k, int64_t i, int64_t c) {
            if constexpr (std::is_same_v<decltype(sum), A*>) {
              to[i * pitch + c] += widen(from[k]);
            } else {
              to[i * pitch + c] = from[k];
            }
          };
        },
        [](int64_t) {});
  };
  T* out = gx + base * p.inner + piece.c_begin;
  if (std::is_same_v<T, A> || pool_windows_are_apart(p)) {
    if (width == p.inner) {
      clear(out, positions * width * sizeof(T));
    } else {
      for (int64_t i = 0; i < positions; ++i) clear(out + i * p.inner, width * sizeof(T));
    }
    return add_to(out, p.inner);
  }
  // Halves add up in float, where they meet; the last row is read to the end of a vector.
  Scratch<A> sum(positions * width + kLanes<T>);
  fill_lanes(sum.data(), positions * width, A{0});
  add_to(sum.data(), width);
  const int64_t run = width == p.inner ? positions * width : width;
  for (int64_t at = 0; at < positions * width; at += run, out += p.inner)
    for (int64_t j = 0; j < run; j += kLanes<T>)
      store_row<SumOf<T>>(out, j, run, load_vec(sum.data() + at + j));
}
}  // namespace

void max_backward(const PoolProblem& p, const void* gy, const void* places, void* gx,
                  const Context& context) {
  const int64_t elements = p.in_elements() + p.out_elements();
  const PoolPath path = pool_max_gradient_path(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* grad = static_cast<const T*>(gy);
    auto* out = static_cast<T*>(gx);
    dispatch_place(p, [&](auto place) {
      const auto* kept = static_cast<const decltype(place)*>(places);
      if (path == PoolPath::gather) {
        const int64_t rows = p.outer * p.in[0] * p.in[1];
        return parallel_for(context, rows, pool_grain(rows, elements),
                            [&](int64_t begin, int64_t end) {
                              max_gather_gradients(p, grad, kept, out, begin, end);
                            });
      }
      if (path == PoolPath::pairs) {
        const int64_t rows = p.outer * p.in[0] * p.in[1];
        return parallel_for(
            context, rows, pool_grain(rows, elements), [&](int64_t begin, int64_t end) {
              with_pair_taps(p.window[2], [&](auto size, auto odd) {
                max_pair_gradients<T, decltype(size)::value, decltype(odd)::value>(
                    p, grad, reinterpret_cast<const uint8_t*>(kept), out, begin, end);
              });
            });
      }
      const PlaceTable table(p);
      const bool voids = has_void_windows(p);
      if (path == PoolPath::place && !voids) {
        const int64_t rows = p.outer * p.out[0] * p.out[1];
        return parallel_for(context, rows, pool_grain(rows, elements),
                            [&](int64_t begin, int64_t end) {
                              max_place_gradients(p, table, grad, kept, out, begin, end);
                            });
      }
      parallel_pieces(p, context, [&](const Piece& piece) {
        max_scatter_gradients(p, table, voids, grad, kept, out, piece);
      });
    });
  });
}

void max_pick(const PoolProblem& p, const void* x, const void* places, void* y,
              const Context& context) {
  const PlaceTable table(p);
  const bool voids = has_void_windows(p);
  const int64_t inner = p.inner;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* input = static_cast<const T*>(x);
    auto* out = static_cast<T*>(y);
    dispatch_place(p, [&](auto place) {
      const auto* kept = static_cast<const decltype(place)*>(places);
      parallel_pieces(p, context, [&](const Piece& piece) {
        for_each_place(
            p, table, voids, kept, piece,
            [&](int64_t output, int64_t position) {
              return [to = out + output, from = input + position * inner, inner](
                         int64_t k, int64_t i, int64_t c) { to[k] = from[i * inner + c]; };
            },
            [&](int64_t output) { out[output] = T{}; });
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
    parallel_pieces(p, context, [&](const Piece& piece) {
      for (int64_t outer = piece.begin; outer < piece.end; ++outer)
        for_each_place(
            p, table, voids, kept, {outer, outer + 1, piece.c_begin, piece.c_end},
            [&](int64_t output, int64_t position) {
              return [to = indices + output, first = position - outer * p.in_positions()](
                         int64_t k, int64_t i, int64_t) { to[k] = first + i; };
            },
            [&](int64_t output) { indices[output] = 0; });
    });
  });
}

}  // namespace weft::WEFT_TARGET
