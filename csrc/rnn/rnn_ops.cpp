// Recurrent cell ops: check the arguments, complete them into a CellProblem, allocate, run.
#include "rnn/rnn_ops.h"
#include "ops_common.h"
#include "rnn/rnn_plans.h"
#include "rnn/rnn_products.h"

#include <c10/core/DeviceGuard.h>

#include <optional>
#include <vector>

namespace weft {
namespace {

using at::Tensor;

constexpr int64_t kSums = 4;  // columns of the gates kept for backward

// ---- checks ------------------------------------------------------------------------------------

// Throws unless `state` is [B, H] in the dtype of `input`.
void check_state(const Tensor& state, const Tensor& input, int64_t hidden, const char* op,
                 const char* name) {
  TORCH_CHECK(state.dim() == 2, "weft::", op, ": ", name, " must be [batch, hidden_size], got ",
              state.sizes());
  TORCH_CHECK(state.size(0) == input.size(0), "weft::", op, ": Input batch size ", input.size(0),
              " doesn't match ", name, " batch size ", state.size(0));
  TORCH_CHECK(state.size(1) == hidden, "weft::", op, ": ", name,
              " has inconsistent hidden_size: got ", state.size(1), ", expected ", hidden);
  check_same(state, input, op, name);
}

void check_bias(const OptionalTensor& bias, const Tensor& input, int64_t rows, const char* op,
                const char* name) {
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows, "weft::", op, ": ", name, " must be [",
              rows, "], got ", bias->sizes());
  check_same(*bias, input, op, name);
}

CellProblem problem_for(const Tensor& input, const Tensor& h, const Tensor& w_ih,
                        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        int64_t gates, const char* op) {
  TORCH_CHECK(input.dim() == 2, "weft::", op, ": input must be [batch, input_size], got ",
              input.sizes());
  TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2, "weft::", op,
              ": weights must be matrices, got weight_ih ", w_ih.sizes(), " and weight_hh ",
              w_hh.sizes());
  CellProblem p;
  p.dtype = dtype_of(input, op, "input");
  p.batch = input.size(0);
  p.input = w_ih.size(1);
  p.hidden = w_hh.size(1);
  TORCH_CHECK(input.size(1) == p.input, "weft::", op, ": input has inconsistent input_size: got ",
              input.size(1), " expected ", p.input);
  const int64_t rows = gates * p.hidden;
  TORCH_CHECK(w_ih.size(0) == rows, "weft::", op, ": weight_ih first dim must be ", gates,
              " * hidden_size = ", rows, ", but got ", w_ih.size(0));
  TORCH_CHECK(w_hh.size(0) == rows, "weft::", op, ": weight_hh first dim must be ", gates,
              " * hidden_size = ", rows, ", but got ", w_hh.size(0));
  check_state(h, input, p.hidden, op, "hidden0");
  check_same(w_ih, input, op, "weight_ih");
  check_same(w_hh, input, op, "weight_hh");
  check_bias(b_ih, input, rows, op, "bias_ih");
  check_bias(b_hh, input, rows, op, "bias_hh");
  return p;
}

// The problem of backward: gates are what forward kept.
CellProblem problem_of_gates(const Tensor& gates, const char* op) {
  TORCH_CHECK(gates.dim() == 2 && gates.size(1) % kSums == 0, "weft::", op,
              ": gates must be [batch, 4 * hidden_size], got ", gates.sizes());
  CellProblem p;
  p.dtype = dtype_of(gates, op, "gates");
  p.batch = gates.size(0);
  p.hidden = gates.size(1) / kSums;
  return p;
}

void check_grad(const Tensor& grad, const Tensor& gates, int64_t columns, const char* op,
                const char* name) {
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == gates.size(0) && grad.size(1) == columns,
              "weft::", op, ": ", name, " must be [", gates.size(0), ", ", columns, "], got ",
              grad.sizes());
  check_same(grad, gates, op, name);
}

// A contiguous tensor for a kernel to read; null if absent.
class Source {
 public:
  explicit Source(const Tensor& t) : held_(t.expect_contiguous()) {}
  Source(const OptionalTensor& t, const Tensor& gates, int64_t columns, const char* op,
         const char* name) {
    if (!t) return;
    check_grad(*t, gates, columns, op, name);
    held_ = t->expect_contiguous();
  }
  explicit Source(const OptionalTensor& t) {
    if (t) held_ = t->expect_contiguous();
  }
  const void* data() const { return held_->defined() ? held_->const_data_ptr() : nullptr; }

 private:
  c10::MaybeOwned<Tensor> held_ = c10::MaybeOwned<Tensor>::owned(Tensor());
};

// ---- LSTM --------------------------------------------------------------------------------------

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& h, const Tensor& c,
                                             const Tensor& w_ih, const Tensor& w_hh,
                                             const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                             bool keep_gates) {
  const char* op = "lstm_cell";
  const CellProblem p = problem_for(input, h, w_ih, w_hh, b_ih, b_hh, 4, op);
  check_state(c, input, p.hidden, op, "hidden1");
  const auto& kernels = kernels_for(input, rnn_kernels_for);
  const c10::DeviceGuard guard(input.device());
  Tensor h_next = empty_output(input, {p.batch, p.hidden});
  Tensor c_next = empty_output(input, {p.batch, p.hidden});
  Tensor gates = empty_output(input, {keep_gates ? p.batch : 0, kSums * p.hidden});
  if (p.units() == 0 || cell_planned(p, op, 4, keep_gates ? 6 : 2)) return {h_next, c_next, gates};
  const Source x(input), h_(h), c_(c), wi(w_ih), wh(w_hh), bi(b_ih), bh(b_hh);
  kernels.lstm_cell(p,
                    {x.data(), h_.data(), c_.data(), wi.data(), wh.data(), bi.data(), bh.data(),
                     h_next.mutable_data_ptr(), c_next.mutable_data_ptr(),
                     keep_gates ? gates.mutable_data_ptr() : nullptr},
                    context_for(input));
  return {h_next, c_next, gates};
}

namespace {

std::tuple<Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_h,
                                              const OptionalTensor& grad_c, const Tensor& gates,
                                              const Tensor& c, const Tensor& c_next) {
  const char* op = "lstm_cell_backward";
  const CellProblem p = problem_of_gates(gates, op);
  const auto& kernels = kernels_for(gates, rnn_kernels_for);
  const c10::DeviceGuard guard(gates.device());
  const Source gh(grad_h, gates, p.hidden, op, "grad_h"), gc(grad_c, gates, p.hidden, op, "grad_c");
  const Source s(gates), before(c, gates, p.hidden, op, "c"),
      after(c_next, gates, p.hidden, op, "c_next");
  Tensor grad_gates = empty_output(gates, gates.sizes());
  Tensor grad_c_prev = empty_output(gates, {p.batch, p.hidden});
  if (p.units() > 0 && !elements_planned(p, op, 13))
    kernels.lstm_backward(p,
                          {gh.data(), gc.data(), s.data(), before.data(), after.data(),
                           grad_gates.mutable_data_ptr(), grad_c_prev.mutable_data_ptr()},
                          context_for(gates));
  return {grad_gates, grad_c_prev};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_cell_double_backward(
    const OptionalTensor& u_gates, const OptionalTensor& u_c, const OptionalTensor& grad_h,
    const OptionalTensor& grad_c, const Tensor& gates, const Tensor& c) {
  const char* op = "lstm_cell_double_backward";
  const CellProblem p = problem_of_gates(gates, op);
  const auto& kernels = kernels_for(gates, rnn_kernels_for);
  const c10::DeviceGuard guard(gates.device());
  const Source ug(u_gates, gates, kSums * p.hidden, op, "u_gates");
  const Source uc(u_c, gates, p.hidden, op, "u_c"), gh(grad_h, gates, p.hidden, op, "grad_h"),
      gc(grad_c, gates, p.hidden, op, "grad_c"), before(c, gates, p.hidden, op, "c"), s(gates);
  Tensor of_grad_h = empty_output(gates, {p.batch, p.hidden});
  Tensor of_grad_c = empty_output(gates, {p.batch, p.hidden});
  Tensor of_gates = empty_output(gates, gates.sizes());
  Tensor of_c = empty_output(gates, {p.batch, p.hidden});
  if (p.units() > 0 && !elements_planned(p, op, 21))
    kernels.lstm_double_backward(
        p,
        {ug.data(), uc.data(), gh.data(), gc.data(), s.data(), before.data(),
         of_grad_h.mutable_data_ptr(), of_grad_c.mutable_data_ptr(), of_gates.mutable_data_ptr(),
         of_c.mutable_data_ptr()},
        context_for(gates));
  return {of_grad_h, of_grad_c, of_gates, of_c};
}

// ---- GRU ---------------------------------------------------------------------------------------

}  // namespace

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& h, const Tensor& w_ih,
                                    const Tensor& w_hh, const OptionalTensor& b_ih,
                                    const OptionalTensor& b_hh, bool keep_gates) {
  const CellProblem p = problem_for(input, h, w_ih, w_hh, b_ih, b_hh, 3, "gru_cell");
  const auto& kernels = kernels_for(input, rnn_kernels_for);
  const c10::DeviceGuard guard(input.device());
  Tensor h_next = empty_output(input, {p.batch, p.hidden});
  Tensor gates = empty_output(input, {keep_gates ? p.batch : 0, kSums * p.hidden});
  if (p.units() == 0 || cell_planned(p, "gru_cell", 3, keep_gates ? 5 : 1)) return {h_next, gates};
  const Source x(input), h_(h), wi(w_ih), wh(w_hh), bi(b_ih), bh(b_hh);
  kernels.gru_cell(
      p,
      {x.data(), h_.data(), nullptr, wi.data(), wh.data(), bi.data(), bh.data(),
       h_next.mutable_data_ptr(), nullptr, keep_gates ? gates.mutable_data_ptr() : nullptr},
      context_for(input));
  return {h_next, gates};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_h, const Tensor& gates,
                                                     const Tensor& h) {
  const char* op = "gru_cell_backward";
  const CellProblem p = problem_of_gates(gates, op);
  const auto& kernels = kernels_for(gates, rnn_kernels_for);
  const c10::DeviceGuard guard(gates.device());
  const Source gh(grad_h, gates, p.hidden, op, "grad_h"), before(h, gates, p.hidden, op, "h"),
      s(gates);
  Tensor grad_x_gates = empty_output(gates, {p.batch, 3 * p.hidden});
  Tensor grad_h_gates = empty_output(gates, {p.batch, 3 * p.hidden});
  Tensor grad_h_prev = empty_output(gates, {p.batch, p.hidden});
  if (p.units() > 0 && !elements_planned(p, op, 13))
    kernels.gru_backward(p,
                         {gh.data(), s.data(), before.data(), grad_x_gates.mutable_data_ptr(),
                          grad_h_gates.mutable_data_ptr(), grad_h_prev.mutable_data_ptr()},
                         context_for(gates));
  return {grad_x_gates, grad_h_gates, grad_h_prev};
}

std::tuple<Tensor, Tensor, Tensor> gru_cell_double_backward(const OptionalTensor& u_x,
                                                            const OptionalTensor& u_h,
                                                            const OptionalTensor& u_prev,
                                                            const Tensor& grad_h,
                                                            const Tensor& gates, const Tensor& h) {
  const char* op = "gru_cell_double_backward";
  const CellProblem p = problem_of_gates(gates, op);
  const auto& kernels = kernels_for(gates, rnn_kernels_for);
  const c10::DeviceGuard guard(gates.device());
  const Source ux(u_x, gates, 3 * p.hidden, op, "u_x"), uh(u_h, gates, 3 * p.hidden, op, "u_h"),
      up(u_prev, gates, p.hidden, op, "u_prev"), gh(grad_h, gates, p.hidden, op, "grad_h"),
      before(h, gates, p.hidden, op, "h"), s(gates);
  Tensor of_grad_h = empty_output(gates, {p.batch, p.hidden});
  Tensor of_gates = empty_output(gates, gates.sizes());
  Tensor of_h = empty_output(gates, {p.batch, p.hidden});
  if (p.units() > 0 && !elements_planned(p, op, 20))
    kernels.gru_double_backward(
        p,
        {ux.data(), uh.data(), up.data(), gh.data(), s.data(), before.data(),
         of_grad_h.mutable_data_ptr(), of_gates.mutable_data_ptr(), of_h.mutable_data_ptr()},
        context_for(gates));
  return {of_grad_h, of_gates, of_h};
}

// ---- Elman -------------------------------------------------------------------------------------

}  // namespace

Tensor rnn_cell(const Tensor& input, const Tensor& h, const Tensor& w_ih, const Tensor& w_hh,
                const OptionalTensor& b_ih, const OptionalTensor& b_hh, bool relu) {
  const CellProblem p = problem_for(input, h, w_ih, w_hh, b_ih, b_hh, 1, "rnn_cell");
  const auto& kernels = kernels_for(input, rnn_kernels_for);
  const c10::DeviceGuard guard(input.device());
  Tensor h_next = empty_output(input, {p.batch, p.hidden});
  if (p.units() == 0 || cell_planned(p, relu ? "rnn_relu_cell" : "rnn_tanh_cell", 1, 1))
    return h_next;
  const Source x(input), h_(h), wi(w_ih), wh(w_hh), bi(b_ih), bh(b_hh);
  (relu ? kernels.rnn_relu_cell : kernels.rnn_tanh_cell)(
      p,
      {x.data(), h_.data(), nullptr, wi.data(), wh.data(), bi.data(), bh.data(),
       h_next.mutable_data_ptr(), nullptr, nullptr},
      context_for(input));
  return h_next;
}

namespace {

Tensor rnn_cell_backward(const Tensor& grad_h, const Tensor& h_next, bool relu) {
  const char* op = "rnn_cell_gradients";
  TORCH_CHECK(h_next.dim() == 2, "weft::", op, ": h_next must be [batch, hidden_size], got ",
              h_next.sizes());
  check_grad(grad_h, h_next, h_next.size(1), op, "grad_h");
  CellProblem p;
  p.dtype = dtype_of(h_next, op, "h_next");
  p.batch = h_next.size(0);
  p.hidden = h_next.size(1);
  const auto& kernels = kernels_for(h_next, rnn_kernels_for);
  const c10::DeviceGuard guard(h_next.device());
  const Source g(grad_h), after(h_next);
  Tensor grad_sums = empty_output(h_next, {p.batch, p.hidden});
  if (p.units() > 0 && !elements_planned(p, "rnn_cell_backward", 3))
    kernels.rnn_backward(p, {g.data(), after.data(), grad_sums.mutable_data_ptr(), relu},
                         context_for(h_next));
  return grad_sums;
}

// ---- all gradients of a cell at once ---------------------------------------------------------

// Backward without a graph of its own: one op instead of a dozen, since a small cell's time goes to
// calls. `wanted` says which of a cell's gradients are returned, in the order of its arguments;
// both biases have the same gradient in the LSTM.

}  // namespace

std::vector<Tensor> lstm_cell_gradients(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensor& gates, const OptionalTensor& input,
                                        const OptionalTensor& h, const Tensor& c,
                                        const Tensor& c_next, const OptionalTensor& w_ih,
                                        const OptionalTensor& w_hh, std::array<bool, 6> wanted) {
  const auto [grad, grad_c_prev] = lstm_cell_backward(grad_h, grad_c, gates, c, c_next);
  std::vector<Tensor> result;
  result.reserve(wanted.size());
  if (wanted[0]) result.push_back(product(grad, false, *w_ih));
  if (wanted[1]) result.push_back(product(grad, false, *w_hh));
  if (wanted[2]) result.push_back(grad_c_prev);
  if (wanted[3]) result.push_back(product(grad, true, *input));
  if (wanted[4]) result.push_back(product(grad, true, *h));
  if (wanted[5]) result.push_back(column_sums(grad));
  return result;
}

std::vector<Tensor> gru_cell_gradients(const Tensor& grad_h, const Tensor& gates,
                                       const OptionalTensor& input, const Tensor& h,
                                       const OptionalTensor& w_ih, const OptionalTensor& w_hh,
                                       std::array<bool, 6> wanted) {
  const auto [grad_x, grad_hidden, grad_prev] = gru_cell_backward(grad_h, gates, h);
  std::vector<Tensor> result;
  result.reserve(wanted.size());
  if (wanted[0]) result.push_back(product(grad_x, false, *w_ih));
  if (wanted[1]) result.push_back(product(grad_hidden, false, *w_hh, grad_prev));
  if (wanted[2]) result.push_back(product(grad_x, true, *input));
  if (wanted[3]) result.push_back(product(grad_hidden, true, h));
  if (wanted[4]) result.push_back(column_sums(grad_x));
  if (wanted[5]) result.push_back(column_sums(grad_hidden));
  return result;
}

std::vector<Tensor> rnn_cell_gradients(const Tensor& grad_h, const Tensor& h_next,
                                       const OptionalTensor& input, const OptionalTensor& h,
                                       const OptionalTensor& w_ih, const OptionalTensor& w_hh,
                                       bool relu, std::array<bool, 5> wanted) {
  const Tensor grad = rnn_cell_backward(grad_h, h_next, relu);
  std::vector<Tensor> result;
  result.reserve(wanted.size());
  if (wanted[0]) result.push_back(product(grad, false, *w_ih));
  if (wanted[1]) result.push_back(product(grad, false, *w_hh));
  if (wanted[2]) result.push_back(product(grad, true, *input));
  if (wanted[3]) result.push_back(product(grad, true, *h));
  if (wanted[4]) result.push_back(column_sums(grad));
  return result;
}

namespace {

void implement(torch::Library& m) {
  m.impl("lstm_cell", lstm_cell);
  m.impl("lstm_cell_backward", lstm_cell_backward);
  m.impl("lstm_cell_double_backward", lstm_cell_double_backward);
  m.impl("lstm_cell_gradients", lstm_cell_gradients);
  m.impl("gru_cell", gru_cell);
  m.impl("gru_cell_backward", gru_cell_backward);
  m.impl("gru_cell_double_backward", gru_cell_double_backward);
  m.impl("gru_cell_gradients", gru_cell_gradients);
  m.impl("rnn_cell", rnn_cell);
  m.impl("rnn_cell_gradients", rnn_cell_gradients);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "lstm_cell(Tensor input, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, bool keep_gates) -> (Tensor h_next, Tensor c_next, Tensor gates)");
  m.def(
      "lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor c, Tensor c_next) "
      "-> (Tensor grad_gates, Tensor grad_c_prev)");
  m.def(
      "lstm_cell_double_backward(Tensor? u_gates, Tensor? u_c, Tensor? grad_h, Tensor? grad_c, "
      "Tensor gates, Tensor c) -> (Tensor of_grad_h, Tensor of_grad_c, Tensor of_gates, "
      "Tensor of_c)");
  m.def(
      "lstm_cell_gradients(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor? input, Tensor? h, "
      "Tensor c, Tensor c_next, Tensor? w_ih, Tensor? w_hh, bool[6] wanted) -> Tensor[]");
  m.def(
      "gru_cell(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "bool keep_gates) -> (Tensor h_next, Tensor gates)");
  m.def(
      "gru_cell_backward(Tensor grad_h, Tensor gates, Tensor h) -> (Tensor grad_x_gates, "
      "Tensor grad_h_gates, Tensor grad_h_prev)");
  m.def(
      "gru_cell_double_backward(Tensor? u_x, Tensor? u_h, Tensor? u_prev, Tensor grad_h, "
      "Tensor gates, Tensor h) -> (Tensor of_grad_h, Tensor of_gates, Tensor of_h)");
  m.def(
      "gru_cell_gradients(Tensor grad_h, Tensor gates, Tensor? input, Tensor h, Tensor? w_ih, "
      "Tensor? w_hh, bool[6] wanted) -> Tensor[]");
  m.def(
      "rnn_cell(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "bool relu) -> Tensor");
  m.def(
      "rnn_cell_gradients(Tensor grad_h, Tensor h_next, Tensor? input, Tensor? h, Tensor? w_ih, "
      "Tensor? w_hh, bool relu, bool[5] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
