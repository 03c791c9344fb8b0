// For kernels of float32 and float64 alone.
#pragma once

#include "core/dtype.h"

namespace weft {

// Calls `body(TypeTag<T>{})` with the element type of `dtype`, which is one of the two.
template <class Body>
inline __attribute__((always_inline)) void dispatch_wide(DType dtype, const Body& body) {
  if (dtype == DType::f64) return body(TypeTag<double>{});
  body(TypeTag<float>{});
}

}  // namespace weft
