// Backward of a recurrent layer on CUDA; see rnn_layer.cu.
#include "rnn/rnn_layer_unit_backward.h"

namespace weft::WEFT_TARGET {
namespace {

WEFT_DEVICE int64_t element_of_thread() {
  return device::block_index() * device::block_size() + device::thread_index();
}

// Before the product with W_hr: gradients of the projected state [B, P].
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_project_backward(LayerProblem p, GateInputs t, Numbers grad_h,
                                                 T* grad_projected, T* grad_projected_d,
                                                 accumulate_t<T>* direct,
                                                 accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  const int64_t at = element_of_thread();
  if (at >= p.states()) return;
  const auto found =
      project_backward<M, T>(p, t, at / p.state(), at, load_number<M, Acc>(grad_h, at));
  store_number<M>(grad_projected, grad_projected_d, at, found.grad);
  store_number<M>(direct, direct_d, at, found.zoned);
}

// After the product with U_n: `of_reset` [B, H] is the gradient of r h.
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_reset_backward(LayerProblem p, GateInputs t, Numbers of_reset,
                                               T* grad_sums, T* grad_sums_d,
                                               accumulate_t<T>* direct, accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  const int64_t at = element_of_thread();
  if (at >= p.units()) return;
  store_number<M>(
      direct, direct_d, at,
      reset_backward<M, T>(p, t, at / p.hidden, at % p.hidden, load_number<M, Acc>(of_reset, at),
                           load_number<M, Acc>({direct, direct_d}, at), {grad_sums, grad_sums_d}));
}

// Gradients of one step's gates. `direct` takes what of grad_h does not go through them; null with
// a projection.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_gates_backward(
    LayerProblem p, GateInputs t, Numbers grad_h, T* grad_sums, T* grad_sums_d, T* grad_hidden_sums,
    T* grad_hidden_sums_d, accumulate_t<T>* grad_c, accumulate_t<T>* grad_c_d,
    accumulate_t<T>* grad_peephole, accumulate_t<T>* grad_peephole_d, T* unprojected,
    T* unprojected_d, accumulate_t<T>* direct, accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  const int64_t at = element_of_thread();
  if (at >= p.units()) return;
  const int64_t row = at / p.hidden, unit = at % p.hidden;
  N of_c = {};
  if constexpr (Cell::kHasCell) of_c = load_number<M, Acc>({grad_c, grad_c_d}, at);
  const UnitGradient<N> found =
      gates_backward<Cell, M, T>(p, t, row, unit, load_number<M, Acc>(grad_h, at), of_c,
                                 {{grad_sums, grad_sums_d},
                                  {grad_hidden_sums, grad_hidden_sums_d},
                                  {unprojected, unprojected_d}});
  if constexpr (Cell::kHasCell) store_number<M>(grad_c, grad_c_d, at, found.c);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) {
      const int64_t place = (row * 3 + i) * p.hidden + unit;
      const N before = load_number<M, Acc>({grad_peephole, grad_peephole_d}, place);
      store_number<M>(grad_peephole, grad_peephole_d, place, before + found.peephole[i]);
    }
  }
  if (direct) store_number<M>(direct, direct_d, at, found.h);
}

// sum += one plane of a [B, k], whose rows are `stride` apart, times one of W [k, units]: tiles as
// in cell_tile.h.
template <class T, class Acc>
WEFT_DEVICE void add_back(const CellProblem& p, const Place& at, int64_t k, int64_t stride,
                          const void* gradients, const void* weights, Acc* a_tile, Acc* w_tile,
                          Acc& sum) {
  const auto* a = static_cast<const T*>(gradients);
  const auto* w = static_cast<const T*>(weights);
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      a_tile[i] = row < p.batch && column < k ? widen(load(a + row * stride + column)) : Acc{0};
    }
    for (int i = device::thread_index(); i < kDepth * kUnits; i += kCellThreads) {
      const int64_t row = first + i / kUnits, unit = at.first_unit + i % kUnits;
      w_tile[i] = row < k && unit < p.hidden ? widen(load(w + row * p.hidden + unit)) : Acc{0};
    }
    device::barrier();
    for (int i = 0; i < kDepth; ++i)
      sum += a_tile[at.local_row * kDepth + i] * w_tile[i * kUnits + at.local_unit];
    device::barrier();
  }
}

struct ProductInputs {
  int64_t k, stride;  // terms; from one row of the gradients to the next
  Numbers gradients, weights, direct;
  const void* dropout;
  const bool* resets;  // of this step
};

// out [B, units] = direct + dropout * (gradients times weights [k, units]); a fresh row takes
// direct alone.
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_product_backward(CellProblem p, ProductInputs t,
                                                 accumulate_t<T>* out, accumulate_t<T>* out_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kDepth * kUnits);
  const Place at = place_of_thread(p);
  Acc sum = 0;
  [[maybe_unused]] Acc derivative = 0;
  const auto add = [&](const void* gradients, const void* weights, Acc& to) {
    add_back<T>(p, at, t.k, t.stride, gradients, weights, a_tile, w_tile, to);
  };
  add(t.gradients.value, t.weights.value, sum);
  if constexpr (kDual) {
    add(t.gradients.derivative, t.weights.value, derivative);
    if (t.weights.derivative) add(t.gradients.value, t.weights.derivative, derivative);
  }
  if (!at.inside) return;
  const int64_t element = at.row * p.hidden + at.unit;
  N grad = {};
  if (!(t.resets && load(t.resets + at.row))) {
    if constexpr (kDual) {
      grad = {sum, derivative};
    } else {
      grad = sum;
    }
    if (t.dropout) grad = load_or_zero<T>(t.dropout, element) * grad;
  }
  store_number<M>(out, out_d, element, load_number<M, Acc>(t.direct, element) + grad);
}

template <class Cell, class T, bool kDual>
void backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t hidden = p.hidden, units = p.units(), states = p.states();
  const int64_t columns = p.gates() * hidden;
  const bool projects = p.projection > 0;
  const CellProblem cell = tiles(p, hidden), state = tiles(p, p.state());
  const int64_t shared = (kRows * kDepth + kDepth * kUnits) * sizeof(Acc);
  const auto product = [&](const CellProblem& tile, const ProductInputs& inputs,
                           const NumbersOut& out) {
    device::launch({"recurrent_layer_product_backward", tile_blocks(tile), kCellThreads, shared,
                    context.stream},
                   layer_product_backward<T, kDual>, tile, inputs, static_cast<Acc*>(out.value),
                   static_cast<Acc*>(out.derivative));
  };
  const auto elements = [&](const char* kernel, int64_t count) {
    return device::Launch{kernel, ceil_div(count, kElementThreads), kElementThreads, 0,
                          context.stream};
  };
  Acc *direct = static_cast<Acc*>(t.direct.value),
      *direct_d = static_cast<Acc*>(t.direct.derivative);
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t time = p.time(s), at = time * units, sums = time * p.batch * columns;
    const Numbers c_before = s == 0 ? t.c0 : part<T>(t.cells, p.time(s - 1) * units);
    const LayerMasks masks = masks_at<T>(p, t.masks, time);
    const GateInputs inputs = {time,
                               part<T>(t.grad_output, time * states),
                               part<T>(t.gates, Cell::kKept * at),
                               part<T>(t.cells, at),
                               c_before,
                               part<T>(t.h_before, at),
                               t.peephole,
                               masks};
    Numbers grad_h = t.grad_h;
    if (projects) {
      device::launch(elements("recurrent_layer_project_backward", states),
                     layer_project_backward<T, kDual>, p, inputs, grad_h,
                     shifted<T>(t.grad_projected.value, time * states),
                     shifted<T>(t.grad_projected.derivative, time * states), direct, direct_d);
      product(cell,
              {p.projection,
               p.projection,
               part<T>(t.grad_projected, time * states),
               t.w_hr,
               {},
               nullptr,
               nullptr},
              t.inner);
      grad_h = t.inner;
    }
    T *grad_sums = shifted<T>(t.grad_sums.value, sums),
      *grad_sums_d = shifted<T>(t.grad_sums.derivative, sums);
    device::launch(
        elements("recurrent_layer_gates_backward", units), layer_gates_backward<Cell, T, kDual>, p,
        inputs, grad_h, grad_sums, grad_sums_d, shifted<T>(t.grad_hidden_sums.value, sums),
        shifted<T>(t.grad_hidden_sums.derivative, sums), static_cast<Acc*>(t.grad_c.value),
        static_cast<Acc*>(t.grad_c.derivative), static_cast<Acc*>(t.grad_peephole.value),
        static_cast<Acc*>(t.grad_peephole.derivative), shifted<T>(t.unprojected.value, at),
        shifted<T>(t.unprojected.derivative, at), projects ? nullptr : direct,
        projects ? nullptr : direct_d);
    const NumbersOut& hidden_sums = t.grad_hidden_sums.value ? t.grad_hidden_sums : t.grad_sums;
    const bool normalised = t.norm.value != nullptr;
    const auto normalise = [&](int64_t first, int64_t end) {
      if (!normalised) return;
      NormBackward n;
      n.rows = p.batch, n.first = first, n.end = end;
      n.grad = part<T>(hidden_sums, sums), n.products = part<T>(t.products, sums);
      n.scale = t.norm;
      n.grad_products = part<T>(t.grad_products, sums), n.grad_scale = part<T>(t.grad_norm, sums);
      normalise_rows_backward(p, n, context);
    };
    const Numbers fed = part<T>(normalised ? t.grad_products : hidden_sums, sums);
    normalise(Cell::kResetBefore ? 2 : 0, p.gates());
    int64_t k = columns;
    if constexpr (Cell::kResetBefore) {  // U_n, the last third of W_hh, comes first
      k = 2 * hidden;
      product(cell,
              {hidden, columns, part<T>(fed, k), part<T>(t.w_hh, k * hidden), {}, nullptr, nullptr},
              t.inner);
      device::launch(elements("recurrent_layer_reset_backward", units),
                     layer_reset_backward<T, kDual>, p, inputs, Numbers(t.inner), grad_sums,
                     grad_sums_d, direct, direct_d);
      normalise(0, 2);
    }
    product(state, {k, columns, fed, t.w_hh, t.direct, masks.dropout, masks.resets}, t.grad_h);
  }
}

}  // namespace

void layer_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  if (sequence_backward(p, t, context)) return;
  dispatch_cell(p.cell, [&](auto cell) {
    dispatch_numbers(p, [&](auto tag, auto dual) {
      backward<decltype(cell), typename decltype(tag)::type, decltype(dual)::value>(p, t, context);
    });
  });
}

}  // namespace weft::WEFT_TARGET
