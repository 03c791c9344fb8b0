// Recurrent layer ops: one direction of one layer, all steps; check, allocate, run.
#include "gemm/gemm.h"
#include "ops_common.h"
#include "rnn/rnn_layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>
#include <vector>

namespace weft {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const char* const kOp = "rnn_layer";

// ---- checks ------------------------------------------------------------------------------------

LayerCell cell_of(c10::string_view name) {
  if (name == "lstm") return LayerCell::lstm;
  if (name == "gru") return LayerCell::gru;
  if (name == "rnn_tanh") return LayerCell::tanh;
  if (name == "rnn_relu") return LayerCell::relu;
  TORCH_CHECK_VALUE(false, "weft::", kOp,
                    ": cell must be 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu', got '", name, "'");
}

void check_sizes(const Tensor& t, at::IntArrayRef expected, const Tensor& reference,
                 const char* name) {
  TORCH_CHECK(t.sizes() == expected, "weft::", kOp, ": ", name, " must be ", expected, ", got ",
              t.sizes());
  check_same(t, reference, kOp, name);
}

void check_sizes(const OptionalTensor& t, at::IntArrayRef expected, const Tensor& reference,
                 const char* name) {
  if (t) check_sizes(*t, expected, reference, name);
}

void check_lengths(const OptionalTensor& lengths, const Tensor& input) {
  if (!lengths) return;
  TORCH_CHECK(lengths->scalar_type() == at::kLong, "weft::", kOp,
              ": lengths must be of dtype int64, got ", toString(lengths->scalar_type()));
  TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == input.size(1), "weft::", kOp,
              ": lengths must be [", input.size(1), "], got ", lengths->sizes());
  TORCH_CHECK(lengths->device() == input.device(), "weft::", kOp, ": expected lengths on ",
              input.device(), ", got ", lengths->device());
}

Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }
const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* memory(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
}
const int64_t* lengths_of(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<int64_t>() : nullptr;
}

at::ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- products ----------------------------------------------------------------------------------

// On CPU weft's own, whose bits do not depend on the number of threads; elsewhere torch's.

// op(a) b, op transposing if `transposed`.
Tensor product(const Tensor& a, bool transposed, const Tensor& b) {
  const GemmKernels* kernels = gemm_kernels_for(target_for(a));
  if (kernels == nullptr) return at::mm(transposed ? a.t() : a, b);
  PackedProblem p;
  p.dtype = dtype_of(a, kOp, "a");
  p.m = a.size(transposed ? 1 : 0), p.k = a.size(transposed ? 0 : 1), p.n = b.size(1);
  p.a_row = transposed ? 1 : a.size(1), p.a_column = transposed ? a.size(1) : 1;
  p.b_row = p.n, p.b_column = 1, p.c_row = p.n;
  Tensor result = empty_output(a, {p.m, p.n});
  if (result.numel() > 0)
    kernels->packed(p, a.const_data_ptr(), b.const_data_ptr(), result.mutable_data_ptr(),
                    context_for(a));
  return result;
}

Tensor column_sums(const Tensor& t) {
  const GemmKernels* kernels = gemm_kernels_for(target_for(t));
  if (kernels == nullptr) return t.sum(0);
  const ProductProblem p = {dtype_of(t, kOp, "t"), 1, t.size(1), t.size(0), 0, 0};
  Tensor result = empty_output(t, {p.n});
  kernels->column_sums(p, t.const_data_ptr(), result.mutable_data_ptr(), context_for(t));
  return result;
}

// Which of the [T * B] rows have a step; undefined where all are multiplied: without lengths, and
// on CUDA, where their number would have to be waited for.
Tensor taken_rows(const Tensor& lengths, const Tensor& input) {
  if (!lengths.defined() || gemm_kernels_for(target_for(input)) == nullptr) return {};
  const Tensor time = at::arange(input.size(0), lengths.options()).unsqueeze(1);
  return time.lt(lengths).flatten().nonzero().squeeze(1);
}

Tensor gather(const Tensor& rows, const Tensor& taken) {
  return taken.defined() ? rows.index_select(0, taken) : rows;
}

// W_ih x of all steps, in the accumulation type, and the distance of its rows: in the memory of
// `gates` where that fits.
std::tuple<Tensor, int64_t> input_sums(const Tensor& input, const Tensor& w_ih, const Tensor& gates,
                                       const Tensor& lengths) {
  const int64_t rows = input.size(0) * input.size(1), columns = w_ih.size(0);
  const Tensor taken = taken_rows(lengths, input);
  const Tensor x = gather(input.view({rows, input.size(2)}), taken);
  const GemmKernels* kernels = gemm_kernels_for(target_for(input));
  if (kernels == nullptr) {
    const auto wide = wide_type(input);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return {at::mm(x.to(wide), w_ih.to(wide).t()), columns};
  }
  const bool in_gates = gates.numel() > 0 && wide_type(input) == input.scalar_type();
  const Tensor sums = in_gates ? gates : empty_output(x, {rows, columns}, wide_type(x));
  const int64_t sums_row = in_gates ? gates.size(2) : columns;
  const Tensor target =
      taken.defined() ? empty_output(x, {x.size(0), columns}, wide_type(x)) : sums;
  PackedProblem p;
  p.dtype = dtype_of(input, kOp, "input");
  p.m = x.size(0), p.n = columns, p.k = x.size(1);
  p.a_row = p.k, p.a_column = 1, p.b_row = 1, p.b_column = p.k;
  p.c_row = taken.defined() ? columns : sums_row;
  p.wide = true;
  kernels->packed(p, x.const_data_ptr(), w_ih.const_data_ptr(), target.mutable_data_ptr(),
                  context_for(input));
  if (taken.defined())
    sums.view({rows, sums_row}).narrow(1, 0, columns).index_copy_(0, taken, target);
  return {sums, sums_row};
}

// ---- forward -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_layer(
    const Tensor& input, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& lengths, c10::string_view cell, bool reverse, bool keep) {
  TORCH_CHECK(input.dim() == 3, "weft::", kOp, ": input must be [steps, batch, input_size], got ",
              input.sizes());
  TORCH_CHECK(w_hh.dim() == 2, "weft::", kOp, ": weight_hh must be a matrix, got ", w_hh.sizes());
  LayerProblem p;
  p.dtype = dtype_of(input, kOp, "input");
  p.cell = cell_of(cell);
  p.steps = input.size(0), p.batch = input.size(1), p.hidden = w_hh.size(1);
  p.reverse = reverse;
  const bool is_lstm = p.cell == LayerCell::lstm, has_gates = is_lstm || p.cell == LayerCell::gru;
  const int64_t rows = p.gates() * p.hidden;
  check_sizes(w_ih, {rows, input.size(2)}, input, "weight_ih");
  check_sizes(w_hh, {rows, p.hidden}, input, "weight_hh");
  check_sizes(b_ih, {rows}, input, "bias_ih");
  check_sizes(b_hh, {rows}, input, "bias_hh");
  check_sizes(h0, {p.batch, p.hidden}, input, "h0");
  TORCH_CHECK(c0.has_value() == is_lstm, "weft::", kOp,
              ": c0 is for an LSTM, and an LSTM needs it");
  check_sizes(c0, {p.batch, p.hidden}, input, "c0");
  check_lengths(lengths, input);

  const auto& kernels = kernels_for(input, layer_kernels_for);
  const c10::DeviceGuard guard(input.device());
  Tensor output = empty_output(input, {p.steps, p.batch, p.hidden});
  Tensor h_n = empty_output(input, {p.batch, p.hidden});
  Tensor c_n = empty_output(input, {is_lstm ? p.batch : 0, p.hidden});
  Tensor cells = empty_output(input, {keep && is_lstm ? p.steps : 0, p.batch, p.hidden});
  Tensor gates = empty_output(input, {keep && has_gates ? p.steps : 0, p.batch, 4 * p.hidden});
  if (p.units() == 0 || p.steps == 0) {
    h_n.copy_(h0);
    if (is_lstm) c_n.copy_(*c0);
    return {output, h_n, c_n, cells, gates};
  }
  const Tensor x = input.contiguous(), h = h0.contiguous(), c = contiguous(c0),
               wi = w_ih.contiguous(), wh = w_hh.contiguous(), bi = contiguous(b_ih),
               bh = contiguous(b_hh), ends = contiguous(lengths);
  const auto [sums, sums_row] = input_sums(x, wi, gates, ends);
  Tensor states, cell_states;
  if (gemm_kernels_for(target_for(input)) == nullptr) {
    states = empty_output(input, {2, p.batch, p.hidden});
    if (is_lstm) cell_states = empty_output(input, {2, p.batch, p.hidden});
  }
  kernels.forward(p,
                  {data(h), data(c), data(wh), data(bi), data(bh), lengths_of(ends), data(sums),
                   sums_row, memory(output), memory(h_n), memory(c_n), memory(cells), memory(gates),
                   memory(states), memory(cell_states)},
                  context_for(input));
  return {output, h_n, c_n, cells, gates};
}

// ---- gradients ---------------------------------------------------------------------------------

// The state before each step [T, B, H].
Tensor states_before(const Tensor& output, const Tensor& h0, const Tensor& lengths, bool reverse) {
  const int64_t steps = output.size(0);
  const Tensor first = h0.unsqueeze(0);
  if (!reverse) return at::cat({first, output.slice(0, 0, steps - 1)});
  const Tensor before = at::cat({output.slice(0, 1, steps), first});
  if (!lengths.defined()) return before;
  // A row's last step is the first that it takes.
  const Tensor last = at::arange(steps, lengths.options()).unsqueeze(1).eq(lengths.sub(1));
  return at::where(last.unsqueeze(2), first, before);
}

// Those gradients of (input, h0, c0, w_ih, w_hh, b_ih, b_hh) that are wanted.
std::vector<Tensor> rnn_layer_gradients(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& output, const Tensor& cells,
    const Tensor& gates, const OptionalTensor& lengths, c10::string_view cell, bool reverse,
    std::array<bool, 7> wanted) {
  LayerProblem p;
  p.dtype = dtype_of(output, kOp, "output");
  p.cell = cell_of(cell);
  TORCH_CHECK(output.dim() == 3, "weft::", kOp, ": output must be [steps, batch, hidden], got ",
              output.sizes());
  p.steps = output.size(0), p.batch = output.size(1), p.hidden = output.size(2);
  p.reverse = reverse;
  const bool is_lstm = p.cell == LayerCell::lstm, is_gru = p.cell == LayerCell::gru;
  const int64_t columns = p.gates() * p.hidden;
  const std::array<int64_t, 3> whole = {p.steps, p.batch, p.hidden};
  const std::array<int64_t, 2> state = {p.batch, p.hidden};
  check_sizes(grad_output, whole, output, "grad_output");
  check_sizes(grad_h_n, state, output, "grad_h_n");
  check_sizes(grad_c_n, state, output, "grad_c_n");
  check_sizes(h0, state, output, "h0");
  check_sizes(c0, state, output, "c0");
  check_sizes(w_hh, {columns, p.hidden}, output, "weight_hh");
  check_sizes(w_ih, {columns, input.size(2)}, output, "weight_ih");
  if (is_lstm) check_sizes(cells, whole, output, "cells");
  if (is_lstm || is_gru) check_sizes(gates, {p.steps, p.batch, 4 * p.hidden}, output, "gates");
  check_lengths(lengths, input);

  const auto& kernels = kernels_for(output, layer_kernels_for);
  const c10::DeviceGuard guard(output.device());
  const auto wide = wide_type(output);
  const auto wide_state = [&](const OptionalTensor& from) {
    Tensor result = empty_output(output, state, wide);
    if (from) {
      result.copy_(*from);
    } else {
      result.zero_();
    }
    return result;
  };
  const Tensor grad_h = wide_state(grad_h_n), grad_c = is_lstm ? wide_state(grad_c_n) : Tensor();
  const Tensor grad_sums = empty_output(output, {p.steps, p.batch, columns});
  const Tensor grad_hidden = is_gru ? empty_output(output, {p.steps, p.batch, columns}) : Tensor();
  const Tensor h = h0.contiguous(), c = contiguous(c0), wh = w_hh.contiguous(),
               out = output.contiguous(), seen = contiguous(grad_output),
               kept_cells = cells.contiguous(), kept_gates = gates.contiguous(),
               ends = contiguous(lengths);
  Tensor before;
  if ((is_gru || wanted[4]) && p.steps > 0) before = states_before(out, h, ends, reverse);
  Tensor direct;
  if (gemm_kernels_for(target_for(output)) == nullptr) direct = empty_output(output, state, wide);
  if (p.units() > 0 && p.steps > 0)
    kernels.backward(p,
                     {data(seen), data(kept_gates), data(kept_cells), data(c), data(before),
                      data(out), data(wh), lengths_of(ends), memory(grad_sums), memory(grad_hidden),
                      memory(grad_h), memory(grad_c), memory(direct)},
                     context_for(output));

  const int64_t rows = p.steps * p.batch;
  const Tensor taken = taken_rows(ends, output);
  const Tensor of_x = gather(grad_sums.view({rows, columns}), taken);
  const Tensor of_h = is_gru ? gather(grad_hidden.view({rows, columns}), taken) : of_x;
  const auto weight_gradient = [&](const Tensor& of_sums, const Tensor& factor) {
    if (of_sums.size(0) == 0) return at::zeros({columns, factor.size(-1)}, output.options());
    const Tensor flat = factor.contiguous().view({rows, factor.size(-1)});
    return product(of_sums, true, gather(flat, taken));
  };
  const auto bias_gradient = [&](const Tensor& of_sums) {
    return of_sums.size(0) == 0 ? at::zeros({columns}, output.options()) : column_sums(of_sums);
  };
  const auto input_gradient = [&] {
    const Tensor found = product(of_x, false, w_ih.contiguous());
    if (!taken.defined()) return found.view(input.sizes());
    Tensor whole = at::zeros({rows, input.size(2)}, output.options());
    return whole.index_copy_(0, taken, found).view(input.sizes());
  };
  std::vector<Tensor> result;
  if (wanted[0]) result.push_back(input_gradient());
  if (wanted[1]) result.push_back(grad_h.to(output.scalar_type(), false, /*copy=*/true));
  if (wanted[2]) result.push_back(grad_c.to(output.scalar_type(), false, /*copy=*/true));
  if (wanted[3]) result.push_back(weight_gradient(of_x, input));
  if (wanted[4]) result.push_back(weight_gradient(of_h, before.defined() ? before : output));
  if (wanted[5]) result.push_back(bias_gradient(of_x));
  if (wanted[6]) result.push_back(bias_gradient(of_h));
  return result;
}

void implement(torch::Library& m) {
  m.impl("rnn_layer", rnn_layer);
  m.impl("rnn_layer_gradients", rnn_layer_gradients);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "rnn_layer(Tensor input, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? lengths, str cell, bool reverse, bool keep) -> (Tensor output, "
      "Tensor h_n, Tensor c_n, Tensor cells, Tensor gates)");
  m.def(
      "rnn_layer_gradients(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor output, Tensor cells, Tensor gates, "
      "Tensor? lengths, str cell, bool reverse, bool[7] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
