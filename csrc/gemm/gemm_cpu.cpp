// Matrix products on CPU whose bits do not depend on the number of threads; see gemm/outer_cpu.h.
#include "gemm/gemm.h"

#include "gemm/outer_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

void product(const ProductProblem& p, const void* a, const void* b, const void* add, void* c,
             const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const OuterProduct<T> outer{p, static_cast<const T*>(a), static_cast<const T*>(b),
                                static_cast<const T*>(add), static_cast<T*>(c)};
    outer.run(context, kGrain);
  });
}

// The product of one row of ones: every element of A is the same 1.
void column_sums(const ProductProblem& p, const void* b, void* sums, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T one = narrow<T>(accumulate_t<T>{1});
    const ProductProblem row = {p.dtype, 1, p.n, p.k, 0, 0};
    const OuterProduct<T> outer{row, &one, static_cast<const T*>(b), nullptr,
                                static_cast<T*>(sums)};
    outer.run(context, kGrain);
  });
}

}  // namespace

const GemmKernels gemm_kernels = {product, column_sums};

}  // namespace weft::WEFT_TARGET
