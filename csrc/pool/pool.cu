// Pooling on CUDA: the window walk, one thread per element.
//
// Forward: a thread owns one output and walks its window. Backward: a thread owns one *input* and
// gathers from the outputs whose windows hold it, in ascending order, so nothing is atomic and the
// bits never change. Where a window is a long run of memory (global pooling), a warp owns its
// output and shuffles the lanes' results together. Adaptive windows are boxes of unequal extents,
// read and inverted by the same functions as fixed ones. Neighbouring threads own neighbouring
// elements of [outer, D, H, W, inner], so accesses coalesce along W (contiguous) or C
// (channels-last). Bound: bytes (read the input once, write the output once); overlapping windows
// re-read through L1.
#include <limits>

#include "device/device.h"
#include "pool/pool.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// A flat element index split into [outer, D, H, W, inner].
struct Element {
  int64_t outer, d, h, w, inner;
};

WEFT_DEVICE Element split(int64_t flat, const int64_t (&extent)[3], int64_t inner) {
  Element e;
  e.inner = flat % inner;
  flat /= inner;
  e.w = flat % extent[2];
  flat /= extent[2];
  e.h = flat % extent[1];
  flat /= extent[1];
  e.d = flat % extent[0];
  e.outer = flat / extent[0];
  return e;
}

WEFT_DEVICE int64_t flat_index(const Element& e, int64_t d, int64_t h, int64_t w,
                               const int64_t (&extent)[3], int64_t inner) {
  return (((e.outer * extent[0] + d) * extent[1] + h) * extent[2] + w) * inner + e.inner;
}

WEFT_DEVICE int64_t global_thread() {
  return device::block_index() * device::block_size() + device::thread_index();
}

template <class T, class Place, bool kKeepPlaces>
WEFT_GLOBAL WEFT_HOT void max_pool_forward(PoolProblem p, const T* x, T* y, Place* places) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, p.inner);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  using Acc = accumulate_t<T>;
  Acc best = -std::numeric_limits<Acc>::infinity();
  int64_t place = (kd.begin * p.window[1].size + kh.begin) * p.window[2].size + kw.begin;
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j)
      for (int64_t k = kw.begin; k < kw.end; ++k) {
        const int64_t d = p.window[0].first_input(e.d) + i * p.window[0].dilation;
        const int64_t h = p.window[1].first_input(e.h) + j * p.window[1].dilation;
        const int64_t w = p.window[2].first_input(e.w) + k * p.window[2].dilation;
        const Acc value = widen(load(x + flat_index(e, d, h, w, p.in, p.inner)));
        if (value > best || value != value) {
          best = value;
          place = (i * p.window[1].size + j) * p.window[2].size + k;
        }
      }
  store(y + index, narrow<T>(best));
  if constexpr (kKeepPlaces) store(places + index, static_cast<Place>(place));
}

// The larger value and its place; the first of equal ones, the last NaN.
template <class Acc>
WEFT_DEVICE void take_larger(Acc& best, int64_t& place, Acc value, int64_t value_place) {
  const bool nan = best != best;
  const bool replace = value != value
                           ? !nan || value_place > place
                           : !nan && (value > best || (value == best && value_place < place));
  if (!replace) return;
  best = value;
  place = value_place;
}

// The same for contiguous input, one warp per output, for windows that are long in W.
template <class T, class Place, bool kKeepPlaces>
WEFT_GLOBAL WEFT_HOT void max_pool_forward_runs(PoolProblem p, const T* x, T* y, Place* places) {
  const int64_t index = global_thread() / kWarp;
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, 1);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  using Acc = accumulate_t<T>;
  Acc best = -std::numeric_limits<Acc>::infinity();
  int64_t place =
      (kd.begin * p.window[1].size + kh.begin) * p.window[2].size + kw.begin + device::lane();
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j) {
      const int64_t d = p.window[0].first_input(e.d) + i * p.window[0].dilation;
      const int64_t h = p.window[1].first_input(e.h) + j * p.window[1].dilation;
      const int64_t w = p.window[2].first_input(e.w);
      const T* row = x + flat_index(e, d, h, 0, p.in, 1);
      for (int64_t k = kw.begin + device::lane(); k < kw.end; k += kWarp) {
        const Acc value = widen(load(row + w + k * p.window[2].dilation));
        if (value > best || value != value) {
          best = value;
          place = (i * p.window[1].size + j) * p.window[2].size + k;
        }
      }
    }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Acc other = device::shuffle_xor(best, mask);
    const int64_t other_place = device::shuffle_xor(place, mask);
    take_larger(best, place, other, other_place);
  }
  if (device::lane() != 0) return;
  store(y + index, narrow<T>(best));
  if constexpr (kKeepPlaces) store(places + index, static_cast<Place>(place));
}

template <class T, class Place>
WEFT_GLOBAL WEFT_HOT void max_pool_backward(PoolProblem p, const T* gy, const Place* places,
                                            T* gx) {
  const int64_t index = global_thread();
  if (index >= p.in_elements()) return;
  const Element e = split(index, p.in, p.inner);
  const Range od = outputs_covering(p.window[0], e.d, p.out[0]);
  const Range oh = outputs_covering(p.window[1], e.h, p.out[1]);
  const Range ow = outputs_covering(p.window[2], e.w, p.out[2]);
  accumulate_t<T> sum = 0;
  for (int64_t d = od.begin; d < od.end; ++d)
    for (int64_t h = oh.begin; h < oh.end; ++h)
      for (int64_t w = ow.begin; w < ow.end; ++w) {
        const int64_t i = place_of(p.window[0], e.d, d);
        const int64_t j = place_of(p.window[1], e.h, h);
        const int64_t k = place_of(p.window[2], e.w, w);
        if (i < 0 || j < 0 || k < 0) continue;
        const int64_t output = flat_index(e, d, h, w, p.out, p.inner);
        const int64_t mine = (i * p.window[1].size + j) * p.window[2].size + k;
        if (load(places + output) == mine) sum += widen(load(gy + output));
      }
  store(gx + index, narrow<T>(sum));
}

// Where the window of output `e` has its maximum, as (d, h, w) of the input. False for a dilated
// window that meets no input at all.
template <class Place>
WEFT_DEVICE bool locate(const PoolProblem& p, const Element& e, Place place, int64_t (&at)[3]) {
  const int64_t flat = place;
  const int64_t k = flat % p.window[2].size;
  const int64_t j = flat / p.window[2].size % p.window[1].size;
  const int64_t i = flat / p.window[2].size / p.window[1].size;
  at[0] = p.window[0].first_input(e.d) + i * p.window[0].dilation;
  at[1] = p.window[1].first_input(e.h) + j * p.window[1].dilation;
  at[2] = p.window[2].first_input(e.w) + k * p.window[2].dilation;
  return at[0] < p.in[0] && at[1] < p.in[1] && at[2] < p.in[2];
}

template <class T, class Place>
WEFT_GLOBAL void max_pool_pick(PoolProblem p, const T* x, const Place* places, T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, p.inner);
  int64_t at[3];
  const bool inside = locate(p, e, load(places + index), at);
  store(y + index, inside ? load(x + flat_index(e, at[0], at[1], at[2], p.in, p.inner)) : T{});
}

template <class Place>
WEFT_GLOBAL void max_pool_indices(PoolProblem p, const Place* places, int64_t* indices) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, p.inner);
  int64_t at[3];
  locate(p, e, load(places + index), at);
  store(indices + index, (at[0] * p.in[1] + at[1]) * p.in[2] + at[2]);
}

// A sum of any number of values that loses few bits: eights of them are added up in double, which
// costs a fraction of the arithmetic of a memory-bound kernel.
template <class Acc>
class LongSum {
 public:
  WEFT_DEVICE void add(Acc value) {
    eight_ += value;
    if (++count_ % 8 != 0) return;
    rest_ += eight_;
    eight_ = 0;
  }
  WEFT_DEVICE Acc total() const { return static_cast<Acc>(rest_ + eight_); }

 private:
  Acc eight_ = 0;
  double rest_ = 0;
  unsigned count_ = 0;
};

template <class T>
WEFT_GLOBAL WEFT_HOT void avg_pool_forward(PoolProblem p, const T* x, T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, p.inner);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  using Acc = accumulate_t<T>;
  LongSum<Acc> sum;
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j)
      for (int64_t k = kw.begin; k < kw.end; ++k) {
        const int64_t d = p.window[0].first_input(e.d) + i;
        const int64_t h = p.window[1].first_input(e.h) + j;
        const int64_t w = p.window[2].first_input(e.w) + k;
        sum.add(widen(load(x + flat_index(e, d, h, w, p.in, p.inner))));
      }
  store(y + index, narrow<T>(sum.total() / static_cast<Acc>(pool_divisor(p, e.d, e.h, e.w))));
}

// The same for contiguous input, one warp per output, for windows that are long in W.
template <class T>
WEFT_GLOBAL WEFT_HOT void avg_pool_forward_runs(PoolProblem p, const T* x, T* y) {
  const int64_t index = global_thread() / kWarp;
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out, 1);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  using Acc = accumulate_t<T>;
  LongSum<Acc> lane_sum;
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j) {
      const int64_t d = p.window[0].first_input(e.d) + i;
      const int64_t h = p.window[1].first_input(e.h) + j;
      const T* row = x + flat_index(e, d, h, 0, p.in, 1) + p.window[2].first_input(e.w);
      for (int64_t k = kw.begin + device::lane(); k < kw.end; k += kWarp)
        lane_sum.add(widen(load(row + k)));
    }
  Acc sum = lane_sum.total();
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  if (device::lane() == 0)
    store(y + index, narrow<T>(sum / static_cast<Acc>(pool_divisor(p, e.d, e.h, e.w))));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void avg_pool_backward(PoolProblem p, const T* gy, T* gx) {
  const int64_t index = global_thread();
  if (index >= p.in_elements()) return;
  const Element e = split(index, p.in, p.inner);
  const Range od = outputs_covering(p.window[0], e.d, p.out[0]);
  const Range oh = outputs_covering(p.window[1], e.h, p.out[1]);
  const Range ow = outputs_covering(p.window[2], e.w, p.out[2]);
  using Acc = accumulate_t<T>;
  Acc sum = 0;
  for (int64_t d = od.begin; d < od.end; ++d)
    for (int64_t h = oh.begin; h < oh.end; ++h)
      for (int64_t w = ow.begin; w < ow.end; ++w)
        sum += widen(load(gy + flat_index(e, d, h, w, p.out, p.inner))) /
               static_cast<Acc>(pool_divisor(p, d, h, w));
  store(gx + index, narrow<T>(sum));
}

// ---- launchers -------------------------------------------------------------------------------

device::Launch one_thread_each(const char* kernel, int64_t elements, const Context& context) {
  return {kernel, ceil_div(elements, kThreads), kThreads, 0, context.stream};
}

// A warp per output where its window has a vector's worth of neighbours in memory.
bool has_runs(const PoolProblem& p) { return p.inner == 1 && p.window[2].size >= 2 * kWarp; }

// Calls `body(Place{})` with the integer that holds a place.
template <class Body>
void dispatch_place(const PoolProblem& p, const Body& body) {
  if (p.place_bytes() == 1) return body(uint8_t{});
  return body(uint32_t{});
}

void launch_max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                        const Context& context) {
  const bool runs = has_runs(p);
  const auto config =
      runs ? one_thread_each("max_pool_forward_runs", p.out_elements() * kWarp, context)
           : one_thread_each("max_pool_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (places == nullptr) {
      const auto kernel =
          runs ? max_pool_forward_runs<T, uint8_t, false> : max_pool_forward<T, uint8_t, false>;
      device::launch(config, kernel, p, static_cast<const T*>(x), static_cast<T*>(y), nullptr);
      return;
    }
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      const auto kernel =
          runs ? max_pool_forward_runs<T, Place, true> : max_pool_forward<T, Place, true>;
      device::launch(config, kernel, p, static_cast<const T*>(x), static_cast<T*>(y),
                     static_cast<Place*>(places));
    });
  });
}

void launch_max_backward(const PoolProblem& p, const void* gy, const void* places, void* gx,
                         const Context& context) {
  const auto config = one_thread_each("max_pool_backward", p.in_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      device::launch(config, max_pool_backward<T, Place>, p, static_cast<const T*>(gy),
                     static_cast<const Place*>(places), static_cast<T*>(gx));
    });
  });
}

void launch_max_pick(const PoolProblem& p, const void* x, const void* places, void* y,
                     const Context& context) {
  const auto config = one_thread_each("max_pool_pick", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      device::launch(config, max_pool_pick<T, Place>, p, static_cast<const T*>(x),
                     static_cast<const Place*>(places), static_cast<T*>(y));
    });
  });
}

void launch_max_indices(const PoolProblem& p, const void* places, int64_t* indices,
                        const Context& context) {
  const auto config = one_thread_each("max_pool_indices", p.out_elements(), context);
  dispatch_place(p, [&](auto place) {
    using Place = decltype(place);
    device::launch(config, max_pool_indices<Place>, p, static_cast<const Place*>(places), indices);
  });
}

void launch_avg_forward(const PoolProblem& p, const void* x, void* y, const Context& context) {
  const bool runs = has_runs(p);
  const auto config =
      runs ? one_thread_each("avg_pool_forward_runs", p.out_elements() * kWarp, context)
           : one_thread_each("avg_pool_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, runs ? avg_pool_forward_runs<T> : avg_pool_forward<T>, p,
                   static_cast<const T*>(x), static_cast<T*>(y));
  });
}

void launch_avg_backward(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  const auto config = one_thread_each("avg_pool_backward", p.in_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, avg_pool_backward<T>, p, static_cast<const T*>(gy), static_cast<T*>(gx));
  });
}

}  // namespace

const PoolKernels pool_kernels = {launch_max_forward, launch_max_backward, launch_max_pick,
                                  launch_max_indices, launch_avg_forward,  launch_avg_backward};

}  // namespace weft::WEFT_TARGET
