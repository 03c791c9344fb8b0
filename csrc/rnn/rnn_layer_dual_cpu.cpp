// Recurrent layers on dual numbers, on CPU: what double backward runs. The kernels are those of
// rnn_layer_cpu.cpp, in other numbers; a step has three products in place of one.
#include "core/dispatch_wide.h"
#include "rnn/rnn_layer_backward_cpu.h"
#include "rnn/rnn_layer_forward_cpu.h"

namespace weft::WEFT_TARGET {

void layer_forward_dual(const LayerProblem& p, const LayerForward& t, const Context& context) {
  dispatch_wide(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_cell(p.cell,
                  [&](auto cell) { layer_forward<decltype(cell), T, T, true>(p, t, context); });
  });
}

void layer_backward_dual(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  dispatch_wide(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    layer_backward<4, T, T, true>(p, t, context);
  });
}

}  // namespace weft::WEFT_TARGET
