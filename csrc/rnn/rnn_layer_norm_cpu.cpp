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

// Calls `body(row)` for all; a thread takes whole runs of rows of `width` numbers.
template <class Body>
void each_row_of(int64_t rows, int64_t run, int64_t width, const Context& context,
                 const Body& body) {
  const int64_t grain = kNormGrain / (run * width + 1) + 1;
  parallel_for(context, ceil_div(rows, run), grain, [&](int64_t from, int64_t to) {
    for (int64_t row = from * run; row < to * run && row < rows; ++row) body(row);
  });
}

}  // namespace

void normalise_rows(const LayerProblem& p, const NormForward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    using M = LayerMath<T, decltype(dual)::value>;
    const int64_t blocks = t.end - t.first, column = t.first * p.hidden;
    each_row_of(t.rows, 1, blocks * p.hidden, context, [&](int64_t row) {
      normalise_blocks<M, T>(part<Acc>(t.products, row * p.gates() * p.hidden + column),
                             part<T>(t.scale, column), p.hidden, blocks,
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
    const int64_t blocks = t.end - t.first, column = t.first * p.hidden;
    each_row_of(t.rows, t.run, blocks * p.hidden, context, [&](int64_t row) {
      const int64_t at = row * width + column;
      const NumbersOut grad_scale = shifted<Acc>(t.grad_scale, row / t.run * width + column);
      if (row % t.run == 0) {
        fill(static_cast<Acc*>(grad_scale.value), blocks * p.hidden, Acc{0});
        if constexpr (M::kDual)
          fill(static_cast<Acc*>(grad_scale.derivative), blocks * p.hidden, Acc{0});
      }
      normalise_blocks_back<M, T>(part<T>(t.grad, at), part<T>(t.products, at),
                                  part<T>(t.scale, column), p.hidden, blocks,
                                  shifted<T>(t.grad_products, at), grad_scale);
    });
  });
}

}  // namespace weft::WEFT_TARGET
