// Forward of a recurrent layer on CUDA, all steps in one kernel: what rnn_layer_forward.cu does by
// kernels a step, for weights that fit into the shared memory of all multiprocessors together.
//
// A block owns some hidden units and some rows of the batch (rnn_sequence_plan.h). Its rows of
// W_hh, and its units' states, stay in shared memory. A step: the state of the rows comes from
// memory, warps make its products (rnn_sequence.h), threads finish a unit of a row each and store
// its new state, and the blocks of the same rows meet. The next step's sums of W_ih x are on their
// way meanwhile. A step with an inner product meets twice, and normalisation once more for each
// product. Bound: the way of a state through the L2 cache and the meeting, a microsecond or two;
// for large batches the products.
#include "rnn/rnn_sequence_norm.h"

namespace weft::WEFT_TARGET {
namespace {

struct SequenceInputs {
  Numbers h0, c0, w_hh, w_hr, b_ih, b_hh, peephole, norm, sums;
  int64_t sums_row;
  LayerMasks masks;
};

template <class Cell, class T>
class ForwardBlock {
  using Acc = accumulate_t<T>;
  using M = ScalarMath<Acc>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kFirst = Cell::kResetBefore ? 2 : kGates;  // gates of the first product

 public:
  WEFT_DEVICE ForwardBlock(const LayerProblem& problem, const SequencePlan& cut,
                           const SequenceInputs& inputs, device::GridBarrier& barrier,
                           T* products_kept, Acc* parts)
      : p(problem),
        plan(cut),
        t(inputs),
        meet(barrier),
        kept(products_kept),
        part(parts),
        own(share_of_block(problem, plan)),
        staged_rows(plan.staged_rows) {
    const SequenceProducts products = forward_products(p, plan.units, plan.states);
    first_columns = kFirst * own.units;
    length = static_cast<int>(products.first.length), inner_length = p.hidden;
    pitch = sequence_pitch(length, sizeof(T)),
    inner_pitch = sequence_pitch(inner_length, sizeof(T));
    device::SharedMemory shared;
    const auto take = [](int64_t count) { return static_cast<int>(count); };
    weights = shared.take<T>(take(products.first.columns * pitch));
    x = shared.take<Acc>(take(plan.rows * plan.units * kGates));
    if constexpr (Cell::kHasCell) c = shared.take<T>(take(plan.rows * plan.units));
    h = shared.take<T>(take(plan.rows * plan.states));
    moments = shared.take<RowMoments<Acc>>(take(plan.rows * kGates));
    scales = shared.take<Acc>(take(plan.units * kGates));
    unit_weights = shared.take<UnitWeights<Acc>>(take(plan.units));
    const bool inner = products.second.columns > 0;
    const int widest = inner && inner_pitch > pitch ? inner_pitch : pitch;
    const int64_t most = inner && products.second.columns > products.first.columns
                             ? products.second.columns
                             : products.first.columns;
    staged = shared.take<T>(take(plan.staged_rows * widest));
    sums = shared.take<Acc>(take(plan.staged_rows * most + (plan.tensor_cores ? kSliceSums : 0)));
    if (inner) inner_weights = shared.take<T>(take(products.second.columns * inner_pitch));
  }

  // What stays: weights, and the states before the first step.
  WEFT_DEVICE void begin() {
    const auto* w_hh = static_cast<const T*>(t.w_hh.value);
    stage(first_columns, length, pitch, weights, [&](int column) {
      return w_hh + (column % kFirst * p.hidden + own.first_unit + column / kFirst) * length;
    });
    if (p.has_inner()) {
      const T* from =
          Cell::kResetBefore ? w_hh + 2 * p.hidden * p.hidden : static_cast<const T*>(t.w_hr.value);
      stage(own.states, inner_length, inner_pitch, inner_weights, [&](int state) {
        return from + static_cast<int64_t>(own.first_state + state) * inner_length;
      });
    }
    const int thread = device::thread_index(), threads = device::block_size();
    if (t.norm.value) {
      for (int i = thread; i < own.units * kGates; i += threads)
        scales[i] = load_number<M, T>(t.norm, i % kGates * p.hidden + own.first_unit + i / kGates);
    }
    for (int i = thread; i < own.units; i += threads)
      unit_weights[i] = load_weights<Cell, M, T>(p, own.first_unit + i, t.b_ih, t.b_hh, t.peephole);
    // Each element stays with the thread that finishes it.
    each_pass([&](int first, int rows) {
      if constexpr (Cell::kHasCell) {
        for (int i = thread; i < rows * own.units; i += threads)
          c[first * own.units + i] = load(static_cast<const T*>(t.c0.value) +
                                          (own.first_row + first + i / own.units) * p.hidden +
                                          own.first_unit + i % own.units);
      }
      for (int i = thread; i < rows * own.states; i += threads)
        h[first * own.states + i] = load(static_cast<const T*>(t.h0.value) +
                                         (own.first_row + first + i / own.states) * p.state() +
                                         own.first_state + i % own.states);
    });
    fetch_sums(p.time(0));
  }

  // Each thread fetches the sums of W_ih x that it will read.
  WEFT_DEVICE void fetch_sums(int64_t time) {
    const Acc* from = static_cast<const Acc*>(t.sums.value) + time * p.batch * t.sums_row;
    each_pass([&](int first, int rows) {
      for (int i = device::thread_index(); i < rows * own.units; i += device::block_size()) {
        const int64_t row = own.first_row + first + i / own.units;
        for (int g = 0; g < kGates; ++g)
          device::cp_async<sizeof(Acc)>(
              x + (first * own.units + i) * kGates + g,
              from + row * t.sums_row + g * p.hidden + own.first_unit + i % own.units);
      }
    });
    device::cp_async_commit();
  }

  // The first product of a step, from the states `before` [B, S], and what follows from it.
  WEFT_DEVICE void step(const StepPlace& at, const T* before, const StepOutputs<T>& out) {
    const auto* dropout = static_cast<const T*>(at.masks.dropout);
    each_pass([&](int first, int rows) {
      const int64_t first_row = own.first_row + first;
      stage(
          rows, length, pitch, staged, [&](int row) { return before + (first_row + row) * length; },
          [&](int row) { return dropout ? dropout + (first_row + row) * length : nullptr; });
      multiply(rows, first_columns, length, pitch, weights);
      if (at.normalised) find_moments(at, 0, kFirst);
      for (int i = device::thread_index(); i < rows * own.units; i += device::block_size()) {
        const int row = i / own.units, unit = i % own.units, element = first * own.units + i;
        Acc sum[kSums] = {}, of_x[4] = {};
        for (int g = 0; g < kFirst; ++g) sum[g] = sum_at(at, 0, kFirst, row, unit, g);
        for (int g = 0; g < kGates; ++g) of_x[g] = x[element * kGates + g];
        UnitState<Acc> state = {};
        if (p.projection == 0) state.h = widen(h[element]);
        if constexpr (Cell::kHasCell) state.c = widen(c[element]);
        state = step_unit<Cell, M, T>(p, at, first_row + row, own.first_unit + unit,
                                      unit_weights[unit], of_x, sum, state, out);
        if constexpr (Cell::kHasCell) c[element] = narrow<T>(state.c);
        if (!p.has_inner()) h[element] = narrow<T>(state.h);
      }
    });
  }

  // The inner product, from `inner` [2, B, H].
  WEFT_DEVICE void finish(const StepPlace& at, const T* inner, const StepOutputs<T>& out) {
    each_pass([&](int first, int rows) {
      const int64_t first_row = own.first_row + first;
      stage(rows, inner_length, inner_pitch, staged,
            [&](int row) { return inner + (first_row + row) * inner_length; });
      multiply(rows, own.states, inner_length, inner_pitch, inner_weights);
      if (Cell::kResetBefore && at.normalised) find_moments(at, 2, 1);
      for (int i = device::thread_index(); i < rows * own.states; i += device::block_size()) {
        const int row = i / own.states, unit = i % own.states, element = first * own.states + i;
        Acc of_x = 0, z = 0, sum = sums[row * own.states + unit];
        UnitWeights<Acc> w = {};
        if constexpr (Cell::kResetBefore) {
          of_x = x[element * kGates + 2];
          z = widen(load(inner + p.units() + (first_row + row) * p.hidden + own.first_unit + unit));
          w = unit_weights[unit];
          sum = sum_at(at, 2, 1, row, unit, 0);
        }
        h[element] =
            narrow<T>(finish_unit<Cell, M, T>(p, at, first_row + row, own.first_state + unit, w,
                                              of_x, z, sum, widen(h[element]), out));
      }
    });
  }

 private:
  template <class Pass>
  WEFT_DEVICE void each_pass(const Pass& pass) {
    for (int first = 0; first < own.rows; first += staged_rows)
      pass(first, own.rows - first < staged_rows ? own.rows - first : staged_rows);
  }

  // Of what was staged, once it is there.
  WEFT_DEVICE void multiply(int rows, int columns, int k, int k_pitch, const T* by) {
    device::cp_async_wait<0>();
    device::barrier();
    planned_product(plan, rows, columns, k, k_pitch, staged, by, sums);
    device::barrier();
  }

  // Of the `count` gates from `first` on, whose sums are there: the moments of whole rows. A fresh
  // row's products are zeros.
  WEFT_DEVICE void find_moments(const StepPlace& at, int first, int count) {
    const int pairs = own.rows * count, columns = own.units * count;
    const int warp = device::thread_index() / 32, warps = device::block_size() / 32;
    const auto place = [&](int64_t block, int pair) {
      return ((block * p.batch + own.first_row + pair / count) * kGates + first + pair % count) * 2;
    };
    for (int pair = warp; pair < pairs; pair += warps) {
      const Acc* of_pair = sums + pair / count * columns + pair % count;
      const bool fresh = is_fresh(at, own.first_row + pair / count);
      const auto found = part_moments<Acc>(
          own.units, [&](int unit) { return fresh ? Acc{0} : of_pair[unit * count]; });
      if (device::lane() > 0) continue;
      Acc* to = part + place(device::block_index() % plan.unit_blocks, pair);
      store(to, found.mean);
      store(to + 1, found.squares);
    }
    meet.wait();
    for (int pair = warp; pair < pairs; pair += warps) {
      const auto found = row_moments<Acc>(p, plan, [&](int block) {
        const Acc* from = part + place(block, pair);
        return PartMoments<Acc>{load(from), load(from + 1)};
      });
      if (device::lane() == 0) moments[pair] = found;
    }
    device::barrier();
  }

  // The sum of gate `g` of the product whose `count` gates begin at `first`, normalised and kept
  // where that is asked for.
  WEFT_DEVICE Acc sum_at(const StepPlace& at, int first, int count, int row, int unit, int g) {
    Acc sum = sums[(row * own.units + unit) * count + g];
    if (!at.normalised) return sum;
    if (is_fresh(at, own.first_row + row)) sum = 0;
    if (kept)
      store(kept + ((at.time * p.batch + own.first_row + row) * kGates + first + g) * p.hidden +
                own.first_unit + unit,
            narrow<T>(sum));
    const RowMoments<Acc> of_row = moments[row * count + g];
    return scales[unit * kGates + first + g] * ((sum - of_row.mean) * of_row.scale);
  }

  const LayerProblem& p;
  const SequencePlan& plan;
  const SequenceInputs& t;
  device::GridBarrier& meet;
  T* const kept;    // [T, B, gates * H]; null: not kept
  Acc* const part;  // [unit_blocks, B, gates, 2]
  const Share own;
  const int staged_rows;
  int first_columns, length, inner_length, pitch, inner_pitch;
  T *weights, *inner_weights = nullptr;  // [units, kFirst] and [states], a pitch apart
  T *c = nullptr, *h;                    // [rows, units], [rows, states]
  Acc* x;                                // [rows, units, kGates]
  RowMoments<Acc>* moments;              // [rows, gates of a product]
  Acc* scales;                           // [units, kGates]
  UnitWeights<Acc>* unit_weights;        // [units]
  T* staged;                             // [staged_rows], a pitch apart
  Acc* sums;                             // [staged_rows, columns]
};

template <class Cell, class T>
WEFT_GLOBAL WEFT_HOT void layer_sequence(LayerProblem p, SequencePlan plan, SequenceInputs t,
                                         T* output, T* h_n, T* c_n, T* cells, T* gates, T* states,
                                         T* inner, T* products, accumulate_t<T>* step,
                                         uint32_t* flags) {
  device::GridBarrier meet(flags, plan.unit_blocks);
  ForwardBlock<Cell, T> block(p, plan, t, meet, products, step);
  block.begin();
  const auto* before = static_cast<const T*>(t.h0.value);
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t time = p.time(s);
    const bool last = s == p.steps - 1;
    T* after = last ? h_n : states + s % 2 * p.states();
    const StepPlace at = {time, masks_at<T>(p, t.masks, time), t.norm.value != nullptr};
    const StepOutputs<T> out = {{after, nullptr},
                                {last ? c_n : nullptr, nullptr},
                                {output + time * p.states(), nullptr},
                                {shifted<T>(cells, time * p.units()), nullptr},
                                {shifted<T>(gates, Cell::kKept * time * p.units()), nullptr},
                                {inner, nullptr}};
    block.step(at, before, out);
    if (p.has_inner()) {
      meet.wait();
      block.finish(at, inner, out);
    }
    if (last) break;
    block.fetch_sums(p.time(s + 1));
    meet.wait();
    before = after;
  }
}

}  // namespace

bool sequence_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  const SequencePlan plan = forward_sequence(p, t.norm.value != nullptr, device::grid_facts());
  if (!plan.persistent()) return false;
  const SequenceInputs inputs = {t.h0,       t.c0,   t.w_hh, t.w_hr,     t.b_ih, t.b_hh,
                                 t.peephole, t.norm, t.sums, t.sums_row, t.masks};
  const device::Launch config{"recurrent_layer_sequence", plan.blocks(),  plan.threads,
                              plan.shared_bytes,          context.stream, plan.unit_blocks > 1};
  auto* flags = static_cast<uint32_t*>(t.flags);
  device::clear_flags(flags, plan.blocks(), config);
  dispatch_cell(p.cell, [&](auto cell) {
    dispatch_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      device::launch(config, layer_sequence<decltype(cell), T>, p, plan, inputs,
                     static_cast<T*>(t.output.value), static_cast<T*>(t.h_n.value),
                     static_cast<T*>(t.c_n.value), static_cast<T*>(t.cells.value),
                     static_cast<T*>(t.gates.value), static_cast<T*>(t.states.value),
                     static_cast<T*>(t.inner.value), static_cast<T*>(t.products.value),
                     static_cast<accumulate_t<T>*>(t.step.value), flags);
    });
  });
  return true;
}

}  // namespace weft::WEFT_TARGET
