// What the op files of a CNN's layer share.
#pragma once

#include "block/block_plan.h"
#include "conv/conv_ops.h"
#include "pool/pool_ops.h"

namespace weft {

// A layer, and its pooling as an op of its own.
struct BlockRequest {
  BlockProblem problem;
  PoolRequest pool;
};
BlockRequest block_request(const ConvRequest& conv, c10::string_view pooling, at::IntArrayRef size,
                           at::IntArrayRef stride, at::IntArrayRef padding);

}  // namespace weft
