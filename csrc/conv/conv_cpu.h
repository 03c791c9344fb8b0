// The CPU kernels of convolution, a translation unit for each way. The gathers compute fprop or,
// where told, dgrad; all take any dtype.
#pragma once

#include "conv/conv.h"

namespace weft::WEFT_TARGET {

using ConvGather = void(const ConvProblem&, bool transposed, const void* src, const void* w,
                        const void* bias, void* dst, const Context&);
using ConvWgrad = void(const ConvProblem&, const void* x, const void* gy, void* gw, const Context&);

using ConvBackward = void(const ConvProblem&, const ConvGradients&, const Context&);

ConvBackward conv_depthwise_backward, conv_flat_backward;
ConvGather conv_product_gather, conv_planes_gather, conv_depthwise_gather, conv_winograd_gather,
    conv_flat_gather, conv_columns_gather, conv_column_tiles_gather;
ConvWgrad conv_product_wgrad, conv_planes_wgrad, conv_depthwise_wgrad, conv_winograd_wgrad,
    conv_flat_wgrad, conv_columns_wgrad;

}  // namespace weft::WEFT_TARGET
