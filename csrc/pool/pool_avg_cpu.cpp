// Average pooling on CPU, forward (pool_values.h) and backward (pool_gradients.h,
// pool_pairs_grad.h), and adaptive (pool_adaptive_avg.h); the gradient of one output per plane
// fills it. Threads own runs of rows of what they write. Bound: bytes, in + out.
#include "pool/pool_adaptive_avg.h"
#include "pool/pool_cpu.h"
#include "pool/pool_gradients.h"
#include "pool/pool_pairs_grad.h"
#include "pool/pool_planes.h"
#include "pool/pool_values.h"

namespace weft::WEFT_TARGET {
namespace {

// The gradient of one output per plane: every position of map k is gy[k] / divisor. Positions of
// channels-last maps are copied a few hundred elements at a time.
template <class T>
void fill_maps(const PoolProblem& p, const T* gy, T* gx, const Context& context) {
  constexpr int64_t kRunElements = 512;
  const auto divisor = static_cast<accumulate_t<T>>(pool_divisor(p, 0, 0, 0));
  const int64_t inner = p.inner;
  const int64_t size = p.in_positions() * inner;
  const int64_t run = inner == 1 ? 1 : (1 + kRunElements / inner) * inner;
  parallel_for(context, p.outer, pool_grain(p.outer, p.in_elements()),
               [&](int64_t begin, int64_t end) {
                 Scratch<T> positions(run);
                 for (int64_t map = begin; map < end; ++map) {
                   for (int64_t c = 0; c < inner; ++c)
                     positions[c] = narrow<T>(widen(gy[map * inner + c]) / divisor);
                   for (int64_t j = inner; j < run; ++j) positions[j] = positions[j - inner];
                   T* out = gx + map * size;
                   if (inner == 1) {
                     const T value = positions[0];
                     for (int64_t j = 0; j < size; ++j) out[j] = value;
                     continue;
                   }
                   for (int64_t j = 0; j < size; j += run)
                     memcpy(static_cast<void*>(out + j), positions.data(),
                            (size - j < run ? size - j : run) * sizeof(T));
                 }
               });
}

}  // namespace

void avg_forward(const PoolProblem& p, const void* x, void* y, const Context& context) {
  const int64_t elements = p.in_elements() + p.out_elements();
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* input = static_cast<const T*>(x);
    auto* output = static_cast<T*>(y);
    switch (pool_values_path(p)) {
      case PoolPath::boxes: {
        const int64_t rows = p.outer * p.out[0] * p.out[1];
        return parallel_for(
            context, rows, pool_grain(rows, elements),
            [&](int64_t begin, int64_t end) { adaptive_avg_values(p, input, output, begin, end); });
      }
      case PoolPath::planes: {
        const auto divisor = static_cast<accumulate_t<T>>(pool_divisor(p, 0, 0, 0));
        return reduce_globally<SumOf<T>>(p, input, output, context,
                                         [&](auto sum) { return sum / divisor; });
      }
      default:
        return pool_values<SumOf<T>>(p, input, output, context, [&](const auto& walk) {
          return Divisors<T>(p, walk.width());
        });
    }
  });
}

void avg_backward(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  // Windows that keep the map's size are their own transposes.
  if (pool_avg_gradient_path(p) == PoolPath::flat) return avg_forward(p, gy, gx, context);
  const int64_t elements = p.in_elements() + p.out_elements();
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* grad = static_cast<const T*>(gy);
    auto* out = static_cast<T*>(gx);
    if (pool_avg_gradient_path(p) == PoolPath::boxes) {
      const int64_t rows = p.outer * p.in[0] * p.in[1];
      return parallel_for(
          context, rows, pool_grain(rows, elements),
          [&](int64_t begin, int64_t end) { adaptive_avg_gradients(p, grad, out, begin, end); });
    }
    if (pool_avg_gradient_path(p) == PoolPath::planes) return fill_maps(p, grad, out, context);
    if (pool_avg_gradient_path(p) == PoolPath::pairs) {
      const int64_t rows = p.outer * p.in[0] * p.in[1];
      return parallel_for(context, rows, pool_grain(rows, elements),
                          [&](int64_t begin, int64_t end) {
                            with_pair_taps(p.window[2], [&](auto size, auto odd) {
                              avg_pair_gradients<T, decltype(size)::value, decltype(odd)::value>(
                                  p, grad, out, begin, end);
                            });
                          });
    }
    const int64_t items = GradientWalk<T>::items_of(p);
    parallel_for(context, items, pool_grain(items, elements), [&](int64_t begin, int64_t end) {
      GradientWalk<T>(p, grad).run(begin, end, out);
    });
  });
}

}  // namespace weft::WEFT_TARGET
