// 2-d LSTM on CPU.
//
// Weights are packed once, a panel being one vector of units with its gates side by side (backward:
// four vectors of units). A team of threads splits the panels and goes through the anti-diagonals
// together, one barrier each: every row of the diagonal is multiplied with both predecessors'
// states (backward: both successors' gradients), and its units are finished while their sums are in
// the cache. A missing neighbour is a row of zeros. Bound: FLOPs; for small grids, the packed
// weights' bytes on each diagonal.
#include "rnn/mdlstm.h"
#include "rnn/rnn_layer_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// The rows that a product reads: those of a tensor, or zeros.
template <class Term>
struct Source {
  Numbers rows;
  int64_t stride;
  const Term* zeros;
};

// sums[plane][i] = two rows of `from` (`neighbour(i, 0)` and `neighbour(i, 1)`, -1 being zeros)
// times the panels of two matrices.
template <class M, class P, class Neighbour>
WEFT_INLINE void add_neighbours(const P* const (&w)[2], const P* const (&w_derivative)[2],
                                const Source<typename P::Term>& from, int64_t panel, int64_t count,
                                const Neighbour& neighbour,
                                typename P::Acc (*sums)[kRowBlock * P::kWidth]) {
  using Acc = typename P::Acc;
  using Term = typename P::Term;
  constexpr int kPlanes = M::kDual ? 2 : 1;
  const Acc* source[kPlanes][kRowBlock];
  Acc* target[kPlanes][kRowBlock];
  for (int side = 0; side < 2; ++side) {
    const int64_t k = w[side]->k();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = neighbour(i, side);
      const auto at = [&](const void* rows) {
        const Term* found =
            row < 0 ? from.zeros : static_cast<const Term*>(rows) + row * from.stride;
        return reinterpret_cast<const Acc*>(found);
      };
      source[0][i] = at(from.rows.value), target[0][i] = sums[0] + i * P::kWidth;
      if constexpr (M::kDual)
        source[1][i] = at(from.rows.derivative), target[1][i] = sums[1] + i * P::kWidth;
    }
    const bool add = side > 0;
    packed_rows<P::kVectors, P::kPairs>(source[0], count, (*w[side])[panel], k, add, target[0]);
    if constexpr (M::kDual) {
      packed_rows<P::kVectors>(source[1], count, (*w[side])[panel], k, add, target[1]);
      if (*w_derivative[side])
        packed_rows<P::kVectors>(source[0], count, (*w_derivative[side])[panel], k, true,
                                 target[1]);
    }
  }
}

// Goes through the panels [begin, end) and the rows of a diagonal, and calls `body(place, at, sum)`
// for each vector of units; `sum(gate)` is the product.
template <class M, class T, class P, class Neighbour, class Body>
WEFT_INLINE void each_product(const GridProblem& p, int64_t diagonal, const P* const (&w)[2],
                              const P* const (&w_derivative)[2],
                              const Source<typename P::Term>& from, const Part& own,
                              const Neighbour& neighbour, const Body& body) {
  using Acc = typename P::Acc;
  alignas(kVectorBytes) Acc sums[M::kDual ? 2 : 1][kRowBlock * P::kWidth];
  const int64_t rows = p.rows(diagonal);
  for (int64_t panel = own.begin; panel < own.end; ++panel)
    for (int64_t first = 0; first < rows; first += kRowBlock) {
      const int64_t left = rows - first, count = left < kRowBlock ? left : kRowBlock;
      GridPlace places[kRowBlock];
      for (int64_t i = 0; i < count; ++i) places[i] = grid_place(p, diagonal, first + i);
      add_neighbours<M>(
          w, w_derivative, from, panel, count,
          [&](int64_t i, int side) { return neighbour(places[i], side); }, sums);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t g = 0; g < P::kGroups; ++g) {
          const int64_t unit = (panel * P::kGroups + g) * P::kLane, rest = p.hidden - unit;
          if (rest <= 0) break;
          const At at = {0, places[i].row, unit,
                         static_cast<int>(rest < P::kLane ? rest : P::kLane)};
          body(places[i], at, [&](int gate) {
            const int64_t place = i * P::kWidth + (g * P::kGates + gate) * P::kLane;
            if constexpr (M::kDual) {
              return typename M::Number{load_vec(sums[0] + place), load_vec(sums[1] + place)};
            } else {
              return load_vec(sums[0] + place);
            }
          });
        }
    }
}

// A number of the neighbour at `row`, or zero.
template <class M, class T>
WEFT_INLINE typename M::Number neighbour_number(const Numbers& t, int64_t row, int64_t width,
                                                const At& at, int64_t column = 0) {
  if (row < 0) return typename M::Number{};
  return load_number<M, T>(t, row * width + column + at.unit, at.count);
}

template <class M, class T, class Term, class Sum>
__attribute__((noinline)) void step(const GridProblem& p, const GridForward& t,
                                    const GridPlace& place, const At& at, const NumbersOut& h,
                                    const Sum& sum) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  N sums[kGridGates];
  for (int g = 0; g < kGridGates; ++g) {
    const int64_t column = g * p.hidden + at.unit;
    sums[g] = load_number<M, Acc>(t.sums, at.row * kGridGates * p.hidden + column, at.count);
    sums[g] = sums[g] + load_number<M, T>(t.bias, column, at.count) + sum(g);
  }
  const auto r = grid_step<M>(sums, neighbour_number<M, T>(t.cells, place.above, p.hidden, at),
                              neighbour_number<M, T>(t.cells, place.left, p.hidden, at));
  for (int g = 0; g < kGridGates; ++g)
    store_number<M, T>(t.gates, (at.row * kGridGates + g) * p.hidden + at.unit, r.gates[g],
                       at.count);
  store_number<M, T>(t.cells, at.row * p.hidden + at.unit, r.c, at.count);
  store_number<M, T>(t.output, at.row * p.hidden + at.unit, r.h, at.count);
  if constexpr (sizeof(T) != sizeof(Acc))
    store_rounded<M, Term>(h, at.row * term_row<T, Term>(p.hidden) + at.unit, rounded<T>(r.h),
                           at.count);
}

template <class M, class T, class Term, class Sum>
__attribute__((noinline)) void step_back(const GridProblem& p, const GridBackward& t,
                                         const GridPlace& place, const At& at,
                                         const NumbersOut& copy, const Sum& sum) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const int64_t width = kGridGates * p.hidden;
  N gates[kGridGates];
  for (int g = 0; g < kGridGates; ++g)
    gates[g] = load_number<M, T>(t.gates, at.row * width + g * p.hidden + at.unit, at.count);
  const int64_t element = at.row * p.hidden + at.unit;
  const N grad_h = load_number<M, T>(t.grad_output, element, at.count) + sum(0);
  const N grad_c = neighbour_number<M, Acc>(t.grad_cells, place.below, p.hidden, at) *
                       neighbour_number<M, T>(t.gates, place.below, width, at, p.hidden) +
                   neighbour_number<M, Acc>(t.grad_cells, place.right, p.hidden, at) *
                       neighbour_number<M, T>(t.gates, place.right, width, at, 2 * p.hidden);
  const auto r =
      grid_backward<M>(gates, load_number<M, T>(t.cells, element, at.count),
                       neighbour_number<M, T>(t.cells, place.above, p.hidden, at),
                       neighbour_number<M, T>(t.cells, place.left, p.hidden, at), grad_h, grad_c);
  store_number<M, Acc>(t.grad_cells, element, r.c, at.count);
  for (int g = 0; g < kGridGates; ++g) {
    const int64_t column = at.row * width + g * p.hidden + at.unit;
    store_number<M, T>(t.grad_sums, column, r.sums[g], at.count);
    if constexpr (sizeof(T) != sizeof(Acc))
      store_rounded<M, Term>(copy, at.row * term_row<T, Term>(width) + g * p.hidden + at.unit,
                             rounded<T>(r.sums[g]), at.count);
  }
}

// Runs `body(diagonal, own, w, w_derivative)` on a team of threads, diagonal after diagonal.
template <class P, class Body>
void each_diagonal(const GridProblem& p, const WeightLayout& layout, const Numbers& above,
                   const Numbers& left, bool backward, const Context& context, const Body& body) {
  P a(layout, above.value), a_derivative(layout, above.derivative);
  P b(layout, left.value), b_derivative(layout, left.derivative);
  const P* const w[2] = {&a, &b};
  const P* const w_derivative[2] = {&a_derivative, &b_derivative};
  const int64_t parts = grid_threads(p);
  parallel_team(context, parts < a.count() ? parts : a.count(), [&](const Team& team) {
    const Part own = Part::of(team, a);
    for (P* packed : {&a, &a_derivative, &b, &b_derivative}) packed->pack(own.begin, own.end);
    for (int64_t i = 0; i < p.diagonals(); ++i) {
      body(backward ? p.diagonals() - 1 - i : i, own, w, w_derivative);
      team.barrier();
    }
  });
}

template <class T, class Term, bool kDual>
void forward(const GridProblem& p, const GridForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using P = Panels<T, Term, kGridGates, kGridGates>;
  constexpr bool kWide = sizeof(T) == sizeof(Acc);
  const int64_t hidden = p.hidden, row = term_row<T, Term>(hidden);
  Terms<T, Term> copy(kWide ? 0 : p.height * p.width * p.batch, hidden, kDual);
  Scratch<Term> zeros(row);
  fill(zeros.data(), row, Term{});
  const NumbersOut& h = kWide ? t.output : copy.at();
  const Source<Term> from = {h, row, zeros.data()};
  each_diagonal<P>(p, {hidden, hidden, 1, hidden * hidden, hidden}, t.w_above, t.w_left, false,
                   context, [&](int64_t diagonal, const Part& own, const auto& w, const auto& d) {
                     each_product<M, T>(
                         p, diagonal, w, d, from, own,
                         [](const GridPlace& at, int side) { return side ? at.left : at.above; },
                         [&](const GridPlace& place, const At& at, const auto& sum) {
                           step<M, T, Term>(p, t, place, at, h, sum);
                         });
                   });
}

template <class T, class Term, bool kDual>
void backward(const GridProblem& p, const GridBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using P = Panels<T, Term, 4, 1>;
  constexpr bool kWide = sizeof(T) == sizeof(Acc);
  const int64_t hidden = p.hidden, width = kGridGates * hidden, row = term_row<T, Term>(width);
  Terms<T, Term> copy(kWide ? 0 : p.height * p.width * p.batch, width, kDual);
  Scratch<Term> zeros(row);
  fill(zeros.data(), row, Term{});
  const NumbersOut& sums = kWide ? t.grad_sums : copy.at();
  const Source<Term> from = {sums, row, zeros.data()};
  each_diagonal<P>(p, {hidden, width, hidden, 0, 1}, t.w_above, t.w_left, true, context,
                   [&](int64_t diagonal, const Part& own, const auto& w, const auto& d) {
                     each_product<M, T>(
                         p, diagonal, w, d, from, own,
                         [](const GridPlace& at, int side) { return side ? at.right : at.below; },
                         [&](const GridPlace& place, const At& at, const auto& sum) {
                           step_back<M, T, Term>(p, t, place, at, sums, sum);
                         });
                   });
}

// Calls `body` with the element type, what products read and whether numbers are dual.
template <class Body>
void dispatch(const GridProblem& p, const Body& body) {
  if (p.dual) {
    if (p.dtype == DType::f64) return body(TypeTag<double>{}, TypeTag<double>{}, std::true_type{});
    return body(TypeTag<float>{}, TypeTag<float>{}, std::true_type{});
  }
  dispatch_terms(p.dtype, [&](auto tag, auto term) { body(tag, term, std::false_type{}); });
}

void launch_forward(const GridProblem& p, const GridForward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto term, auto dual) {
    forward<typename decltype(tag)::type, typename decltype(term)::type, decltype(dual)::value>(
        p, t, context);
  });
}

void launch_backward(const GridProblem& p, const GridBackward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto term, auto dual) {
    backward<typename decltype(tag)::type, typename decltype(term)::type, decltype(dual)::value>(
        p, t, context);
  });
}

}  // namespace

const GridKernels grid_kernels = {launch_forward, launch_backward};

}  // namespace weft::WEFT_TARGET
