// The two passes of a recurrent layer on tensors: allocate, run, and the products around.
#include "core/window.h"
#include "rnn/rnn_layer_ops.h"
#include "rnn/rnn_plans.h"
#include "rnn/rnn_products.h"
#include "rnn/rnn_sequence_plan.h"

#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <tuple>

namespace weft::layer {

namespace {

// ---- pointers ----------------------------------------------------------------------------------

const void* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 && !planning() ? t.const_data_ptr() : nullptr;
}
void* memory(const Tensor& t) {
  return t.defined() && t.numel() > 0 && !planning() ? t.mutable_data_ptr() : nullptr;
}
Numbers numbers(const Pair& t) { return {data(t.value), data(t.derivative)}; }
NumbersOut numbers_out(const Pair& t) { return {memory(t.value), memory(t.derivative)}; }

LayerMasks masks_of(const Arguments& a) {
  return {static_cast<const int64_t*>(data(a.lengths)), static_cast<const bool*>(data(a.resets)),
          data(a.dropout), data(a.zone_h), data(a.zone_c)};
}

at::ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
const Tensor& reference(const Arguments& a) { return a.input.value; }
bool on_cpu_kernels(const Tensor& t) { return product_kernels_for(t) != nullptr; }

Pair empty_pair(const Arguments& a, at::IntArrayRef sizes, at::ScalarType dtype) {
  Pair result = {empty_output(reference(a), sizes, dtype), {}};
  if (a.p.dual) result.derivative = empty_output(reference(a), sizes, dtype);
  return result;
}
Pair empty_pair(const Arguments& a, at::IntArrayRef sizes) {
  return empty_pair(a, sizes, reference(a).scalar_type());
}

template <class Change>
Pair each(const Pair& t, const Change& change) {
  return {t.value.defined() ? change(t.value) : Tensor(),
          t.derivative.defined() ? change(t.derivative) : Tensor()};
}

// ---- products ----------------------------------------------------------------------------------

// Which of the [T * B] rows have a step; undefined where all are multiplied: without lengths, and
// on CUDA, where their number would have to be waited for. A plan counts all.
Tensor taken_rows(const Arguments& a) {
  if (!a.lengths.defined() || !on_cpu_kernels(reference(a)) || planning()) return {};
  const Tensor time = at::arange(a.p.steps, a.lengths.options()).unsqueeze(1);
  return time.lt(a.lengths).flatten().nonzero().squeeze(1);
}

Tensor gather(const Tensor& rows, const Tensor& taken) {
  if (!taken.defined()) return rows;
  Tensor result = empty_output(rows, {taken.size(0), rows.size(1)});
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  at::index_select_out(result, rows, 0, taken);
  return result;
}

// True if what a step reads in the accumulation type may lie where it then keeps its gates.
bool in_gates_memory(const Tensor& input, const Tensor& gates) {
  return gates.defined() && gates.numel() > 0 && wide_type(input) == input.scalar_type();
}

// `input` w^T of all steps, in the accumulation type, and the distance of its rows: in the memory
// of `gates` where that fits.
std::tuple<Tensor, int64_t> input_sums(const Tensor& input, const Tensor& w, const Tensor& gates,
                                       const Tensor& taken) {
  const int64_t rows = input.size(0) * input.size(1), columns = w.size(0);
  const Tensor x = gather(input.view({rows, input.size(2)}), taken);
  const GemmKernels* kernels = product_kernels_for(input);
  const bool planned =
      product_planned(dtype_of(input, "rnn_layer", "input"), x.size(0), columns, x.size(1));
  if (kernels == nullptr) {
    const auto wide = wide_type(input);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return {at::mm(x.to(wide), w.to(wide).t()), columns};
  }
  const bool in_gates = in_gates_memory(input, gates);
  const Tensor sums = in_gates ? gates : empty_output(x, {rows, columns}, wide_type(x));
  const int64_t sums_row = in_gates ? gates.size(2) : columns;
  const Tensor target =
      taken.defined() ? empty_output(x, {x.size(0), columns}, wide_type(x)) : sums;
  PackedProblem p;
  p.dtype = dtype_of(input, "rnn_layer", "input");
  p.m = x.size(0), p.n = columns, p.k = x.size(1);
  p.a_row = p.k, p.a_column = 1, p.b_row = 1, p.b_column = p.k;
  p.c_row = taken.defined() ? columns : sums_row;
  p.wide = true;
  if (!planned)
    kernels->packed(p, x.const_data_ptr(), w.const_data_ptr(), target.mutable_data_ptr(),
                    context_for(input));
  if (taken.defined())
    sums.view({rows, sums_row}).narrow(1, 0, columns).index_copy_(0, taken, target);
  return {sums, sums_row};
}

// The derivative of the input's sums; undefined where neither factor has one.
Tensor derivative_sums(const Arguments& a, const Tensor& taken) {
  Tensor result;
  const auto add = [&](const Tensor& input, const Tensor& w) {
    if (!input.defined() || !w.defined()) return;
    const Tensor sums = std::get<0>(input_sums(input, w, {}, taken));
    result = result.defined() ? at::add(result, sums) : sums;
  };
  add(a.input.derivative, a.w_ih.value);
  add(a.input.value, a.w_ih.derivative);
  return result;
}

// The state before each step [T, B, S], as the product with W_hh sees it if `dropped`.
Stacked states_before(const Arguments& a, const Tensor& output, const Tensor& h0, bool dropped) {
  const int64_t steps = output.size(0);
  const Tensor first =
      h0.defined() ? h0.unsqueeze(0) : at::zeros({1, a.p.batch, a.p.state()}, output.options());
  const Stacked before = a.p.reverse ? Stacked{output.slice(0, 1, steps), first}
                                     : Stacked{first, output.slice(0, 0, steps - 1)};
  const bool ends_first = a.p.reverse && a.lengths.defined();
  dropped = dropped && a.dropout.defined();
  if (!ends_first && !a.resets.defined() && !dropped) return before;
  Tensor whole = before.whole();
  if (ends_first) {  // a row's last step is the first that it takes
    const Tensor last = at::arange(steps, a.lengths.options()).unsqueeze(1).eq(a.lengths.sub(1));
    whole = at::where(last.unsqueeze(2), first, whole);
  }
  if (a.resets.defined())
    whole = at::where(a.resets.unsqueeze(2), at::zeros({}, whole.options()), whole);
  return {dropped ? at::mul(whole, a.dropout) : whole, {}};
}

// ---- passes ------------------------------------------------------------------------------------

// `output` is where the states go, if it is defined.
Outputs run_steps(const Arguments& a, bool keep, const Tensor& output) {
  const LayerProblem& p = a.p;
  const auto& kernels = kernels_for(reference(a), layer_kernels_for);
  const c10::DeviceGuard guard(reference(a).device());
  const bool keep_gates = keep && (!p.is_elman() || p.zoneout > 0);
  Outputs r;
  r.output = output.defined() ? Pair{output, {}} : empty_pair(a, {p.steps, p.batch, p.state()});
  r.h_n = empty_pair(a, {p.batch, p.state()});
  r.c_n = empty_pair(a, {p.has_cell() ? p.batch : 0, p.hidden});
  r.cells = empty_pair(a, {keep && p.has_cell() ? p.steps : 0, p.batch, p.hidden});
  r.gates = empty_pair(a, {keep_gates ? p.steps : 0, p.batch, p.kept() * p.hidden});
  const bool normalised = a.norm_hh.value.defined();
  const int64_t columns = p.gates() * p.hidden, kept_steps = keep && normalised ? p.steps : 0;
  r.input_products = empty_pair(a, {kept_steps, p.batch, columns});
  r.products = empty_pair(a, {kept_steps, p.batch, columns});
  if (p.units() == 0 || p.steps == 0) {
    const auto pass_on = [](const Pair& from, const Pair& to) {
      to.value.copy_(from.value);
      if (!to.derivative.defined()) return;
      if (from.derivative.defined()) {
        to.derivative.copy_(from.derivative);
      } else {
        to.derivative.zero_();
      }
    };
    pass_on(a.h0, r.h_n);
    if (p.has_cell()) pass_on(a.c0, r.c_n);
    return r;
  }
  const Tensor taken = taken_rows(a);
  auto [sums, sums_row] = input_sums(a.input.value, a.w_ih.value,
                                     p.dual || normalised ? Tensor() : r.gates.value, taken);
  Pair all_sums = {sums, p.dual ? derivative_sums(a, taken) : Tensor()};
  const bool on_cpu = on_cpu_kernels(reference(a));
  Pair normal = all_sums;
  LayerForward t;
  if (normalised) {
    const auto dtype = reference(a).scalar_type();
    const auto as_steps = [&](const Tensor& x) { return x.view({p.steps, p.batch, columns}); };
    const bool keep_sums = keep && sums.scalar_type() == dtype;
    // In the memory of the gates, or of the products themselves, where that is free.
    if (on_cpu && !p.dual && in_gates_memory(reference(a), r.gates.value)) {
      normal = r.gates;
    } else if (!on_cpu || keep_sums) {
      normal = empty_pair(a, {p.steps * p.batch, columns}, sums.scalar_type());
    }
    sums_row = normal.value.size(-1);
    if (keep_sums) r.input_products = each(all_sums, as_steps);
    if (on_cpu) {
      t.input_norm = numbers(a.norm_ih), t.input_products = numbers(all_sums);
      if (!keep_sums) t.kept_products = numbers_out(r.input_products);
    } else {
      NormForward n;
      n.rows = p.steps * p.batch, n.end = p.gates();
      n.products = numbers(all_sums), n.scale = numbers(a.norm_ih);
      n.out = numbers_out(normal), n.out_row = sums_row;
      n.kept = keep_sums ? NumbersOut{} : numbers_out(r.input_products);
      if (!normalise_planned(p, true)) kernels.normalise(p, n, context_for(reference(a)));
    }
  }
  Pair states, cell_states, inner, step;
  Tensor flags;
  if (!on_cpu) {
    states = empty_pair(a, {2, p.batch, p.state()});
    if (p.has_cell()) cell_states = empty_pair(a, {2, p.batch, p.hidden});
    if (p.has_inner()) inner = empty_pair(a, {2, p.batch, p.hidden});
    flags = empty_output(reference(a), {kSequenceFlags}, at::kInt);
    if (normalised) step = empty_pair(a, {2, p.batch, columns}, sums.scalar_type());
  }
  t.h0 = numbers(a.h0), t.c0 = numbers(a.c0);
  t.w_hh = numbers(a.w_hh), t.w_hr = numbers(a.w_hr);
  t.b_ih = numbers(a.b_ih), t.b_hh = numbers(a.b_hh), t.peephole = numbers(a.peephole);
  t.norm = numbers(a.norm_hh);
  t.masks = masks_of(a);
  t.sums = numbers_out(normal), t.sums_row = sums_row;
  t.output = numbers_out(r.output), t.h_n = numbers_out(r.h_n), t.c_n = numbers_out(r.c_n);
  t.cells = numbers_out(r.cells), t.gates = numbers_out(r.gates);
  t.products = numbers_out(r.products), t.step = numbers_out(step);
  t.states = numbers_out(states), t.cell_states = numbers_out(cell_states);
  t.inner = numbers_out(inner), t.flags = memory(flags);
  if (!layer_planned(p, LayerPass::forward, keep, normalised))
    kernels.forward(p, t, context_for(reference(a)));
  return r;
}

// How many steps are done before the input's products of the next are made. All, where those are
// kept for backward; else so few that the products fit into the cache, but enough to pay for
// packing the weights again. The states between are of the input's dtype anyway, so the bits are
// the same.
int64_t steps_at_once(const Arguments& a, bool keep) {
  constexpr int64_t kLeastRows = 1536, kMostProducts = 1 << 22;
  const LayerProblem& p = a.p;
  if (keep || p.dual || a.lengths.defined() || !on_cpu_kernels(reference(a)) || p.units() == 0)
    return p.steps;
  const int64_t fitting =
      std::max(kMostProducts / (p.units() * p.gates()), ceil_div(kLeastRows, p.batch));
  return fitting < p.steps ? ceil_div(p.steps, ceil_div(p.steps, fitting)) : p.steps;
}

}  // namespace

Outputs run_forward(const Arguments& a, bool keep) {
  const LayerProblem& p = a.p;
  const int64_t at_once = steps_at_once(a, keep);
  if (at_once == p.steps) return run_steps(a, keep, {});
  Outputs r;
  const Tensor output = empty_output(reference(a), {p.steps, p.batch, p.state()});
  Arguments part = a;
  for (int64_t s = 0; s < p.steps; s += at_once) {
    part.p.steps = std::min(at_once, p.steps - s);
    const int64_t first = p.reverse ? p.steps - s - part.p.steps : s;
    const auto taken = [&](const Tensor& t) {
      return t.defined() ? t.narrow(0, first, part.p.steps) : t;
    };
    part.input.value = taken(a.input.value), part.resets = taken(a.resets);
    part.zone_h = taken(a.zone_h), part.zone_c = taken(a.zone_c);
    r = run_steps(part, keep, taken(output));
    part.h0 = r.h_n;
    if (p.has_cell()) part.c0 = r.c_n;
  }
  r.output.value = output;
  return r;
}

Gradients run_backward(const Arguments& a, const Seeds& seeds, const Outputs& kept,
                       bool need_before) {
  const LayerProblem& p = a.p;
  const auto& kernels = kernels_for(reference(a), layer_kernels_for);
  const c10::DeviceGuard guard(reference(a).device());
  const auto wide = wide_type(reference(a));
  const auto seed = [&](const Tensor& from, at::IntArrayRef sizes) {
    const Pair result = empty_pair(a, sizes, wide);
    if (from.defined()) {
      result.value.copy_(from);
    } else {
      result.value.zero_();
    }
    if (result.derivative.defined()) result.derivative.zero_();
    return result;
  };
  const int64_t columns = p.gates() * p.hidden;
  const bool two_sums = p.cell == LayerCell::gru;
  Gradients g;
  g.h = seed(seeds.h_n, {p.batch, p.state()});
  if (p.has_cell()) g.c = seed(seeds.c_n, {p.batch, p.hidden});
  if (p.has_peephole()) g.peephole = seed({}, {p.batch, 3 * p.hidden});
  g.sums = empty_pair(a, {p.steps, p.batch, columns});
  g.hidden_sums = two_sums ? empty_pair(a, {p.steps, p.batch, columns}) : g.sums;
  g.input_products = g.sums, g.products = g.hidden_sums;
  const bool normalised = a.norm_hh.value.defined();
  if (normalised) {
    for (Pair* pair : {&g.input_products, &g.products})
      *pair = empty_pair(a, {p.steps, p.batch, columns});
  }
  g.taken = taken_rows(a);
  const bool on_cpu = on_cpu_kernels(reference(a));
  if (normalised) {
    for (Pair* pair : {&g.norm_ih, &g.norm_hh})
      *pair = on_cpu ? seed({}, {p.batch, columns}) : empty_pair(a, {p.steps, p.batch, columns});
  }
  Pair h_before;
  if (p.steps > 0) {
    const auto whole = [&](const Tensor& output, const Tensor& h0) {
      return states_before(a, output, h0, false).whole();
    };
    const auto before = [&](const Tensor& whole, const Tensor& output, const Tensor& h0) {
      return whole.defined() && !a.dropout.defined() ? Stacked{whole, {}}
                                                     : states_before(a, output, h0, true);
    };
    const Tensor &output = kept.output.value, &derivative = kept.output.derivative;
    if (p.is_gru()) {
      h_before.value = whole(output, a.h0.value);
      if (p.dual) h_before.derivative = whole(derivative, a.h0.derivative);
    }
    if (need_before) {
      g.before = before(h_before.value, output, a.h0.value);
      if (p.dual) g.before_derivative = before(h_before.derivative, derivative, a.h0.derivative);
    }
  }
  if (p.projection > 0) {
    g.projected = empty_pair(a, {p.steps, p.batch, p.projection});
    g.unprojected = empty_pair(a, {p.steps, p.batch, p.hidden});
  }
  if (p.units() == 0 || p.steps == 0) return g;
  Pair direct, inner, partial;
  Tensor flags;
  if (!on_cpu) {
    direct = empty_pair(a, {p.batch, p.state()}, wide);
    if (p.has_inner()) inner = empty_pair(a, {p.batch, p.hidden}, wide);
    if (normalised) partial = empty_pair(a, {4, p.batch, columns}, wide);
    flags = empty_output(reference(a), {kSequenceFlags}, at::kInt);
  }
  LayerBackward t;
  t.grad_output.value = data(seeds.output);
  t.gates = numbers(kept.gates.value.numel() > 0 ? kept.gates : kept.output);
  t.cells = numbers(kept.cells), t.c0 = numbers(a.c0), t.h_before = numbers(h_before);
  t.w_hh = numbers(a.w_hh), t.w_hr = numbers(a.w_hr), t.peephole = numbers(a.peephole);
  t.norm = numbers(a.norm_hh), t.products = numbers(kept.products);
  t.masks = masks_of(a);
  t.grad_sums = numbers_out(g.sums);
  if (two_sums) t.grad_hidden_sums = numbers_out(g.hidden_sums);
  if (normalised) t.grad_products = numbers_out(g.products), t.grad_norm = numbers_out(g.norm_hh);
  if (normalised && on_cpu) {
    t.input_norm = numbers(a.norm_ih), t.input_products = numbers(kept.input_products);
    t.grad_input_products = numbers_out(g.input_products);
    t.grad_input_norm = numbers_out(g.norm_ih);
  }
  t.grad_h = numbers_out(g.h), t.grad_c = numbers_out(g.c);
  t.grad_peephole = numbers_out(g.peephole);
  t.grad_projected = numbers_out(g.projected), t.unprojected = numbers_out(g.unprojected);
  t.direct = numbers_out(direct), t.inner = numbers_out(inner);
  t.partial = numbers_out(partial), t.flags = memory(flags);
  if (!layer_planned(p, LayerPass::backward, true, normalised))
    kernels.backward(p, t, context_for(reference(a)));
  if (normalised && !on_cpu) {
    NormBackward n;
    n.rows = p.steps * p.batch, n.end = p.gates();
    n.grad = numbers(g.sums), n.products = numbers(kept.input_products);
    n.scale = numbers(a.norm_ih);
    n.grad_products = numbers_out(g.input_products), n.grad_scale = numbers_out(g.norm_ih);
    if (!normalise_planned(p, false)) kernels.normalise_backward(p, n, context_for(reference(a)));
  }
  return g;
}

// ---- gradients ---------------------------------------------------------------------------------

Tensor Gradients::rows(const Tensor& of) const {
  const Tensor all = of.view({of.size(0) * of.size(1), of.size(2)});
  if (!taken.defined()) return all;
  for (const auto& [from, rows] : gathered_)
    if (from.is_same(of)) return rows;
  return gathered_.emplace_back(of, gather(all, taken)).second;
}

Tensor wide_product(const Tensor& input, const Tensor& w) {
  return std::get<0>(input_sums(input, w, {}, {}));
}

Tensor input_gradient(const Gradients& g, const Tensor& of, const Tensor& w_ih) {
  const int64_t rows = of.size(0) * of.size(1);
  const Tensor found = packed_product(g.rows(of), w_ih);
  const std::array<int64_t, 3> sizes = {of.size(0), of.size(1), w_ih.size(1)};
  if (!g.taken.defined()) return found.view(sizes);
  Tensor whole = empty_output(of, {rows, w_ih.size(1)});
  return whole.zero_().index_copy_(0, g.taken, found).view(sizes);
}

std::array<Tensor, 2> weight_gradients(const Gradients& g, const Tensor& of, const Stacked& first,
                                       const Stacked& second) {
  const Tensor left = g.rows(of);
  const auto factor = [&](const Stacked& steps) {
    const auto rows = [](const Tensor& t) {
      return t.defined() && t.numel() > 0 ? t.contiguous().view({t.size(0) * t.size(1), t.size(2)})
                                          : Tensor();
    };
    if (!steps.head.defined()) return Stacked{};
    if (g.taken.defined()) return Stacked{gather(rows(steps.whole()), g.taken), {}};
    const Stacked found = {rows(steps.head), rows(steps.tail)};
    return found.head.defined() ? found : Stacked{found.tail, {}};
  };
  if (left.size(0) > 0) return weight_gradients(left, factor(first), factor(second));
  const auto zeros = [&](const Stacked& steps) {
    return steps.head.defined() ? at::zeros({of.size(2), steps.head.size(-1)}, of.options())
                                : Tensor();
  };
  return {zeros(first), zeros(second)};
}

Tensor weight_gradient(const Gradients& g, const Tensor& of, const Stacked& factor) {
  return weight_gradients(g, of, factor, {})[0];
}

Tensor hidden_weight_gradient(const Arguments& a, const Gradients& g, const Tensor& of,
                              const Stacked& before, const Tensor& gates) {
  if (a.p.cell != LayerCell::gru_reset_before) return weight_gradient(g, of, before);
  const int64_t hidden = a.p.hidden;
  const Tensor reset = at::mul(gates.narrow(2, 0, hidden), before.whole());
  return at::cat({weight_gradient(g, of.narrow(2, 0, 2 * hidden), before),
                  weight_gradient(g, of.narrow(2, 2 * hidden, hidden), {reset, {}})});
}

Tensor bias_gradient(const Gradients& g, const Tensor& of) {
  const Tensor rows = g.rows(of);
  return rows.size(0) == 0 ? at::zeros({of.size(2)}, of.options()) : column_sums(rows);
}

Tensor wide_gradient(const Arguments& a, const Tensor& of) {
  const auto dtype = reference(a).scalar_type();
  if (of.size(0) == 0) return at::zeros({of.size(1)}, of.options().dtype(dtype));
  return column_sums(of).to(dtype);
}

Tensor norm_gradient(const Arguments& a, const Gradients& g, const Tensor& of) {
  if (of.dim() == 2) return wide_gradient(a, of);
  return bias_gradient(g, of).to(reference(a).scalar_type());
}

}  // namespace weft::layer
