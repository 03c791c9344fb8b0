// Products and sums of tensors around the recurrent kernels: input products, and the gradients of
// weights and biases. On CPU they are weft's own (gemm/gemm.h), whose bits do not depend on the
// number of threads; elsewhere torch's.
#pragma once

#include <ATen/core/Tensor.h>

#include "gemm/gemm.h"

namespace weft {

// The kernels of `t`'s target, or where plans are asked for of theirs; null where torch's products
// serve.
const GemmKernels* product_kernels_for(const at::Tensor& t);

// op(a) [m, k] times b [k, n], plus `add` [m, n] if defined; op transposes if `transposed`. Nothing
// is packed: for one step of a cell.
at::Tensor product(const at::Tensor& a, bool transposed, const at::Tensor& b,
                   const at::Tensor& add = {});
// The same without `add`, b packed: for all steps of a layer.
at::Tensor packed_product(const at::Tensor& a, bool transposed, const at::Tensor& b);
// [n], the sums of the columns of t [m, n].
at::Tensor column_sums(const at::Tensor& t);

}  // namespace weft
