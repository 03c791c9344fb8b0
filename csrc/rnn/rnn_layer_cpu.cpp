// Whole sequences of a recurrent layer on CPU.
//
// Forward: W_hh is packed once, a panel being one vector of units with its gates side by side. A
// team of threads splits the panels and goes through the steps together, one barrier a step: each
// multiplies the whole state with its own panels, finishes its units' gates while their sums are in
// the cache, and writes its part of the next state into the other of two buffers.
//
// Backward: the panels are those of W_hh itself, three or four vectors of units. A thread makes the
// gradients of the gates of its own units, meets the others, and multiplies all gates' gradients
// with its panels, which gives the gradient of its own units one step before.
//
// Rows that have ended are left out of the products. Bound: FLOPs for many rows; for one, the
// packed weights' bytes each step, from the cache.
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/vec_math.h"
#include "core/window.h"
#include "gemm/packed_cpu.h"
#include "rnn/cell_math.h"
#include "rnn/rnn_layer.h"
#include "rnn/units_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int64_t kStepGrain = 1 << 18;  // multiply-adds of a step that are worth a thread
constexpr int64_t kRowBlock = 48;        // rows whose sums wait for their gates

// `value` as memory of type T holds it.
template <class T, class V>
WEFT_INLINE V rounded(V value) {
  if constexpr (sizeof(T) == sizeof(accumulate_t<T>)) {
    return value;
  } else {
    T held[kLanes<T>];
    store_vec(held, value);
    return load_vec(held);
  }
}

// The rows that have a step at a time, then those that have none.
struct Rows {
  Scratch<int64_t> order;
  int64_t active = 0;

  explicit Rows(int64_t batch) : order(batch) {}
  void at_time(int64_t time, int64_t batch, const int64_t* lengths) {
    active = 0;
    for (int64_t row = 0, ended = batch; row < batch; ++row) {
      if (lengths == nullptr || time < lengths[row]) {
        order[active++] = row;
      } else {
        order[--ended] = row;
      }
    }
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class T>
struct ForwardOperands {
  using Acc = accumulate_t<T>;
  const LayerProblem& p;
  const LayerForward& t;
  Acc* h[2];  // [B, H]: the state before and after a step, in turn
  Acc* c;     // [B, H]

  const Acc* sums(int64_t time, int64_t row) const {
    return static_cast<const Acc*>(t.sums) + (time * p.batch + row) * t.sums_row;
  }
  T* output(int64_t time, int64_t row) const {
    return static_cast<T*>(t.output) + (time * p.batch + row) * p.hidden;
  }
  T* cells(int64_t time, int64_t row) const {
    return t.cells ? static_cast<T*>(t.cells) + (time * p.batch + row) * p.hidden : nullptr;
  }
  T* gates(int64_t time, int64_t row) const {
    return t.gates ? static_cast<T*>(t.gates) + (time * p.batch + row) * 4 * p.hidden : nullptr;
  }
};

// Where a vector of units stands.
struct At {
  int64_t time, row, unit;
  int count;
  int next;  // which of the two buffers takes the next state
};

template <class T>
WEFT_INLINE void store_kept(T* gates, int64_t hidden, const At& at,
                            const Vec<accumulate_t<T>> (&kept)[4]) {
  if (gates == nullptr) return;
  for (int i = 0; i < 4; ++i) store_units(gates + i * hidden + at.unit, kept[i], at.count);
}

// A cell: vectors of a panel, how many of them one vector of units has, where the hidden bias goes,
// and the step itself for one vector of units.
struct LstmStep {
  static constexpr int kVectors = 4, kGates = 4;

  template <class T, class V>
  static WEFT_INLINE void finish(const ForwardOperands<T>& o, const At& at, const V* sum,
                                 const V* b_ih, const V* b_hh) {
    const int64_t hidden = o.p.hidden, state = at.row * hidden + at.unit;
    const auto* x = o.sums(at.time, at.row) + at.unit;
    V s[4];
    for (int i = 0; i < 4; ++i)
      s[i] = sum[i] + load_units(x + i * hidden, at.count) + (b_ih[i] + b_hh[i]);
    const LstmGates<V> g = {vec_sigmoid(s[0]), vec_sigmoid(s[1]), vec_tanh(s[2]),
                            vec_sigmoid(s[3])};
    const V next = lstm_next_cell(g, load_units(o.c + state, at.count));
    const V c = rounded<T>(next), h = rounded<T>(g.o * vec_tanh(next));
    store_units(o.c + state, c, at.count);
    store_units(o.h[at.next] + state, h, at.count);
    store_units(o.output(at.time, at.row) + at.unit, h, at.count);
    if (T* cells = o.cells(at.time, at.row)) store_units(cells + at.unit, c, at.count);
    store_kept(o.gates(at.time, at.row), hidden, at, {g.i, g.f, g.g, g.o});
  }
};

struct GruStep {
  static constexpr int kVectors = 3, kGates = 3;

  template <class T, class V>
  static WEFT_INLINE void finish(const ForwardOperands<T>& o, const At& at, const V* sum,
                                 const V* b_ih, const V* b_hh) {
    const int64_t hidden = o.p.hidden, state = at.row * hidden + at.unit;
    const auto* x = o.sums(at.time, at.row) + at.unit;
    const auto input = [&](int i) { return load_units(x + i * hidden, at.count) + b_ih[i]; };
    const V r = vec_sigmoid(input(0) + (sum[0] + b_hh[0]));
    const V z = vec_sigmoid(input(1) + (sum[1] + b_hh[1]));
    const V q = sum[2] + b_hh[2];
    const V n = vec_tanh(input(2) + r * q);
    const V before = load_units(o.h[1 - at.next] + state, at.count);
    const V h = rounded<T>(gru_next_hidden(z, n, before));
    store_units(o.h[at.next] + state, h, at.count);
    store_units(o.output(at.time, at.row) + at.unit, h, at.count);
    store_kept(o.gates(at.time, at.row), hidden, at, {r, z, n, q});
  }
};

template <bool kRelu>
struct ElmanStep {
  static constexpr int kVectors = 4, kGates = 1;

  template <class T, class V>
  static WEFT_INLINE void finish(const ForwardOperands<T>& o, const At& at, const V* sum,
                                 const V* b_ih, const V* b_hh) {
    const int64_t state = at.row * o.p.hidden + at.unit;
    const V s = *sum + load_units(o.sums(at.time, at.row) + at.unit, at.count) + (*b_ih + *b_hh);
    V h;
    if constexpr (kRelu) {
      h = s < V{} ? V{} : s;  // NaN stays NaN
    } else {
      h = vec_tanh(s);
    }
    h = rounded<T>(h);
    store_units(o.h[at.next] + state, h, at.count);
    store_units(o.output(at.time, at.row) + at.unit, h, at.count);
  }
};

// A row without this step: zero output, the state as it was.
template <class T>
void skip_step(const ForwardOperands<T>& o, const At& at) {
  const int64_t hidden = o.p.hidden, state = at.row * hidden + at.unit;
  for (int64_t i = 0; i < at.count; ++i) {
    o.h[at.next][state + i] = o.h[1 - at.next][state + i];
    o.output(at.time, at.row)[at.unit + i] = T{};
    if (T* cells = o.cells(at.time, at.row)) cells[at.unit + i] = narrow<T>(o.c[state + i]);
    if (T* gates = o.gates(at.time, at.row))
      for (int64_t g = 0; g < 4; ++g) gates[g * hidden + at.unit + i] = T{};
  }
}

template <class T>
void widen_all(const void* from, int64_t count, accumulate_t<T>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const T*>(from)[i]);
}
template <class T>
void narrow_all(const accumulate_t<T>* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = narrow<T>(from[i]);
}

template <class Step, class T>
void layer_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kVectors = Step::kVectors, kGates = Step::kGates;
  constexpr int kGroups = kVectors / kGates;  // vectors of units in a panel
  constexpr int64_t kWidth = kVectors * kLane;
  const bool has_cell = t.c0 != nullptr;
  const int64_t hidden = p.hidden, panels = ceil_div(hidden, kGroups * kLane);
  Scratch<Acc> states(2 * p.units()), cell(has_cell ? p.units() : 0);
  Scratch<Acc> packed(panels * kWidth * hidden), biases(2 * panels * kWidth);
  widen_all<T>(t.h0, p.units(), states.data());
  if (has_cell) widen_all<T>(t.c0, p.units(), cell.data());
  const ForwardOperands<T> o = {
      p, t, {states.data(), states.data() + p.units()}, has_cell ? cell.data() : nullptr};
  const auto* w = static_cast<const T*>(t.w_hh);
  const void* const bias_of[] = {t.b_ih, t.b_hh};

  const int64_t parts = p.batch * kGates * hidden * hidden / kStepGrain;
  parallel_team(context, parts < panels ? parts : panels, [&](const Team& team) {
    alignas(kVectorBytes) Acc sums[kRowBlock * kWidth];
    Rows rows(p.batch);
    const int64_t begin = team.begin(panels), end = team.end(panels);
    for (int64_t i = begin * kVectors; i < end * kVectors; ++i) {
      const int64_t vector = i % kVectors;
      const int64_t unit = (i / kVectors * kGroups + vector / kGates) * kLane;
      const int64_t gate = vector % kGates, row = gate * hidden + unit;
      pack_vector(w + row * hidden, 1, hidden, hidden - unit, hidden, kVectors,
                  packed.data() + i / kVectors * kWidth * hidden + vector * kLane);
      for (int64_t side = 0; side < 2; ++side)
        for (int64_t j = 0; j < kLane; ++j)
          biases[(side * panels * kVectors + i) * kLane + j] =
              bias_of[side] && unit + j < hidden
                  ? widen(static_cast<const T*>(bias_of[side])[row + j])
                  : Acc{0};
    }
    rows.at_time(0, p.batch, nullptr);
    for (int64_t s = 0; s < p.steps; ++s) {
      const int64_t time = p.time(s);
      const auto next = static_cast<int>(1 - s % 2);
      if (t.lengths) rows.at_time(time, p.batch, t.lengths);
      for (int64_t panel = begin; panel < end; ++panel) {
        const auto each_vector = [&](int64_t row, auto body) __attribute__((always_inline)) {
          for (int64_t g = 0; g < kGroups; ++g) {
            const int64_t unit = (panel * kGroups + g) * kLane;
            if (unit >= hidden) return;
            const int64_t left = hidden - unit;
            body(g * kGates,
                 At{time, row, unit, static_cast<int>(left < kLane ? left : kLane), next});
          }
        };
        for (int64_t first = 0; first < rows.active; first += kRowBlock) {
          const int64_t left = rows.active - first, count = left < kRowBlock ? left : kRowBlock;
          const Acc* from[kRowBlock];
          Acc* to[kRowBlock];
          for (int64_t i = 0; i < count; ++i) {
            from[i] = o.h[1 - next] + rows.order[first + i] * hidden;
            to[i] = sums + i * kWidth;
          }
          packed_rows<kVectors>(from, count, packed.data() + panel * kWidth * hidden, hidden, false,
                                to);
          for (int64_t i = 0; i < count; ++i)
            each_vector(rows.order[first + i],
                        [&](int64_t vector, const At& at) __attribute__((always_inline)) {
                          V sum[kGates], b_ih[kGates], b_hh[kGates];
                          for (int g = 0; g < kGates; ++g) {
                            const int64_t bias = (panel * kVectors + vector + g) * kLane;
                            sum[g] = load_vec(to[i] + (vector + g) * kLane);
                            b_ih[g] = load_vec(biases.data() + bias);
                            b_hh[g] = load_vec(biases.data() + panels * kWidth + bias);
                          }
                          Step::template finish<T>(o, at, sum, b_ih, b_hh);
                        });
        }
        for (int64_t i = rows.active; i < p.batch; ++i)
          each_vector(rows.order[i], [&](int64_t, const At& at) { skip_step(o, at); });
      }
      team.barrier();
    }
  });
  narrow_all<T>(o.h[p.steps % 2], p.units(), t.h_n);
  if (has_cell) narrow_all<T>(o.c, p.units(), t.c_n);
}

void launch_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.cell) {
      case LayerCell::lstm:
        return layer_forward<LstmStep, T>(p, t, context);
      case LayerCell::gru:
        return layer_forward<GruStep, T>(p, t, context);
      case LayerCell::tanh:
        return layer_forward<ElmanStep<false>, T>(p, t, context);
      case LayerCell::relu:
        return layer_forward<ElmanStep<true>, T>(p, t, context);
    }
  });
}

// ---- backward ----------------------------------------------------------------------------------

template <class T>
struct BackwardOperands {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  const LayerProblem& p;
  const LayerBackward& t;
  Acc* grad_h;       // [B, width]
  Acc* grad_c;       // [B, width]
  Acc* hidden_sums;  // [2, B, gates * H] where T is not wide
  int64_t width;

  const T* in(const void* memory, int64_t time, int64_t row, int64_t columns) const {
    return static_cast<const T*>(memory) + (time * p.batch + row) * columns * p.hidden;
  }
  T* grad_sums(int64_t time, int64_t row) const {
    return static_cast<T*>(t.grad_sums) + (time * p.batch + row) * p.gates() * p.hidden;
  }
  T* grad_hidden_sums(int64_t time, int64_t row) const {
    void* memory = t.grad_hidden_sums ? t.grad_hidden_sums : t.grad_sums;
    return static_cast<T*>(memory) + (time * p.batch + row) * p.gates() * p.hidden;
  }
  // What the product reads: the gradients themselves, or a wide copy.
  Acc* wide_sums(int64_t time, int64_t row) const {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      return grad_hidden_sums(time, row);
    } else {
      return hidden_sums + (time % 2 * p.batch + row) * p.gates() * p.hidden;
    }
  }
  WEFT_INLINE void store_sum(const At& at, int gate, V of_x, V of_h) const {
    const int64_t place = gate * p.hidden + at.unit;
    store_units(grad_sums(at.time, at.row) + place, of_x, at.count);
    if (t.grad_hidden_sums) store_units(grad_hidden_sums(at.time, at.row) + place, of_h, at.count);
    if constexpr (sizeof(T) != sizeof(Acc))
      store_units(wide_sums(at.time, at.row) + place, rounded<T>(of_h), at.count);
  }
  // c before the step.
  const T* c_before(const At& at) const {
    const int64_t before = at.time + (p.reverse ? 1 : -1);
    if (before < 0 || before >= p.steps) return in(t.c0, 0, at.row, 1);
    return in(t.cells, before, at.row, 1);
  }
};

// Gradients of the gates of one vector of units; leaves in grad_h what does not go through them.
template <class T>
WEFT_INLINE void backward_step(const BackwardOperands<T>& o, const At& at) {
  using V = typename BackwardOperands<T>::V;
  const V one = V{} + 1;
  const auto units = [&](const T* row) { return load_units(row + at.unit, at.count); };
  auto* const grad_h = o.grad_h + at.row * o.width + at.unit;
  V grad = load_vec(grad_h);
  if (o.t.grad_output) grad += units(o.in(o.t.grad_output, at.time, at.row, 1));
  const T* kept = o.t.gates ? o.in(o.t.gates, at.time, at.row, 4) : nullptr;
  const auto gate = [&](int i) { return units(kept + i * o.p.hidden); };
  V direct = {};
  switch (o.p.cell) {
    case LayerCell::lstm: {
      auto* const grad_c = o.grad_c + at.row * o.width + at.unit;
      const LstmGradient<V> g = lstm_backward<V>(
          {gate(0), gate(1), gate(2), gate(3)}, units(o.c_before(at)),
          vec_tanh(units(o.in(o.t.cells, at.time, at.row, 1))), grad, load_vec(grad_c), one);
      o.store_sum(at, 0, g.gates.i, g.gates.i);
      o.store_sum(at, 1, g.gates.f, g.gates.f);
      o.store_sum(at, 2, g.gates.g, g.gates.g);
      o.store_sum(at, 3, g.gates.o, g.gates.o);
      store_vec(grad_c, g.c);
      break;
    }
    case LayerCell::gru: {
      const GruGradient<V> g =
          gru_backward<V>({gate(0), gate(1), gate(2), gate(3)},
                          units(o.in(o.t.h_before, at.time, at.row, 1)), grad, one);
      o.store_sum(at, 0, g.gates.r, g.gates.r);
      o.store_sum(at, 1, g.gates.z, g.gates.z);
      o.store_sum(at, 2, g.gates.n, g.gates.q);
      direct = g.h;
      break;
    }
    case LayerCell::tanh: {
      const V of_sum = grad * tanh_slope(units(o.in(o.t.output, at.time, at.row, 1)), one);
      o.store_sum(at, 0, of_sum, of_sum);
      break;
    }
    case LayerCell::relu: {
      const V y = units(o.in(o.t.output, at.time, at.row, 1));
      const V of_sum = y <= V{} ? V{} : grad;
      o.store_sum(at, 0, of_sum, of_sum);
      break;
    }
  }
  store_vec(grad_h, direct);
}

template <int kPanelVectors, class T>
void layer_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>, kWidth = kPanelVectors * kLane;
  const int64_t hidden = p.hidden, panels = ceil_div(hidden, kWidth), width = panels * kWidth;
  const int64_t sums = p.gates() * hidden;
  const bool has_cell = t.grad_c != nullptr;
  Scratch<Acc> packed(width * sums), grad_h(p.batch * width);
  Scratch<Acc> grad_c(has_cell ? p.batch * width : 0);
  Scratch<Acc> wide(sizeof(T) == sizeof(Acc) ? 0 : 2 * p.batch * sums);
  const auto copy = [&](Acc* padded, void* dense, bool in) {
    for (int64_t row = 0; row < p.batch; ++row)
      for (int64_t i = 0; i < width; ++i) {
        Acc& inside = padded[row * width + i];
        if (in) inside = i < hidden ? static_cast<Acc*>(dense)[row * hidden + i] : Acc{0};
        if (!in && i < hidden) static_cast<Acc*>(dense)[row * hidden + i] = inside;
      }
  };
  copy(grad_h.data(), t.grad_h, true);
  if (has_cell) copy(grad_c.data(), t.grad_c, true);
  const BackwardOperands<T> o = {p, t, grad_h.data(), grad_c.data(), wide.data(), width};
  const auto* w = static_cast<const T*>(t.w_hh);

  const int64_t parts = p.batch * sums * hidden / kStepGrain;
  parallel_team(context, parts < panels ? parts : panels, [&](const Team& team) {
    Rows rows(p.batch);
    const int64_t begin = team.begin(panels), end = team.end(panels);
    for (int64_t i = begin * kPanelVectors; i < end * kPanelVectors; ++i)
      pack_vector(w + i * kLane, hidden, 1, hidden - i * kLane, sums, kPanelVectors,
                  packed.data() + i / kPanelVectors * kWidth * sums + i % kPanelVectors * kLane);
    const int64_t first_unit = begin * kWidth;
    const int64_t last_unit = end * kWidth < hidden ? end * kWidth : hidden;
    rows.at_time(0, p.batch, nullptr);
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      const int64_t time = p.time(s);
      if (t.lengths) rows.at_time(time, p.batch, t.lengths);
      for (int64_t i = 0; i < p.batch; ++i) {
        for (int64_t unit = first_unit; unit < last_unit; unit += kLane) {
          const int64_t left = hidden - unit;
          const At at = {time, rows.order[i], unit, static_cast<int>(left < kLane ? left : kLane),
                         0};
          if (i < rows.active) {
            backward_step(o, at);
          } else {
            for (int g = 0; g < p.gates(); ++g) o.store_sum(at, g, Vec<Acc>{}, Vec<Acc>{});
          }
        }
      }
      team.barrier();
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t first = 0; first < rows.active; first += kRowBlock) {
          const int64_t left = rows.active - first, count = left < kRowBlock ? left : kRowBlock;
          const Acc* from[kRowBlock];
          Acc* to[kRowBlock];
          for (int64_t i = 0; i < count; ++i) {
            const int64_t row = rows.order[first + i];
            from[i] = o.wide_sums(time, row);
            to[i] = o.grad_h + row * width + panel * kWidth;
          }
          packed_rows<kPanelVectors>(from, count, packed.data() + panel * kWidth * sums, sums, true,
                                     to);
        }
      }
    }
  });
  copy(grad_h.data(), t.grad_h, false);
  if (has_cell) copy(grad_c.data(), t.grad_c, false);
}

void launch_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (fewer_lanes_with_three<T>(p.hidden)) return layer_backward<3, T>(p, t, context);
    layer_backward<4, T>(p, t, context);
  });
}

}  // namespace

const LayerKernels layer_kernels = {launch_forward, launch_backward};

}  // namespace weft::WEFT_TARGET
