// What `block_cpu.cpp` puts into one table; see BlockKernels.
#pragma once

#include "block/block.h"

namespace weft::WEFT_TARGET {

void block_backward(const BlockProblem&, const BlockGradients&, const Context&);

}  // namespace weft::WEFT_TARGET
