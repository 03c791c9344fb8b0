#include "ops_common.h"
#include "rnn/rnn_plans.h"
#include "rnn/rnn_products.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

Tensor packed_product(const Tensor& a, bool transposed, const Tensor& b) {
  const GemmKernels* kernels = product_kernels_for(a);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool planned = product_planned(dtype_of(a, "product", "a"), a.size(transposed ? 1 : 0),
                                       b.size(1), a.size(transposed ? 0 : 1));
  if (kernels == nullptr) return at::mm(transposed ? a.t() : a, b);
  PackedProblem p;
  p.dtype = dtype_of(a, "product", "a");
  p.m = a.size(transposed ? 1 : 0), p.k = a.size(transposed ? 0 : 1), p.n = b.size(1);
  p.a_row = transposed ? 1 : a.size(1), p.a_column = transposed ? a.size(1) : 1;
  p.b_row = p.n, p.b_column = 1, p.c_row = p.n;
  Tensor result = empty_output(a, {p.m, p.n});
  if (result.numel() > 0 && !planned)
    kernels->packed(p, a.const_data_ptr(), b.const_data_ptr(), result.mutable_data_ptr(),
                    context_for(a));
  return result;
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
