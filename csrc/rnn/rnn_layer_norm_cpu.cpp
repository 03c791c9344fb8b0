// Layer normalisation of all steps' input products on CPU, and its backward; threads split rows.
// Bound: bytes.
#include "rnn/rnn_layer_norm_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int64_t kNormGrain = 1 << 13;  // numbers that are worth a thread

// Calls `body(tag, dual)` with the element type and whether numbers are dual.
template <class Body>
void dispatch(const LayerProblem& p, const Body& body) {
  if (p.dual) {
    if (p.dtype == DType::f64) return body(TypeTag<double>{}, std::true_type{});
    return body(TypeTag<float>{}, std::true_type{});
  }
  dispatch_dtype(p.dtype, [&](auto tag) { body(tag, std::false_type{}); });
}

// Calls `body(row, gate)` for all; a thread takes whole runs of rows.
template <class Body>
void each_block(const LayerProblem& p, int64_t rows, int64_t run, int64_t first, int64_t end,
                const Context& context, const Body& body) {
  const int64_t grain = kNormGrain / (run * (end - first) * p.hidden + 1) + 1;
  parallel_for(context, ceil_div(rows, run), grain, [&](int64_t from, int64_t to) {
    for (int64_t row = from * run; row < to * run && row < rows; ++row)
      for (int64_t gate = first; gate < end; ++gate) body(row, gate);
  });
}

}  // namespace

void normalise_rows(const LayerProblem& p, const NormForward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    using M = LayerMath<T, decltype(dual)::value>;
    each_block(p, t.rows, 1, t.first, t.end, context, [&](int64_t row, int64_t gate) {
      const int64_t column = gate * p.hidden;
      normalise_block<M, T>(part<Acc>(t.products, row * p.gates() * p.hidden + column),
                            part<T>(t.scale, column), p.hidden,
                            shifted<Acc>(t.out, row * t.out_row + column), {});
    });
  });
}

void normalise_rows_backward(const LayerProblem& p, const NormBackward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    using M = LayerMath<T, decltype(dual)::value>;
    using Acc = accumulate_t<T>;
    const int64_t width = p.gates() * p.hidden;
    each_block(p, t.rows, t.run, t.first, t.end, context, [&](int64_t row, int64_t gate) {
      const int64_t column = gate * p.hidden, at = row * width + column;
      const NumbersOut grad_scale = shifted<Acc>(t.grad_scale, row / t.run * width + column);
      if (row % t.run == 0) {
        fill(static_cast<Acc*>(grad_scale.value), p.hidden, Acc{0});
        if constexpr (M::kDual) fill(static_cast<Acc*>(grad_scale.derivative), p.hidden, Acc{0});
      }
      normalise_block_back<M, T>(part<T>(t.grad, at), part<T>(t.products, at),
                                 part<T>(t.scale, column), p.hidden,
                                 shifted<T>(t.grad_products, at), grad_scale);
    });
  });
}

}  // namespace weft::WEFT_TARGET
