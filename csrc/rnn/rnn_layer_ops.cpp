// Recurrent layer ops: one direction of one layer, all steps; forward, backward, double backward.
#include "rnn/rnn_layer_ops.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

namespace weft {

// ---- gradients of the tensors ------------------------------------------------------------------

namespace layer {

std::array<Tensor, kLayerTensors> layer_gradients(const Arguments& a, const Seeds& given,
                                                  const KeptOutputs& outputs,
                                                  const std::array<bool, kLayerTensors>& wanted) {
  const auto contiguous = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  const Seeds seeds = {contiguous(given.output), contiguous(given.h_n), contiguous(given.c_n)};
  check_seeds(a, seeds);
  Outputs kept;
  kept.output.value = contiguous(outputs.output);
  kept.cells.value = contiguous(outputs.cells), kept.gates.value = contiguous(outputs.gates);
  kept.input_products.value = contiguous(outputs.input_products);
  kept.products.value = contiguous(outputs.products);
  const Gradients g = run_backward(a, seeds, kept, wanted[4]);
  // Both biases have one gradient, except in the GRU.
  const bool one_sum = g.sums.value.is_same(g.hidden_sums.value);
  // W_ih's and W_hh's are of the same sums where nothing is done to either product alone.
  const bool together = wanted[3] && wanted[4] && a.p.steps > 0 &&
                        a.p.cell != LayerCell::gru_reset_before &&
                        g.input_products.value.is_same(g.products.value);
  std::array<Tensor, 2> of_weights;
  if (together) of_weights = weight_gradients(g, g.sums.value, {a.input.value, {}}, g.before);
  const auto dtype = a.input.value.scalar_type();
  Tensor of_bias;
  const auto gradient = [&](size_t i) {
    switch (i) {
      case 0:
        return input_gradient(g, g.input_products.value, a.w_ih.value);
      case 1:
        return g.h.value.to(dtype);
      case 2:
        return g.c.value.to(dtype);
      case 3:
        if (together) return of_weights[0];
        return weight_gradient(g, g.input_products.value, {a.input.value, {}});
      case 4:
        if (together) return of_weights[1];
        if (a.p.steps == 0) return at::zeros_like(a.w_hh.value);
        return hidden_weight_gradient(a, g, g.products.value, g.before, kept.gates.value);
      case 5:
        return of_bias = bias_gradient(g, g.sums.value);
      case 6:
        if (one_sum && of_bias.defined()) return of_bias.clone();
        return bias_gradient(g, g.hidden_sums.value);
      case 7:
        return wide_gradient(a, g.peephole.value);
      case 8:
        return weight_gradient(g, g.projected.value, {g.unprojected.value, {}});
      case 9:
        return norm_gradient(a, g, g.norm_ih.value);
      default:
        return norm_gradient(a, g, g.norm_hh.value);
    }
  };
  std::array<Tensor, kLayerTensors> found;
  for (size_t i = 0; i < found.size(); ++i)
    if (wanted[i]) found[i] = gradient(i);
  return found;
}

}  // namespace layer

namespace {

using namespace layer;

// A fixed number of tensors: torch.vmap cannot take an op that gives a list. What was not asked for
// is an empty tensor.
template <int N, class Make>
auto wanted_tensors(const std::array<bool, N>& wanted, const Tensor& like, const Make& make) {
  std::array<Tensor, N> found;
  for (int i = 0; i < N; ++i) found[i] = wanted[i] ? make(i) : at::empty({0}, like.options());
  return std::tuple_cat(found);
}
using Tensors11 = decltype(std::tuple_cat(std::array<Tensor, kLayerTensors>()));
using Tensors14 = decltype(std::tuple_cat(std::array<Tensor, 14>()));

// ---- forward -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_layer(
    const Tensor& input, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& peephole, const OptionalTensor& w_hr, const OptionalTensor& norm_ih,
    const OptionalTensor& norm_hh, const OptionalTensor& lengths, const OptionalTensor& resets,
    const OptionalTensor& dropout, const OptionalTensor& zone_h, const OptionalTensor& zone_c,
    double zoneout, c10::string_view cell, bool reverse, bool keep) {
  const Arguments a =
      arguments_of({input, h0, c0, w_ih, w_hh, b_ih, b_hh, peephole, w_hr, norm_ih, norm_hh},
                   {lengths, resets, dropout, zone_h, zone_c, zoneout}, cell, reverse);
  const Outputs r = run_forward(a, keep);
  return {r.output.value,         r.h_n.value,     r.c_n.value, r.cells.value, r.gates.value,
          r.input_products.value, r.products.value};
}

// ---- gradients ---------------------------------------------------------------------------------

Tensors11 rnn_layer_gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                              const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0,
                              const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                              const OptionalTensor& peephole, const OptionalTensor& w_hr,
                              const OptionalTensor& norm_ih, const OptionalTensor& norm_hh,
                              const Tensor& output, const Tensor& cells, const Tensor& gates,
                              const Tensor& input_products, const Tensor& products,
                              const OptionalTensor& lengths, const OptionalTensor& resets,
                              const OptionalTensor& dropout, const OptionalTensor& zone_h,
                              const OptionalTensor& zone_c, double zoneout, c10::string_view cell,
                              bool reverse, std::array<bool, kLayerTensors> wanted) {
  const Arguments a =
      arguments_of({input, h0, c0, w_ih, w_hh, {}, {}, peephole, w_hr, norm_ih, norm_hh},
                   {lengths, resets, dropout, zone_h, zone_c, zoneout}, cell, reverse);
  const auto given = [](const OptionalTensor& t) { return t ? *t : Tensor(); };
  const auto found = layer_gradients(a, {given(grad_output), given(grad_h_n), given(grad_c_n)},
                                     {output, cells, gates, input_products, products}, wanted);
  return wanted_tensors<kLayerTensors>(wanted, input, [&](int i) { return found[i]; });
}

// ---- gradients of gradients --------------------------------------------------------------------

// The gradients of (grad_output, grad_h_n, grad_c_n, input, h0, c0, w_ih, w_hh, b_ih, b_hh,
// peephole, w_hr, norm_ih, norm_hh) of the sum of products of u with what rnn_layer_gradients
// gives.
Tensors14 rnn_layer_double_backward(
    const OptionalTensor& u_input, const OptionalTensor& u_h0, const OptionalTensor& u_c0,
    const OptionalTensor& u_w_ih, const OptionalTensor& u_w_hh, const OptionalTensor& u_b_ih,
    const OptionalTensor& u_b_hh, const OptionalTensor& u_peephole, const OptionalTensor& u_w_hr,
    const OptionalTensor& u_norm_ih, const OptionalTensor& u_norm_hh,
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& peephole, const OptionalTensor& w_hr, const OptionalTensor& norm_ih,
    const OptionalTensor& norm_hh, const OptionalTensor& lengths, const OptionalTensor& resets,
    const OptionalTensor& dropout, const OptionalTensor& zone_h, const OptionalTensor& zone_c,
    double zoneout, c10::string_view cell, bool reverse, std::array<bool, 14> wanted) {
  // Half types are computed in float32: their steps are rare, and dual kernels many.
  const auto dtype = input.scalar_type();
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const auto widened = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(t->to(wide)) : OptionalTensor();
  };
  Arguments a = arguments_of(
      {input.to(wide), h0.to(wide), widened(c0), w_ih.to(wide), w_hh.to(wide), widened(b_ih),
       widened(b_hh), widened(peephole), widened(w_hr), widened(norm_ih), widened(norm_hh)},
      {lengths, resets, widened(dropout), widened(zone_h), widened(zone_c), zoneout}, cell,
      reverse);
  a.p.dual = true;
  const auto direction = [&](const OptionalTensor& u, Pair& of) {
    if (!u || !of.value.defined()) return;
    TORCH_CHECK(u->sizes() == of.value.sizes(), "weft::rnn_layer_double_backward: u must be ",
                of.value.sizes(), ", got ", u->sizes());
    of.derivative = u->to(wide).contiguous();
  };
  direction(u_input, a.input), direction(u_h0, a.h0), direction(u_c0, a.c0);
  direction(u_w_ih, a.w_ih), direction(u_w_hh, a.w_hh);
  direction(u_b_ih, a.b_ih), direction(u_b_hh, a.b_hh), direction(u_peephole, a.peephole);
  direction(u_w_hr, a.w_hr), direction(u_norm_ih, a.norm_ih), direction(u_norm_hh, a.norm_hh);
  const auto given = [&](const OptionalTensor& t) {
    return t ? t->to(wide).contiguous() : Tensor();
  };
  const Seeds seeds = {given(grad_output), given(grad_h_n), given(grad_c_n)};
  check_seeds(a, seeds);

  const Outputs r = run_forward(a, true);
  const Gradients g = run_backward(a, seeds, r, wanted[7]);
  const auto sum = [](const Tensor& x, const Tensor& y) { return y.defined() ? at::add(x, y) : x; };
  const auto of_input = [&] {
    const Tensor first = input_gradient(g, g.input_products.derivative, a.w_ih.value);
    if (!a.w_ih.derivative.defined()) return first;
    return sum(first, input_gradient(g, g.input_products.value, a.w_ih.derivative));
  };
  const auto of_hidden_weight = [&] {
    if (a.p.steps == 0) return at::zeros_like(a.w_hh.value);
    const auto part = [&](const Tensor& of, const Stacked& before, const Tensor& gates) {
      return hidden_weight_gradient(a, g, of, before, gates);
    };
    const Tensor found = at::add(part(g.products.derivative, g.before, r.gates.value),
                                 part(g.products.value, g.before_derivative, r.gates.value));
    if (a.p.cell != LayerCell::gru_reset_before) return found;
    // The factor of U_n's gradient is r h, so r's derivative counts as well.
    const int64_t hidden = a.p.hidden;
    const Tensor of_reset =
        weight_gradient(g, g.products.value.narrow(2, 2 * hidden, hidden),
                        {at::mul(r.gates.derivative.narrow(2, 0, hidden), g.before.whole()), {}});
    found.narrow(0, 2 * hidden, hidden).add_(of_reset);
    return found;
  };
  const auto of_weight = [&](const Pair& of, const Pair& factor, const Tensor& weight) {
    if (a.p.steps == 0) return at::zeros(weight.sizes(), weight.options());
    const Tensor first = weight_gradient(g, of.derivative, {factor.value, {}});
    if (!factor.derivative.defined()) return first;
    return sum(first, weight_gradient(g, of.value, {factor.derivative, {}}));
  };
  const auto gradient = [&](int i) {
    switch (i) {
      case 0:
        return r.output.derivative;
      case 1:
        return r.h_n.derivative;
      case 2:
        return r.c_n.derivative;
      case 3:
        return of_input();
      case 4:
        return g.h.derivative;
      case 5:
        return g.c.derivative;
      case 6:
        return of_weight(g.input_products, a.input, a.w_ih.value);
      case 7:
        return of_hidden_weight();
      case 8:
        return bias_gradient(g, g.sums.derivative);
      case 9:
        return bias_gradient(g, g.hidden_sums.derivative);
      case 10:
        return wide_gradient(a, g.peephole.derivative);
      case 12:
        return norm_gradient(a, g, g.norm_ih.derivative);
      case 13:
        return norm_gradient(a, g, g.norm_hh.derivative);
      default:
        return of_weight(g.projected, g.unprojected, a.w_hr.value);
    }
  };
  return wanted_tensors<14>(wanted, input, [&](int i) { return gradient(i).to(dtype); });
}

void implement(torch::Library& m) {
  m.impl("rnn_layer", rnn_layer);
  m.impl("rnn_layer_gradients", rnn_layer_gradients);
  m.impl("rnn_layer_double_backward", rnn_layer_double_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "rnn_layer(Tensor input, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? peephole, Tensor? w_hr, Tensor? norm_ih, Tensor? norm_hh, Tensor? "
      "lengths, Tensor? resets, Tensor? dropout, Tensor? zone_h, Tensor? zone_c, float zoneout, "
      "str cell, bool reverse, bool keep) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, "
      "Tensor gates, Tensor input_products, Tensor products)");
  m.def(
      "rnn_layer_gradients(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? peephole, Tensor? w_hr, Tensor? "
      "norm_ih, Tensor? norm_hh, Tensor output, Tensor cells, Tensor gates, Tensor input_products, "
      "Tensor products, Tensor? lengths, Tensor? resets, Tensor? dropout, Tensor? zone_h, Tensor? "
      "zone_c, float zoneout, str cell, bool reverse, bool[11] wanted) -> (Tensor input, Tensor "
      "h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor peephole, Tensor "
      "w_hr, Tensor norm_ih, Tensor norm_hh)");
  m.def(
      "rnn_layer_double_backward(Tensor? u_input, Tensor? u_h0, Tensor? u_c0, Tensor? u_w_ih, "
      "Tensor? u_w_hh, Tensor? u_b_ih, Tensor? u_b_hh, Tensor? u_peephole, Tensor? u_w_hr, Tensor? "
      "u_norm_ih, Tensor? u_norm_hh, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor input, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? peephole, Tensor? w_hr, Tensor? norm_ih, Tensor? norm_hh, Tensor? lengths, Tensor? "
      "resets, Tensor? dropout, Tensor? zone_h, Tensor? zone_c, float zoneout, str cell, bool "
      "reverse, bool[14] wanted) -> (Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor "
      "input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor "
      "peephole, Tensor w_hr, Tensor norm_ih, Tensor norm_hh)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
