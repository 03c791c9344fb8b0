// 2-d LSTM ops: a whole grid, one direction; forward, backward, double backward.
#include "rnn/mdlstm.h"

#include "rnn/rnn_layer_ops.h"
#include "rnn/rnn_plans.h"

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

namespace weft {
namespace {

using namespace layer;

const char* const kOp = "mdlstm";

struct Grid {
  GridProblem p;
  Pair input, w_ih, w_above, w_left, bias;
};

void check_sizes(const Tensor& t, at::IntArrayRef expected, const Tensor& input, const char* name) {
  TORCH_CHECK(t.sizes() == expected, "weft::", kOp, ": ", name, " must be ", expected, ", got ",
              t.sizes());
  check_same(t, input, kOp, name);
}

Grid grid_of(const Tensor& input, const Tensor& w_ih, const Tensor& w_above, const Tensor& w_left,
             const OptionalTensor& bias) {
  TORCH_CHECK(input.dim() == 4, "weft::", kOp,
              ": input must be [height, width, batch, input_size], got ", input.sizes());
  TORCH_CHECK(w_above.dim() == 2, "weft::", kOp, ": weight_above must be a matrix, got ",
              w_above.sizes());
  Grid a;
  a.p.dtype = dtype_of(input, kOp, "input");
  a.p.height = input.size(0), a.p.width = input.size(1), a.p.batch = input.size(2);
  a.p.hidden = w_above.size(1);
  const int64_t rows = kGridGates * a.p.hidden;
  check_sizes(w_ih, {rows, input.size(3)}, input, "weight_ih");
  check_sizes(w_above, {rows, a.p.hidden}, input, "weight_above");
  check_sizes(w_left, {rows, a.p.hidden}, input, "weight_left");
  if (bias) check_sizes(*bias, {rows}, input, "bias");
  a.input.value = input.contiguous(), a.w_ih.value = w_ih.contiguous();
  a.w_above.value = w_above.contiguous(), a.w_left.value = w_left.contiguous();
  if (bias) a.bias.value = bias->contiguous();
  return a;
}

bool empty(const GridProblem& p) { return p.height * p.width * p.batch * p.hidden == 0; }

at::ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
Numbers numbers(const Pair& t) {
  const auto data = [](const Tensor& x) {
    return x.defined() && !planning() ? x.const_data_ptr() : nullptr;
  };
  return {data(t.value), data(t.derivative)};
}
NumbersOut numbers_out(const Pair& t) {
  const auto data = [](const Tensor& x) {
    return x.defined() && !planning() ? x.mutable_data_ptr() : nullptr;
  };
  return {data(t.value), data(t.derivative)};
}
Pair empty_pair(const Grid& a, int64_t columns, at::ScalarType dtype) {
  const std::array<int64_t, 4> sizes = {a.p.height, a.p.width, a.p.batch, columns};
  Pair result = {empty_output(a.input.value, sizes, dtype), {}};
  if (a.p.dual) result.derivative = empty_output(a.input.value, sizes, dtype);
  return result;
}

// Sites as the steps of a layer.
Tensor as_steps(const Tensor& t) { return t.flatten(0, 1); }

struct Kept {
  Pair output, cells, gates;
};

Kept run_forward(const Grid& a) {
  const c10::DeviceGuard guard(a.input.value.device());
  const auto& kernels = kernels_for(a.input.value, grid_kernels_for);
  const auto dtype = a.input.value.scalar_type();
  const Kept r = {empty_pair(a, a.p.hidden, dtype), empty_pair(a, a.p.hidden, dtype),
                  empty_pair(a, kGridGates * a.p.hidden, dtype)};
  if (empty(a.p)) return r;
  Pair sums = {wide_product(as_steps(a.input.value), a.w_ih.value), {}};
  const auto add = [&](const Tensor& input, const Tensor& w) {
    if (!input.defined() || !w.defined()) return;
    const Tensor part = wide_product(as_steps(input), w);
    sums.derivative = sums.derivative.defined() ? at::add(sums.derivative, part) : part;
  };
  add(a.input.derivative, a.w_ih.value), add(a.input.value, a.w_ih.derivative);
  GridForward t;
  t.sums = numbers(sums), t.bias = numbers(a.bias);
  t.w_above = numbers(a.w_above), t.w_left = numbers(a.w_left);
  t.output = numbers_out(r.output), t.cells = numbers_out(r.cells);
  t.gates = numbers_out(r.gates);
  if (!grid_planned(a.p, true)) kernels.forward(a.p, t, context_for(a.input.value));
  return r;
}

// The gradient of the sums.
Pair run_backward(const Grid& a, const Tensor& grad_output, const Kept& kept) {
  const c10::DeviceGuard guard(a.input.value.device());
  const auto& kernels = kernels_for(a.input.value, grid_kernels_for);
  check_sizes(grad_output, {a.p.height, a.p.width, a.p.batch, a.p.hidden}, a.input.value,
              "grad_output");
  const Pair sums = empty_pair(a, kGridGates * a.p.hidden, a.input.value.scalar_type());
  if (empty(a.p)) return sums;
  const Pair cells = empty_pair(a, a.p.hidden, wide_type(a.input.value));
  const Tensor grad = grad_output.contiguous();
  GridBackward t;
  t.grad_output = numbers({grad, {}});
  t.cells = numbers(kept.cells), t.gates = numbers(kept.gates);
  t.w_above = numbers(a.w_above), t.w_left = numbers(a.w_left);
  t.grad_sums = numbers_out(sums), t.grad_cells = numbers_out(cells);
  if (!grid_planned(a.p, false)) kernels.backward(a.p, t, context_for(a.input.value));
  return sums;
}

// The states of the neighbours above (axis 0) or to the left (axis 1) of each site.
Tensor neighbours(const Tensor& states, int64_t axis) {
  if (states.size(axis) == 0) return states;
  const Tensor none = at::zeros_like(states.narrow(axis, 0, 1));
  return at::cat({none, states.narrow(axis, 0, states.size(axis) - 1)}, axis);
}

Tensor weight_product(const Tensor& sums, const Tensor& factor) {
  return weight_gradient({}, as_steps(sums), {as_steps(factor), {}});
}
Tensor input_product(const Tensor& sums, const Tensor& w, const Tensor& like) {
  return input_gradient({}, as_steps(sums), w).view(like.sizes());
}

// What was not asked for is an empty tensor.
template <size_t N, class Make>
auto wanted_tensors(const std::array<bool, N>& wanted, const Tensor& like, const Make& make) {
  std::array<Tensor, N> found;
  for (size_t i = 0; i < N; ++i) found[i] = wanted[i] ? make(i) : at::empty({0}, like.options());
  return std::tuple_cat(found);
}

// ---- ops ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> mdlstm(const Tensor& input, const Tensor& w_ih,
                                          const Tensor& w_above, const Tensor& w_left,
                                          const OptionalTensor& bias) {
  const Kept r = run_forward(grid_of(input, w_ih, w_above, w_left, bias));
  return {r.output.value, r.cells.value, r.gates.value};
}

using Tensors5 = decltype(std::tuple_cat(std::array<Tensor, 5>()));
using Tensors6 = decltype(std::tuple_cat(std::array<Tensor, 6>()));

Tensors5 mdlstm_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& w_ih,
                          const Tensor& w_above, const Tensor& w_left, const Tensor& output,
                          const Tensor& cells, const Tensor& gates, std::array<bool, 5> wanted) {
  const Grid a = grid_of(input, w_ih, w_above, w_left, {});
  const Kept kept = {{output.contiguous(), {}}, {cells.contiguous(), {}}, {gates.contiguous(), {}}};
  const Tensor sums = run_backward(a, grad_output, kept).value;
  return wanted_tensors(wanted, input, [&](size_t i) {
    switch (i) {
      case 0:
        return input_product(sums, a.w_ih.value, input);
      case 1:
        return weight_product(sums, a.input.value);
      case 2:
        return weight_product(sums, neighbours(kept.output.value, 0));
      case 3:
        return weight_product(sums, neighbours(kept.output.value, 1));
      default:
        return bias_gradient({}, as_steps(sums));
    }
  });
}

// The gradients of (grad_output, input, w_ih, w_above, w_left, bias) of the sum of products of u
// with what mdlstm_gradients gives.
Tensors6 mdlstm_double_backward(const OptionalTensor& u_input, const OptionalTensor& u_w_ih,
                                const OptionalTensor& u_w_above, const OptionalTensor& u_w_left,
                                const OptionalTensor& u_bias, const Tensor& grad_output,
                                const Tensor& input, const Tensor& w_ih, const Tensor& w_above,
                                const Tensor& w_left, const OptionalTensor& bias,
                                std::array<bool, 6> wanted) {
  // Half types are computed in float32, as the layers' are.
  const auto dtype = input.scalar_type(), wide = wide_type(input);
  const auto widened = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(t->to(wide)) : OptionalTensor();
  };
  Grid a = grid_of(input.to(wide), w_ih.to(wide), w_above.to(wide), w_left.to(wide), widened(bias));
  a.p.dual = true;
  const auto direction = [&](const OptionalTensor& u, Pair& of) {
    if (!u || !of.value.defined()) return;
    TORCH_CHECK(u->sizes() == of.value.sizes(), "weft::mdlstm_double_backward: u must be ",
                of.value.sizes(), ", got ", u->sizes());
    of.derivative = u->to(wide).contiguous();
  };
  direction(u_input, a.input), direction(u_w_ih, a.w_ih), direction(u_w_above, a.w_above);
  direction(u_w_left, a.w_left), direction(u_bias, a.bias);
  const Kept r = run_forward(a);
  const Pair sums = run_backward(a, grad_output.to(wide), r);
  const auto sum = [](const Tensor& x, const Tensor& y) { return y.defined() ? at::add(x, y) : x; };
  const auto of_weight = [&](const Pair& factor) {
    const Tensor first = weight_product(sums.derivative, factor.value);
    if (!factor.derivative.defined()) return first;
    return sum(first, weight_product(sums.value, factor.derivative));
  };
  const auto before = [&](int64_t axis) {
    return Pair{neighbours(r.output.value, axis), neighbours(r.output.derivative, axis)};
  };
  const auto gradient = [&](size_t i) {
    switch (i) {
      case 0:
        return r.output.derivative;
      case 1: {
        const Tensor first = input_product(sums.derivative, a.w_ih.value, input);
        if (!a.w_ih.derivative.defined()) return first;
        return sum(first, input_product(sums.value, a.w_ih.derivative, input));
      }
      case 2:
        return of_weight(a.input);
      case 3:
        return of_weight(before(0));
      case 4:
        return of_weight(before(1));
      default:
        return bias_gradient({}, as_steps(sums.derivative));
    }
  };
  return wanted_tensors(wanted, input, [&](size_t i) { return gradient(i).to(dtype); });
}

void implement(torch::Library& m) {
  m.impl("mdlstm", mdlstm);
  m.impl("mdlstm_gradients", mdlstm_gradients);
  m.impl("mdlstm_double_backward", mdlstm_double_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "mdlstm(Tensor input, Tensor w_ih, Tensor w_above, Tensor w_left, Tensor? bias) -> (Tensor "
      "output, Tensor cells, Tensor gates)");
  m.def(
      "mdlstm_gradients(Tensor grad_output, Tensor input, Tensor w_ih, Tensor w_above, Tensor "
      "w_left, Tensor output, Tensor cells, Tensor gates, bool[5] wanted) -> (Tensor input, Tensor "
      "w_ih, Tensor w_above, Tensor w_left, Tensor bias)");
  m.def(
      "mdlstm_double_backward(Tensor? u_input, Tensor? u_w_ih, Tensor? u_w_above, Tensor? "
      "u_w_left, Tensor? u_bias, Tensor grad_output, Tensor input, Tensor w_ih, Tensor w_above, "
      "Tensor w_left, Tensor? bias, bool[6] wanted) -> (Tensor grad_output, Tensor input, Tensor "
      "w_ih, Tensor w_above, Tensor w_left, Tensor bias)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
