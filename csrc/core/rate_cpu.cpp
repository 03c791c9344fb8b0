#include "core/rate.h"

#include "core/parallel.h"
#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

// As many independent chains as hide the latency of a multiply-add on any processor: two of four or
// five cycles begin in each cycle.
constexpr int kChains = 12;

int64_t multiply_adds(int64_t rounds, const Context& context) {
  using V = Vec<float>;
  parallel_for(context, context.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const volatile float unknown = 0.0f;  // so that no chain is computed when compiling
      const float first = unknown;
      V sum[kChains];
      for (int i = 0; i < kChains; ++i) sum[i] = V{} + (first + static_cast<float>(i));
      const V scale = V{} + 0.5f, step = V{} + 1.0f;  // the sums stay near 2
      for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * scale + step;
      }
      V total = {};
      for (int i = 0; i < kChains; ++i) total += sum[i];
      volatile float seen = total[0];  // so that all are
      (void)seen;
    }
  });
  return context.threads * rounds * kChains * kLanes<float> * 2;
}

}  // namespace

const RateKernels rate_kernels = {multiply_adds};

}  // namespace weft::WEFT_TARGET
