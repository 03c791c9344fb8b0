// Recurrent cells on CPU.
//
// Forward is the tile product x W_ih^T + h W_hh^T (of bf16 by dot products of pairs, where the CPU
// has them) with the gates as its epilogue: threads split the hidden units; a thread takes one
// vector of units at a time, for those the four sums of up to kRowBlock batch rows (a tile at a
// time, into a scratch that stays in the cache), then the gates, one vector of units per row. The
// pre-activations never reach memory. Rows that lie across cache lines are copied where they are
// read often (dot_cpu.h). Bound: FLOPs for large batches; for one row, the bytes of the weights,
// each read once.
//
// Backward and double backward are elementwise, one vector of units at a time; bound: bytes.
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/vec_math.h"
#include "core/window.h"
#include "gemm/dot_cpu.h"
#include "rnn/cell_math.h"
#include "rnn/rnn.h"
#include "rnn/rnn_plan.h"
#include "rnn/units_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// A tile is kTileRows batch rows by kTileSums / Cell::kSums hidden units.
#if defined(__AVX512F__)
constexpr int kTileRows = 3, kTileSums = 8;
#else
constexpr int kTileRows = 3, kTileSums = 4;
#endif
constexpr int64_t kRowBlock = 64;
constexpr int64_t kCopiedRows = 12, kCopiedSteps = 8;  // from which on copies for dot_rows pay

// ---- forward -----------------------------------------------------------------------------------

template <class T>
struct Operands {
  const T *h, *c, *b_ih, *b_hh;
  T *h_next, *c_next, *gates;

  explicit Operands(const CellForward& t)
      : h(static_cast<const T*>(t.h)),
        c(static_cast<const T*>(t.c)),
        b_ih(static_cast<const T*>(t.b_ih)),
        b_hh(static_cast<const T*>(t.b_hh)),
        h_next(static_cast<T*>(t.h_next)),
        c_next(static_cast<T*>(t.c_next)),
        gates(static_cast<T*>(t.gates)) {}
};

// `kGates` rows of weights a unit; which of its `kSums` sums each adds to in the two products.
struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kSums = 4;
  static constexpr int kInputColumn[] = {0, 1, 2, 3};
  static constexpr int kHiddenColumn[] = {0, 1, 2, 3};

  // The sums of one row, a vector of units at `unit`; its gates and next state.
  template <class T, class V>
  static WEFT_INLINE void finish(const CellProblem& p, const Operands<T>& t, int64_t row,
                                 int64_t unit, int count, const V (&sum)[kSums]) {
    const int64_t at = row * p.hidden + unit;
    const LstmGates<V> s = {vec_sigmoid(sum[0]), vec_sigmoid(sum[1]), vec_tanh(sum[2]),
                            vec_sigmoid(sum[3])};
    const V c_next = lstm_next_cell(s, load_units(t.c + at, count));
    store_units(t.c_next + at, c_next, count);
    store_units(t.h_next + at, s.o * vec_tanh(c_next), count);
    if (t.gates == nullptr) return;
    T* gates = t.gates + row * kSums * p.hidden + unit;
    store_units(gates, s.i, count);
    store_units(gates + p.hidden, s.f, count);
    store_units(gates + 2 * p.hidden, s.g, count);
    store_units(gates + 3 * p.hidden, s.o, count);
  }
};

struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kSums = 4;
  static constexpr int kInputColumn[] = {0, 1, 2};
  static constexpr int kHiddenColumn[] = {0, 1, 3};

  template <class T, class V>
  static WEFT_INLINE void finish(const CellProblem& p, const Operands<T>& t, int64_t row,
                                 int64_t unit, int count, const V (&sum)[kSums]) {
    const int64_t at = row * p.hidden + unit;
    const V r = vec_sigmoid(sum[0]), z = vec_sigmoid(sum[1]), q = sum[3];
    const V n = vec_tanh(sum[2] + r * q);
    store_units(t.h_next + at, gru_next_hidden(z, n, load_units(t.h + at, count)), count);
    if (t.gates == nullptr) return;
    T* gates = t.gates + row * kSums * p.hidden + unit;
    store_units(gates, r, count);
    store_units(gates + p.hidden, z, count);
    store_units(gates + 2 * p.hidden, n, count);
    store_units(gates + 3 * p.hidden, q, count);
  }
};

template <bool kRelu>
struct Elman {
  static constexpr int kGates = 1;
  static constexpr int kSums = 1;
  static constexpr int kInputColumn[] = {0};
  static constexpr int kHiddenColumn[] = {0};

  template <class T, class V>
  static WEFT_INLINE void finish(const CellProblem& p, const Operands<T>& t, int64_t row,
                                 int64_t unit, int count, const V (&sum)[kSums]) {
    V h_next;
    if constexpr (kRelu) {
      h_next = sum[0] < V{} ? V{} : sum[0];  // NaN stays NaN
    } else {
      h_next = vec_tanh(sum[0]);
    }
    store_units(t.h_next + row * p.hidden + unit, h_next, count);
  }
};

// Unit u's gate g is row u * kGates + g of the tile.
template <int Units, int Sums, int Gates>
consteval Columns<Units * Gates> tile_columns(const int (&column)[Gates]) {
  Columns<Units * Gates> result{};
  for (int i = 0; i < Units * Gates; ++i) result.at[i] = i / Gates * Sums + column[i % Gates];
  return result;
}

// The factors of one of a cell's two products, as a thread reads them: rows [B, k], and of the
// weights [gates * H, k] a tile of at most kTile rows at a time. Where rows of either lie across
// cache lines and there are some to multiply, both are read from copies. Lost: one copy of the rows
// for all threads, which meet at a barrier behind it, slower for small cells.
template <bool kPairs, class T, int kTile>
class Factors {
 public:
  Factors(const void* rows, const void* weights, int64_t batch, int64_t k)
      : rows_(static_cast<const T*>(rows)),
        weights_(static_cast<const T*>(weights)),
        k_(k),
        terms_(k) {
    if (batch < kCopiedRows || k < kCopiedSteps * kDotStep<kPairs, T>) return;
    if (!lie_across<kPairs>(rows_, k) && !lie_across<kPairs>(weights_, k)) return;
    terms_ = whole_steps<kPairs, T>(k);
    copies_.resize((kTile + batch) * terms_);
    T* const copied_rows = copies_.data() + kTile * terms_;
    for (int64_t i = 0; i < batch; ++i)
      copy_steps<kPairs>(rows_ + i * k, k, copied_rows + i * terms_);
    rows_ = copied_rows;
  }

  const T* row(int64_t i) const { return rows_ + i * terms_; }
  int64_t terms() const { return terms_; }  // of a row
  // Tells where the tile's row i is, which is row at(i) of the weights.
  template <int Rows, class At>
  WEFT_INLINE void find(const At& at, const T* (&found)[Rows]) {
    static_assert(Rows <= kTile);
    for (int i = 0; i < Rows; ++i) {
      found[i] = weights_ + at(i) * k_;
      if (copies_.data() == nullptr) continue;
      T* const copy = copies_.data() + i * terms_;
      copy_steps<kPairs>(found[i], k_, copy);
      found[i] = copy;
    }
  }

 private:
  const T *rows_, *weights_;
  int64_t k_, terms_;
  Scratch<T> copies_;  // of the tile's weights, then of the rows
};

template <class Cell, bool kPairs, class T>
struct Products {
  Factors<kPairs, T, kTileSums / Cell::kSums * Cell::kGates> input, hidden;
};

// The sums of `Rows` batch rows from `row`, to sums[row][column][unit] with kLanes units a column.
template <class Cell, bool kPairs, int Rows, int Units, class T>
WEFT_INLINE void tile_sums(const Products<Cell, kPairs, T>& products, int64_t row,
                           const T* const (&w_ih)[Units * Cell::kGates],
                           const T* const (&w_hh)[Units * Cell::kGates], accumulate_t<T>* sums) {
  using V = Vec<accumulate_t<T>>;
  constexpr int kSums = Cell::kSums;
  V sum[Rows][Units * kSums] = {};
  const auto& [input, hidden] = products;
  dot_rows<tile_columns<Units, kSums>(Cell::kInputColumn), kPairs>(
      sum, input.row(row), input.terms(), w_ih, input.terms());
  dot_rows<tile_columns<Units, kSums>(Cell::kHiddenColumn), kPairs>(
      sum, hidden.row(row), hidden.terms(), w_hh, hidden.terms());
  constexpr int kCount = Rows * Units * kSums;
  constexpr int kFold = kCount % 4 == 0 && kLanes<T> >= 4 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma GCC unroll 32
  for (int first = 0; first < kCount; first += kFold) {
    V part[kFold];
#pragma GCC unroll 4
    for (int i = 0; i < kFold; ++i)
      part[i] = sum[(first + i) / (Units * kSums)][(first + i) % (Units * kSums)];
    const V folded = fold(part);
#pragma GCC unroll 4
    for (int i = 0; i < kFold; ++i) {
      const int m = (first + i) / (Units * kSums), u = (first + i) / kSums % Units;
      sums[(m * kSums + (first + i) % kSums) * kLanes<T> + u] = folded[i];
    }
  }
}

// The sums of some batch rows and of `Units` hidden units from `unit`.
template <class Cell, bool kPairs, int Units, class T>
void unit_sums(const CellProblem& p, Products<Cell, kPairs, T>& products, int64_t row, int64_t rows,
               int64_t unit, accumulate_t<T>* sums) {
  constexpr int kTile = Units * Cell::kGates, kRowSums = Cell::kSums * kLanes<T>;
  const auto at = [&](int i) __attribute__((always_inline)) {
    return i % Cell::kGates * p.hidden + unit + i / Cell::kGates;
  };
  const T *w_ih[kTile], *w_hh[kTile];
  products.input.find(at, w_ih);
  products.hidden.find(at, w_hh);
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    tile_sums<Cell, kPairs, kTileRows, Units>(products, row + m, w_ih, w_hh, sums + m * kRowSums);
  for (; m + 2 <= rows; m += 2)
    tile_sums<Cell, kPairs, 2, Units>(products, row + m, w_ih, w_hh, sums + m * kRowSums);
  for (; m < rows; ++m)
    tile_sums<Cell, kPairs, 1, Units>(products, row + m, w_ih, w_hh, sums + m * kRowSums);
}

// The same of the units from `unit` to `end`, at most a vector of them, by tiles of `Units` and
// what is left by smaller ones.
template <class Cell, bool kPairs, int Units, class T>
void vector_sums(const CellProblem& p, Products<Cell, kPairs, T>& products, int64_t row,
                 int64_t rows, int64_t unit, int64_t end, accumulate_t<T>* sums) {
  for (; unit + Units <= end; unit += Units, sums += Units)
    unit_sums<Cell, kPairs, Units>(p, products, row, rows, unit, sums);
  if constexpr (Units > 1)
    vector_sums<Cell, kPairs, Units / 2>(p, products, row, rows, unit, end, sums);
}

template <class Cell, bool kPairs, class T>
void cell_forward(const CellProblem& p, const CellForward& tensors, const Context& context) {
  using V = Vec<accumulate_t<T>>;
  constexpr int kUnits = kLanes<T>, kSums = Cell::kSums, kTileUnits = kTileSums / kSums;
  const Operands<T> t(tensors);
  const int64_t tiles = ceil_div(p.hidden, kTileUnits);
  const int64_t grain = ceil_div(cell_grain(p, Cell::kGates), kTileUnits);
  parallel_for(context, tiles, grain, [&](int64_t first_tile, int64_t end_tile) {
    const int64_t begin = first_tile * kTileUnits;
    const int64_t end = std::min(end_tile * kTileUnits, p.hidden);
    Products<Cell, kPairs, T> products = {{tensors.x, tensors.w_ih, p.batch, p.input},
                                          {tensors.h, tensors.w_hh, p.batch, p.hidden}};
    alignas(kVectorBytes) accumulate_t<T> sums[kRowBlock * kSums * kUnits];
    for (int64_t unit = begin; unit < end; unit += kUnits) {
      const auto count = static_cast<int>(end - unit < kUnits ? end - unit : kUnits);
      V bias[kSums] = {};
      for (int g = 0; g < Cell::kGates; ++g) {
        bias[Cell::kInputColumn[g]] += load_units_or_zero(t.b_ih, g * p.hidden + unit, count);
        bias[Cell::kHiddenColumn[g]] += load_units_or_zero(t.b_hh, g * p.hidden + unit, count);
      }
      for (int64_t row = 0; row < p.batch; row += kRowBlock) {
        const int64_t rows = p.batch - row < kRowBlock ? p.batch - row : kRowBlock;
        vector_sums<Cell, kPairs, kTileUnits>(p, products, row, rows, unit, unit + count, sums);
        for (int64_t m = 0; m < rows; ++m) {
          V sum[kSums];
#pragma GCC unroll 4
          for (int i = 0; i < kSums; ++i)
            sum[i] = load_vec(sums + (m * kSums + i) * kUnits) + bias[i];
          Cell::finish(p, t, row + m, unit, count, sum);
        }
      }
    }
  });
}

template <class Cell>
void launch_cell(const CellProblem& p, const CellForward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
      if (has_pairs()) return cell_forward<Cell, true, T>(p, t, context);
#endif
    cell_forward<Cell, false, T>(p, t, context);
  });
}

// ---- elementwise -------------------------------------------------------------------------------

// Calls `body(row, unit, count)` for every vector of units of every row.
template <class T, class Body>
WEFT_INLINE void for_each_vector(const CellProblem& p, const Context& context, const Body& body) {
  const int64_t vectors = ceil_div(p.hidden, kLanes<T>);
  const int64_t grain = kElementGrain / kLanes<T>;
  parallel_for(context, p.batch * vectors, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / vectors, unit = i % vectors * kLanes<T>;
      const int64_t left = p.hidden - unit;
      body(row, unit, static_cast<int>(left < kLanes<T> ? left : kLanes<T>));
    }
  });
}

// `Count` columns of [B, Count, H] at one row and vector of units.
template <int Count, class T>
struct Block {
  T* data;
  int64_t hidden;
  int64_t at;
  int count;

  Block(const void* memory, const CellProblem& p, int64_t row, int64_t unit, int count)
      : data(static_cast<T*>(const_cast<void*>(memory))),
        hidden(p.hidden),
        at(row * Count * p.hidden + unit),
        count(count) {}

  WEFT_INLINE auto operator[](int column) const {
    return load_units_or_zero<T>(data, at + column * hidden, count);
  }
  template <class V>
  WEFT_INLINE void store(int column, V value) const {
    store_units(data + at + column * hidden, value, count);
  }
};

void launch_lstm_backward(const CellProblem& p, const LstmBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using V = Vec<accumulate_t<T>>;
    for_each_vector<T>(p, context, [&](int64_t row, int64_t unit, int count) {
      const auto one = [&](const void* memory) { return Block<1, T>(memory, p, row, unit, count); };
      const Block<4, T> s(t.gates, p, row, unit, count), out(t.grad_gates, p, row, unit, count);
      const auto g =
          lstm_backward<V>({s[0], s[1], s[2], s[3]}, one(t.c)[0], vec_tanh(one(t.c_next)[0]),
                           one(t.grad_h)[0], one(t.grad_c)[0], V{} + 1);
      out.store(0, g.gates.i);
      out.store(1, g.gates.f);
      out.store(2, g.gates.g);
      out.store(3, g.gates.o);
      one(t.grad_c_prev).store(0, g.c);
    });
  });
}

void launch_lstm_double_backward(const CellProblem& p, const LstmDoubleBackward& t,
                                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using V = Vec<accumulate_t<T>>;
    for_each_vector<T>(p, context, [&](int64_t row, int64_t unit, int count) {
      const auto one = [&](const void* memory) { return Block<1, T>(memory, p, row, unit, count); };
      const Block<4, T> gates(t.gates, p, row, unit, count), u(t.u_gates, p, row, unit, count);
      const Block<4, T> out(t.of_gates, p, row, unit, count);
      const LstmGates<V> s = {gates[0], gates[1], gates[2], gates[3]};
      const V c = one(t.c)[0];
      const auto g = lstm_double_backward<V>(s, c, vec_tanh(lstm_next_cell(s, c)), one(t.grad_h)[0],
                                             one(t.grad_c)[0], {u[0], u[1], u[2], u[3]},
                                             one(t.u_c)[0], V{}, V{} + 1);
      one(t.of_grad_h).store(0, g.grad_h);
      one(t.of_grad_c).store(0, g.grad_c);
      out.store(0, g.gates.i);
      out.store(1, g.gates.f);
      out.store(2, g.gates.g);
      out.store(3, g.gates.o);
      one(t.of_c).store(0, g.c);
    });
  });
}

void launch_gru_backward(const CellProblem& p, const GruBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using V = Vec<accumulate_t<T>>;
    for_each_vector<T>(p, context, [&](int64_t row, int64_t unit, int count) {
      const auto one = [&](const void* memory) { return Block<1, T>(memory, p, row, unit, count); };
      const Block<4, T> s(t.gates, p, row, unit, count);
      const Block<3, T> of_x(t.grad_x_gates, p, row, unit, count);
      const Block<3, T> of_h(t.grad_h_gates, p, row, unit, count);
      const auto g =
          gru_backward<V>({s[0], s[1], s[2], s[3]}, one(t.h)[0], one(t.grad_h)[0], V{} + 1);
      of_x.store(0, g.gates.r);
      of_x.store(1, g.gates.z);
      of_x.store(2, g.gates.n);
      of_h.store(0, g.gates.r);
      of_h.store(1, g.gates.z);
      of_h.store(2, g.gates.q);
      one(t.grad_h_prev).store(0, g.h);
    });
  });
}

void launch_gru_double_backward(const CellProblem& p, const GruDoubleBackward& t,
                                const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using V = Vec<accumulate_t<T>>;
    for_each_vector<T>(p, context, [&](int64_t row, int64_t unit, int count) {
      const auto one = [&](const void* memory) { return Block<1, T>(memory, p, row, unit, count); };
      const Block<4, T> s(t.gates, p, row, unit, count), out(t.of_gates, p, row, unit, count);
      const Block<3, T> ux(t.u_x, p, row, unit, count), uh(t.u_h, p, row, unit, count);
      const auto g = gru_double_backward<V>({s[0], s[1], s[2], s[3]}, one(t.h)[0], one(t.grad_h)[0],
                                            {ux[0] + uh[0], ux[1] + uh[1], ux[2], uh[2]},
                                            one(t.u_prev)[0], V{}, V{} + 1);
      one(t.of_grad_h).store(0, g.grad_h);
      out.store(0, g.gates.r);
      out.store(1, g.gates.z);
      out.store(2, g.gates.n);
      out.store(3, g.gates.q);
      one(t.of_h).store(0, g.h);
    });
  });
}

void launch_rnn_backward(const CellProblem& p, const ElmanBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using V = Vec<accumulate_t<T>>;
    for_each_vector<T>(p, context, [&](int64_t row, int64_t unit, int count) {
      const auto one = [&](const void* memory) { return Block<1, T>(memory, p, row, unit, count); };
      const V grad = one(t.grad_h)[0], y = one(t.h_next)[0];
      one(t.grad_sums).store(0, t.relu ? (y <= V{} ? V{} : grad) : grad * tanh_slope(y, V{} + 1));
    });
  });
}

}  // namespace

const RnnKernels rnn_kernels = {
    launch_cell<Lstm>,         launch_lstm_backward,     launch_lstm_double_backward,
    launch_cell<Gru>,          launch_gru_backward,      launch_gru_double_backward,
    launch_cell<Elman<false>>, launch_cell<Elman<true>>, launch_rnn_backward};

}  // namespace weft::WEFT_TARGET
