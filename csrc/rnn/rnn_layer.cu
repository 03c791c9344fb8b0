// Whole sequences of a recurrent layer on CUDA: all steps in one kernel where the weights fit
// (rnn_sequence_plan.h, rnn_sequence_forward.cu, rnn_sequence_backward.cu), else a fused kernel a
// step.
//
// Forward: the hidden state's product as in rnn.cu, with the gates as its epilogue; the state
// passes from step to step through two buffers in memory. Backward: an elementwise kernel for the
// gates' gradients, one thread per row and unit, and a tile product with W_hh for the gradient one
// step before. Normalisation needs a row's whole products before the gates, so a step is then three
// kernels: product, normalisation (a block per row and gate), gates. Bound: launches and the bytes
// of W_hh, which every step reads again. On dual numbers a step has three products, one after
// another through the same tiles.
#include "rnn/rnn_layer_tile.h"

namespace weft::WEFT_TARGET {

const LayerKernels layer_kernels = {layer_forward, layer_backward, normalise_rows,
                                    normalise_rows_backward};

}  // namespace weft::WEFT_TARGET
