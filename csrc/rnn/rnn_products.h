// Products and sums of tensors around the recurrent kernels: input products, and the gradients of
// weights and biases. On CPU they are weft's own (gemm/gemm.h), whose bits do not depend on the
// number of threads; elsewhere torch's.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "gemm/gemm.h"

namespace weft {

// The kernels of `t`'s target, or where plans are asked for of theirs; null where torch's products
// serve.
const GemmKernels* product_kernels_for(const at::Tensor& t);

// One tensor after the other along the first axis; the second may be undefined.
struct Stacked {
  at::Tensor head, tail;

  at::Tensor whole() const;
};

// op(a) [m, k] times b [k, n], plus `add` [m, n] if defined; op transposes if `transposed`. Nothing
// is packed: for one step of a cell.
at::Tensor product(const at::Tensor& a, bool transposed, const at::Tensor& b,
                   const at::Tensor& add = {});
// a [m, k] times b [k, n], which is packed: for all steps of a layer.
at::Tensor packed_product(const at::Tensor& a, const at::Tensor& b);
// The transposed a [k, m], whose columns are neighbours, times each of the factors [k, n].
std::array<at::Tensor, 2> weight_gradients(const at::Tensor& a, const Stacked& first,
                                           const Stacked& second);
at::Tensor weight_gradient(const at::Tensor& a, const Stacked& factor);
// [n], the sums of the columns of t [m, n].
at::Tensor column_sums(const at::Tensor& t);

}  // namespace weft
