#include "ops_common.h"
#include "rnn/rnn_plans.h"
#include "rnn/rnn_products.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace weft {

using at::Tensor;

const GemmKernels* product_kernels_for(const Tensor& t) {
  return gemm_kernels_for(planning() ? planned_target() : target_for(t));
}

Tensor product(const Tensor& a, bool transposed, const Tensor& b, const Tensor& add) {
  const GemmKernels* kernels = product_kernels_for(a);
  const int64_t rows = a.size(0), columns = a.size(1);
  const bool planned = product_planned(dtype_of(a, "product", "a"), transposed ? columns : rows,
                                       b.size(1), transposed ? rows : columns);
  if (kernels == nullptr) {
    Tensor result = at::mm(transposed ? a.t() : a, b);
    return add.defined() ? result.add_(add) : result;
  }
  ProductProblem p = {dtype_of(a, "product", "a"), rows, b.size(1), columns, columns, 1};
  if (transposed) p = {p.dtype, columns, b.size(1), rows, 1, columns};
  Tensor result = empty_output(a, {p.m, p.n});
  const Tensor factor = b.contiguous();
  if (result.numel() > 0 && !planned)
    kernels->product(p, a.const_data_ptr(), factor.const_data_ptr(),
                     add.defined() ? add.const_data_ptr() : nullptr, result.mutable_data_ptr(),
                     context_for(a));
  return result;
}

Tensor packed_product(const Tensor& a, const Tensor& b) {
  const GemmKernels* kernels = product_kernels_for(a);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  PackedProblem p;
  p.dtype = dtype_of(a, "product", "a");
  p.m = a.size(0), p.k = a.size(1), p.n = b.size(1);
  p.a_row = p.k, p.a_column = 1, p.b_row = p.n, p.b_column = 1, p.c_row = p.n;
  const bool planned = product_planned(p.dtype, p.m, p.n, p.k);
  if (kernels == nullptr) return at::mm(a, b);
  Tensor result = empty_output(a, {p.m, p.n});
  if (result.numel() > 0 && !planned)
    kernels->packed(p, a.const_data_ptr(), b.const_data_ptr(), result.mutable_data_ptr(),
                    context_for(a));
  return result;
}

Tensor Stacked::whole() const {
  if (!tail.defined() || tail.size(0) == 0) return head;
  auto sizes = head.sizes().vec();
  sizes[0] += tail.size(0);
  Tensor result = empty_output(head, sizes);
  result.narrow(0, 0, head.size(0)).copy_(head);
  result.narrow(0, head.size(0), tail.size(0)).copy_(tail);
  return result;
}

std::array<Tensor, 2> weight_gradients(const Tensor& a, const Stacked& first,
                                       const Stacked& second) {
  const GemmKernels* kernels = product_kernels_for(a);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const GradientProblem p = {dtype_of(a, "product", "a"), a.size(1), a.size(0), a.stride(0)};
  std::array<Tensor, 2> results;
  GradientFactor factors[2];
  Stacked kept[2];
  bool planned = false;
  for (int i = 0; i < 2; ++i) {
    const Stacked& of = i == 0 ? first : second;
    if (!of.head.defined()) continue;
    const int64_t n = of.head.size(1);
    planned = product_planned(p.dtype, p.m, n, p.k);
    if (kernels == nullptr) {
      results[i] = at::mm(a.t(), of.whole());
      continue;
    }
    const bool halves_pair = size_of(p.dtype) < 4 && of.head.size(0) % 2 != 0;
    kept[i] = halves_pair ? Stacked{of.whole(), {}} : of;
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
    results[i] = empty_output(a, {p.m, n});
    factors[i] = {n, kept[i].head.size(0), data(kept[i].head), data(kept[i].tail),
                  results[i].mutable_data_ptr()};
  }
  if (kernels == nullptr || planned) return results;
  const Tensor work = empty_output(a, {gradient_work(p, factors[0].n, factors[1].n)}, at::kByte);
  kernels->weight_gradients(p, a.const_data_ptr(), factors, work.mutable_data_ptr(),
                            context_for(a));
  return results;
}

Tensor weight_gradient(const Tensor& a, const Stacked& factor) {
  return weight_gradients(a, factor, {})[0];
}

Tensor column_sums(const Tensor& t) {
  const GemmKernels* kernels = product_kernels_for(t);
  if (kernels == nullptr) return t.sum(0);
  const ProductProblem p = {dtype_of(t, "column_sums", "t"), 1, t.size(1), t.size(0), 0, 0};
  Tensor result = empty_output(t, {p.n});
  if (p.n > 0 && !planning())
    kernels->column_sums(p, t.const_data_ptr(), result.mutable_data_ptr(), context_for(t));
  return result;
}

}  // namespace weft
