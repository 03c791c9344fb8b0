// Whole sequences of a recurrent layer on CPU.
//
// Forward: W_hh is packed once, a panel being one vector of units with its gates side by side. A
// team of threads splits the panels and goes through the steps together, one barrier a step: each
// multiplies the whole state with its own panels, finishes its units' gates while their sums are in
// the cache, and writes its part of the next state into the other of two buffers.
//
// Backward: the panels are those of W_hh itself, two to four vectors of units. A thread makes the
// gradients of the gates of its own units, meets the others, and multiplies all gates' gradients
// with its panels, which gives the gradient of its own units one step before.
//
// A projection, and the GRU that resets before its product, have a second product within a step:
// its factor goes through a buffer, and the step has one barrier more.
//
// Normalisation needs the whole of a row's products: these go through a buffer, the threads meet,
// and each finishes some of the rows, the input's products with the state's, all gates of those
// that fit into the cache together.
//
// Where the weights stay in a core's own cache and there are rows enough, threads share the rows
// instead (`layer_split`): each goes through all steps on its own, and none waits for another.
//
// Rows that have ended, or start afresh, are left out of the products. bf16 is multiplied by dot
// products of pairs where the processor has them: the state is then held in bf16 for the product.
// Bound: FLOPs for many rows; for one, the packed weights' bytes each step, from the cache.
//
// The gates of a vector of units take some 100 cycles, as 200 products do; so constants and biases
// are loaded once for many rows, the input's products prefetched while the state's are made, and
// h left until the cells of some rows are done: shorter chains of operations overlap more.
// Lost: masked loads in place of a branch between whole and partial vectors (Zen 5: a fifth slower
// where the sums come from memory), and a copy of the step for whole vectors alone (no faster);
// prefetching the panels, or in backward what forward kept.
#include "rnn/rnn_layer_backward_cpu.h"
#include "rnn/rnn_layer_forward_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

void launch_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  if (p.dual) return layer_forward_dual(p, t, context);
  dispatch_terms(p.dtype, [&](auto tag, auto term) {
    using T = typename decltype(tag)::type;
    using Term = typename decltype(term)::type;
    dispatch_cell(p.cell,
                  [&](auto cell) { layer_forward<decltype(cell), T, Term, false>(p, t, context); });
  });
}

void launch_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  if (p.dual) return layer_backward_dual(p, t, context);
  dispatch_terms(p.dtype, [&](auto tag, auto term) {
    using T = typename decltype(tag)::type;
    using Term = typename decltype(term)::type;
    if (p.hidden <= 2 * kLanes<T>) return layer_backward<2, T, Term, false>(p, t, context);
    if (fewer_lanes_with_three<T>(p.hidden))
      return layer_backward<3, T, Term, false>(p, t, context);
    layer_backward<4, T, Term, false>(p, t, context);
  });
}

}  // namespace

const LayerKernels layer_kernels = {launch_forward, launch_backward, nullptr, nullptr};

}  // namespace weft::WEFT_TARGET
