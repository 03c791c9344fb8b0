// Backward of a recurrent layer on CUDA, all steps in one kernel: what rnn_layer_backward.cu does
// by kernels a step, where forward's plan fits with the weights transposed.
//
// A block owns hidden units and rows as forward does, with its units' columns of W_hh in shared
// memory. A step: threads make the gradients of their units' gates and store them, the blocks of
// the same rows meet, the rows' gradients come from memory, and warps make of them the gradient of
// the state before, which stays in the block. Steps with an inner product meet twice, normalised
// ones twice a product. Gradients of the weights are products of all steps, made elsewhere after
// the last. Bound: as forward, with rows of gates * H instead of H to fetch.
#include "rnn/rnn_layer_unit_backward.h"
#include "rnn/rnn_sequence_norm.h"

namespace weft::WEFT_TARGET {
namespace {

struct SequenceGradients {
  Numbers grad_output, gates, cells, c0, h_before, w_hh, w_hr, peephole, norm, products;
  LayerMasks masks;
};

template <class Cell, class T>
class BackwardBlock {
  using Acc = accumulate_t<T>;
  using M = ScalarMath<Acc>;
  static constexpr int kGates = Cell::kGates;

 public:
  WEFT_DEVICE BackwardBlock(const LayerProblem& problem, const SequencePlan& cut,
                            const SequenceGradients& inputs, device::GridBarrier& barrier,
                            T* of_products, T* of_norm, Acc* parts)
      : p(problem),
        plan(cut),
        t(inputs),
        meet(barrier),
        grad_products(of_products),
        grad_norm(of_norm),
        part(parts),
        own(share_of_block(problem, plan)),
        staged_rows(plan.staged_rows) {
    const auto [first, second] = backward_products(p, plan.units, plan.states);
    length = static_cast<int>(first.length), inner_length = static_cast<int>(second.length);
    pitch = sequence_pitch(length, sizeof(T)),
    inner_pitch = sequence_pitch(inner_length, sizeof(T));
    device::SharedMemory shared;
    const auto take = [](int64_t count) { return static_cast<int>(count); };
    weights = shared.take<T>(take(first.columns * pitch));
    grad_h = shared.take<Acc>(take(plan.rows * plan.states));
    direct = shared.take<Acc>(take(plan.rows * plan.states));
    if constexpr (Cell::kHasCell) grad_c = shared.take<Acc>(take(plan.rows * plan.units));
    if constexpr (Cell::kHasPeephole)
      grad_peephole = shared.take<Acc>(take(3 * plan.rows * plan.units));
    moments = shared.take<GradientMoments>(take(plan.rows * kGates));
    scales = shared.take<Acc>(take(plan.units * kGates));
    const bool inner = second.columns > 0;
    staged = shared.take<T>(
        take(plan.staged_rows * (inner && inner_pitch > pitch ? inner_pitch : pitch)));
    sums = shared.take<Acc>(
        take(plan.staged_rows *
                 (inner && second.columns > first.columns ? second.columns : first.columns) +
             (plan.tensor_cores ? kSliceSums : 0)));
    if (inner) inner_weights = shared.take<T>(take(second.columns * inner_pitch));
  }

  // What stays: weights, and the gradients of the last state.
  WEFT_DEVICE void begin(const Acc* of_h, const Acc* of_c) {
    const auto* w_hh = static_cast<const T*>(t.w_hh.value);
    transpose(own.states, length, pitch, w_hh + own.first_state, p.state(), weights);
    if (p.has_inner()) {
      const T* from =
          Cell::kResetBefore ? w_hh + 2 * p.hidden * p.hidden : static_cast<const T*>(t.w_hr.value);
      transpose(own.units, inner_length, inner_pitch, from + own.first_unit, p.hidden,
                inner_weights);
    }
    if (t.norm.value) {
      for (int i = device::thread_index(); i < own.units * kGates; i += device::block_size())
        scales[i] = load_number<M, T>(t.norm, i % kGates * p.hidden + own.first_unit + i / kGates);
    }
    each_state([&](int element, int64_t row, int64_t state) {
      grad_h[element] = load(of_h + row * p.state() + state);
    });
    each_unit([&](int element, int64_t row, int64_t unit) {
      if constexpr (Cell::kHasCell) grad_c[element] = load(of_c + row * p.hidden + unit);
      if constexpr (Cell::kHasPeephole) {
        for (int i = 0; i < 3; ++i) grad_peephole[3 * element + i] = Acc{0};
      }
    });
  }

  WEFT_DEVICE void project(const GateInputs& at, T* grad_projected) {
    each_state([&](int element, int64_t row, int64_t state) {
      const int64_t place = row * p.state() + state;
      const auto found = project_backward<M, T>(p, at, row, place, grad_h[element]);
      store(grad_projected + place, narrow<T>(found.grad));
      direct[element] = found.zoned;
    });
  }

  WEFT_DEVICE void gates(const GateInputs& at, const GateOutputs<T>& out) {
    each_unit([&](int element, int64_t row, int64_t unit) {
      direct[element] = unit_gates(at, element, row, unit, grad_h[element], out);
    });
  }

  // The same from the gradients of the projected state [B, P].
  WEFT_DEVICE void projected_gates(const GateInputs& at, const T* grad_projected,
                                   const GateOutputs<T>& out) {
    inner_product(grad_projected, p.projection,
                  [&](int element, int64_t row, int64_t unit, Acc sum) {
                    unit_gates(at, element, row, unit, sum, out);
                  });
  }

  // From the gradients of the candidate's sums, the last third of `fed`.
  WEFT_DEVICE void reset(const GateInputs& at, const T* fed, const Written<T>& grad_sums) {
    inner_product(fed + 2 * p.hidden, kGates * p.hidden,
                  [&](int element, int64_t row, int64_t unit, Acc of_reset) {
                    direct[element] = reset_backward<M, T>(p, at, row, unit, of_reset,
                                                           direct[element], grad_sums);
                  });
  }

  // The gradient of the state before, from those of the sums, `fed` [B, gates * H].
  WEFT_DEVICE void pass_on(const GateInputs& at, const T* fed) {
    each_pass([&](int first, int rows) {
      fetch(rows, length, pitch, fed + (own.first_row + first) * kGates * p.hidden,
            kGates * p.hidden);
      planned_product(plan, rows, own.states, length, pitch, staged, weights, sums);
      device::barrier();
      for (int i = device::thread_index(); i < rows * own.states; i += device::block_size()) {
        const int64_t row = own.first_row + first + i / own.states;
        const int element = first * own.states + i;
        Acc grad = sums[i];
        if (is_fresh(at, row)) {
          grad = 0;
        } else if (at.masks.dropout) {
          grad *=
              load_or_zero<T>(at.masks.dropout, row * p.state() + own.first_state + i % own.states);
        }
        grad_h[element] = direct[element] + grad;
      }
    });
  }

  // The gradients of products, `grad_products`, of the gates [first, end), from those of what was
  // normalised, `grad` [B, gates * H] of this step. With n = (x - mean) r and g the scaled
  // gradient, r (g - mean of g - n mean of g n).
  WEFT_DEVICE void normalise(const GateInputs& at, const T* grad, int first, int end) {
    const int count = end - first, pairs = own.rows * count;
    const int warp = device::thread_index() / 32, warps = device::block_size() / 32;
    const int64_t step = at.time * p.batch * kGates * p.hidden;
    const auto* x = static_cast<const T*>(t.products.value) + step;
    const auto place = [&](int64_t block, int pair) {
      return ((block * p.batch + own.first_row + pair / count) * kGates + first + pair % count) * 4;
    };
    const auto column = [&](int row, int gate) {
      return ((own.first_row + row) * kGates + gate) * p.hidden + own.first_unit;
    };
    device::barrier();  // other threads' gradients
    for (int pair = warp; pair < pairs; pair += warps) {
      const int gate = first + pair % count;
      const int64_t begin = column(pair / count, gate);
      const auto number = [&](int unit) { return widen(load(x + begin + unit)); };
      const PartMoments<Acc> found = part_moments<Acc>(own.units, number);
      Acc sum = 0, along = 0;
      for (int unit = device::lane(); unit < own.units; unit += 32) {
        const Acc g = widen(load(grad + begin + unit)) * scales[unit * kGates + gate];
        sum += g;
        along += g * (number(unit) - found.mean);
      }
      sum = warp_sum(sum), along = warp_sum(along);
      if (device::lane() > 0) continue;
      Acc* to = part + place(device::block_index() % plan.unit_blocks, pair);
      store(to, found.mean);
      store(to + 1, found.squares);
      store(to + 2, sum);
      store(to + 3, along);
    }
    meet.wait();
    for (int pair = warp; pair < pairs; pair += warps) {
      const RowMoments<Acc> of_row = row_moments<Acc>(p, plan, [&](int block) {
        const Acc* from = part + place(block, pair);
        return PartMoments<Acc>{load(from), load(from + 1)};
      });
      Acc sum = 0, along = 0;
      for (int block = device::lane(); block < plan.unit_blocks; block += 32) {
        const Acc* from = part + place(block, pair);
        const Acc of_block = load(from + 2);
        sum += of_block;
        along += load(from + 3) + (load(from) - of_row.mean) * of_block;
      }
      const Acc size = static_cast<Acc>(p.hidden);
      sum = warp_sum(sum) / size, along = warp_sum(along) * of_row.scale / size;
      if (device::lane() == 0) moments[pair] = {of_row, sum, along};
    }
    device::barrier();
    each_unit([&](int element, int64_t, int64_t) {
      const int row = element / own.units, unit = element % own.units;
      for (int gate = first; gate < end; ++gate) {
        const GradientMoments& m = moments[row * count + gate - first];
        const int64_t at_unit = column(row, gate) + unit;
        const Acc n = (widen(load(x + at_unit)) - m.row.mean) * m.row.scale;
        const Acc g = widen(load(grad + at_unit));
        store(grad_products + step + at_unit,
              narrow<T>(m.row.scale * (g * scales[unit * kGates + gate] - m.sum - n * m.along)));
        store(grad_norm + step + at_unit, narrow<T>(g * n));
      }
    });
    meet.wait();
  }

  WEFT_DEVICE void end(Acc* of_h, Acc* of_c, Acc* of_peephole) {
    each_state([&](int element, int64_t row, int64_t state) {
      store(of_h + row * p.state() + state, grad_h[element]);
    });
    each_unit([&](int element, int64_t row, int64_t unit) {
      if constexpr (Cell::kHasCell) store(of_c + row * p.hidden + unit, grad_c[element]);
      if constexpr (Cell::kHasPeephole) {
        for (int i = 0; i < 3; ++i)
          store(of_peephole + (row * 3 + i) * p.hidden + unit, grad_peephole[3 * element + i]);
      }
    });
  }

 private:
  template <class Pass>
  WEFT_DEVICE void each_pass(const Pass& pass) {
    for (int first = 0; first < own.rows; first += staged_rows)
      pass(first, own.rows - first < staged_rows ? own.rows - first : staged_rows);
  }
  // Every element stays with one thread: a pass's are dealt out anew.
  template <class Body>
  WEFT_DEVICE void each(int columns, int first_column, const Body& body) {
    each_pass([&](int first, int rows) {
      for (int i = device::thread_index(); i < rows * columns; i += device::block_size())
        body(first * columns + i, own.first_row + first + i / columns, first_column + i % columns);
    });
  }
  template <class Body>
  WEFT_DEVICE void each_state(const Body& body) {
    each(own.states, own.first_state, body);
  }
  template <class Body>
  WEFT_DEVICE void each_unit(const Body& body) {
    each(own.units, own.first_unit, body);
  }

  // Columns of `from` [length, stride] as rows of shared memory.
  WEFT_DEVICE void transpose(int columns, int rows, int to_pitch, const T* from, int64_t stride,
                             T* to) {
    for (int i = device::thread_index(); i < to_pitch * columns; i += device::block_size()) {
      const int row = i / columns, column = i % columns;
      to[column * to_pitch + row] = row < rows ? load(from + row * stride + column) : T{};
    }
  }

  WEFT_DEVICE void fetch(int rows, int k, int k_pitch, const T* from, int64_t stride) {
    stage(rows, k, k_pitch, staged, [&](int row) { return from + row * stride; });
    device::cp_async_wait<0>();
    device::barrier();
  }

  // Calls body(element, row, unit, sum) for rows of `from`, `stride` apart.
  template <class Body>
  WEFT_DEVICE void inner_product(const T* from, int64_t stride, const Body& body) {
    each_pass([&](int first, int rows) {
      fetch(rows, inner_length, inner_pitch, from + (own.first_row + first) * stride, stride);
      planned_product(plan, rows, own.units, inner_length, inner_pitch, staged, inner_weights,
                      sums);
      device::barrier();
      for (int i = device::thread_index(); i < rows * own.units; i += device::block_size())
        body(first * own.units + i, own.first_row + first + i / own.units,
             static_cast<int64_t>(own.first_unit + i % own.units), sums[i]);
    });
  }

  // Returns what does not go through the sums.
  WEFT_DEVICE Acc unit_gates(const GateInputs& at, int element, int64_t row, int64_t unit, Acc of_h,
                             const GateOutputs<T>& out) {
    Acc of_c = 0;
    if constexpr (Cell::kHasCell) of_c = grad_c[element];
    const UnitGradient<Acc> found = gates_backward<Cell, M, T>(p, at, row, unit, of_h, of_c, out);
    if constexpr (Cell::kHasCell) grad_c[element] = found.c;
    if constexpr (Cell::kHasPeephole) {
      for (int i = 0; i < 3; ++i) grad_peephole[3 * element + i] += found.peephole[i];
    }
    return found.h;
  }

  struct GradientMoments {
    RowMoments<Acc> row;
    Acc sum, along;  // means of g and of g n
  };

  const LayerProblem& p;
  const SequencePlan& plan;
  const SequenceGradients& t;
  device::GridBarrier& meet;
  T *const grad_products, *const grad_norm;  // [T, B, gates * H]
  Acc* const part;                           // [unit_blocks, B, gates, 4]
  const Share own;
  const int staged_rows;
  int length, inner_length, pitch, inner_pitch;
  T *weights, *inner_weights = nullptr;             // [states] and [units], a pitch apart
  Acc *grad_h, *direct;                             // [rows, states]
  Acc *grad_c = nullptr, *grad_peephole = nullptr;  // [rows, units], [rows, units, 3]
  GradientMoments* moments;                         // [rows, gates of a product]
  Acc* scales;                                      // [units, kGates]
  T* staged;                                        // [staged_rows], a pitch apart
  Acc* sums;                                        // [staged_rows, columns]
};

template <class Cell, class T>
WEFT_GLOBAL WEFT_HOT void layer_sequence_backward(LayerProblem p, SequencePlan plan,
                                                  SequenceGradients t, T* grad_sums,
                                                  T* grad_hidden_sums, accumulate_t<T>* grad_h,
                                                  accumulate_t<T>* grad_c,
                                                  accumulate_t<T>* grad_peephole, T* grad_projected,
                                                  T* unprojected, T* grad_products, T* grad_norm,
                                                  accumulate_t<T>* partial, uint32_t* flags) {
  device::GridBarrier meet(flags, plan.unit_blocks);
  BackwardBlock<Cell, T> block(p, plan, t, meet, grad_products, grad_norm, partial);
  block.begin(grad_h, grad_c);
  const int64_t units = p.units(), states = p.states();
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t time = p.time(s), at = time * units;
    const GateInputs inputs = {time,
                               part<T>(t.grad_output, time * states),
                               part<T>(t.gates, Cell::kKept * at),
                               part<T>(t.cells, at),
                               s == 0 ? t.c0 : part<T>(t.cells, p.time(s - 1) * units),
                               part<T>(t.h_before, at),
                               t.peephole,
                               masks_at<T>(p, t.masks, time)};
    T* of_sums = grad_sums + Cell::kGates * at;
    T* of_hidden_sums = shifted<T>(grad_hidden_sums, Cell::kGates * at);
    const GateOutputs<T> out = {
        {of_sums, nullptr}, {of_hidden_sums, nullptr}, {shifted<T>(unprojected, at), nullptr}};
    if (p.projection > 0) {
      T* projected = grad_projected + time * states;
      block.project(inputs, projected);
      meet.wait();
      block.projected_gates(inputs, projected, out);
    } else {
      block.gates(inputs, out);
    }
    const T* of_normal = Cell::kTwoSums ? of_hidden_sums : of_sums;
    const bool normalised = t.norm.value != nullptr;
    const T* fed = normalised ? grad_products + Cell::kGates * at : of_normal;
    const auto publish = [&](int first, int end) {
      if (normalised) return block.normalise(inputs, of_normal, first, end);
      meet.wait();
    };
    publish(Cell::kResetBefore ? 2 : 0, Cell::kGates);
    if constexpr (Cell::kResetBefore) {
      block.reset(inputs, fed, out.grad_sums);
      publish(0, 2);
    }
    block.pass_on(inputs, fed);
  }
  block.end(grad_h, grad_c, grad_peephole);
}

}  // namespace

bool sequence_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  const SequencePlan plan = backward_sequence(p, t.norm.value != nullptr, device::grid_facts());
  if (!plan.persistent()) return false;
  const SequenceGradients inputs = {t.grad_output, t.gates,    t.cells, t.c0,
                                    t.h_before,    t.w_hh,     t.w_hr,  t.peephole,
                                    t.norm,        t.products, t.masks};
  const device::Launch config{"recurrent_layer_sequence_backward",
                              plan.blocks(),
                              plan.threads,
                              plan.shared_bytes,
                              context.stream,
                              plan.unit_blocks > 1};
  auto* flags = static_cast<uint32_t*>(t.flags);
  device::clear_flags(flags, plan.blocks(), config);
  dispatch_cell(p.cell, [&](auto cell) {
    dispatch_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using Acc = accumulate_t<T>;
      device::launch(config, layer_sequence_backward<decltype(cell), T>, p, plan, inputs,
                     static_cast<T*>(t.grad_sums.value), static_cast<T*>(t.grad_hidden_sums.value),
                     static_cast<Acc*>(t.grad_h.value), static_cast<Acc*>(t.grad_c.value),
                     static_cast<Acc*>(t.grad_peephole.value),
                     static_cast<T*>(t.grad_projected.value), static_cast<T*>(t.unprojected.value),
                     static_cast<T*>(t.grad_products.value), static_cast<T*>(t.grad_norm.value),
                     static_cast<Acc*>(t.partial.value), flags);
    });
  });
  return true;
}

}  // namespace weft::WEFT_TARGET
