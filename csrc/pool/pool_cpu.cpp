// Pooling on CPU.
#include <limits>

#include "core/parallel.h"
#include "pool/pool.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T, class Place>
void max_forward(const PoolProblem& p, const T* x, T* y, Place* places, const Context& context) {
  using Acc = accumulate_t<T>;
  parallel_for(context, p.outer * p.out[0] * p.out[1], 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t oh = row % p.out[1], od = row / p.out[1] % p.out[0];
      const int64_t o = row / p.out[1] / p.out[0];
      const Range kd = places_inside(p.window[0], od, p.in[0]);
      const Range kh = places_inside(p.window[1], oh, p.in[1]);
      for (int64_t ow = 0; ow < p.out[2]; ++ow) {
        const Range kw = places_inside(p.window[2], ow, p.in[2]);
        for (int64_t c = 0; c < p.inner; ++c) {
          Acc best = -std::numeric_limits<Acc>::infinity();
          int64_t place = (kd.begin * p.window[1].size + kh.begin) * p.window[2].size + kw.begin;
          for (int64_t i = kd.begin; i < kd.end; ++i)
            for (int64_t j = kh.begin; j < kh.end; ++j)
              for (int64_t k = kw.begin; k < kw.end; ++k) {
                const int64_t d = p.window[0].first_input(od) + i * p.window[0].dilation;
                const int64_t h = p.window[1].first_input(oh) + j * p.window[1].dilation;
                const int64_t w = p.window[2].first_input(ow) + k * p.window[2].dilation;
                const Acc v =
                    widen(x[(((o * p.in[0] + d) * p.in[1] + h) * p.in[2] + w) * p.inner + c]);
                if (v > best || v != v) {
                  best = v;
                  place = (i * p.window[1].size + j) * p.window[2].size + k;
                }
              }
          const int64_t out = (row * p.out[2] + ow) * p.inner + c;
          y[out] = narrow<T>(best);
          if (places) places[out] = static_cast<Place>(place);
        }
      }
    }
  });
}

void launch_max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                        const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.place_bytes() == 1)
      max_forward(p, static_cast<const T*>(x), static_cast<T*>(y), static_cast<uint8_t*>(places),
                  context);
    else
      max_forward(p, static_cast<const T*>(x), static_cast<T*>(y), static_cast<uint32_t*>(places),
                  context);
  });
}

}  // namespace

const PoolKernels pool_kernels = {launch_max_forward, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace weft::WEFT_TARGET
