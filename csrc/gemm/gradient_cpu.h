// Gradients of weights on CPU; in a file of their own.
#pragma once

#include "gemm/gemm.h"

namespace weft::WEFT_TARGET {

void weight_gradients(const GradientProblem& p, const void* a, const GradientFactor (&factors)[2],
                      void* work, const Context& context);

}  // namespace weft::WEFT_TARGET
