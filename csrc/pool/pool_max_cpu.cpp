// Maximum pooling on CPU, forward.
//
// Without places: the walk of pool_values.h. With places (one byte an output, for backward): large
// windows take the same walk with keys (pool_keys.h), small ones of stride 2 are compared where
// they lie (pool_pairs.h); for other small ones, and float64, rows are reduced along W first, the
// place travelling with the value, then along H and D through a ring of such rows, so that the
// first of equal ones wins in the order of the window.
#include "pool/pool_adaptive_max.h"
#include "pool/pool_cpu.h"
#include "pool/pool_pairs.h"
#include "pool/pool_planes.h"
#include "pool/pool_rows.h"
#include "pool/pool_values.h"

namespace weft::WEFT_TARGET {
namespace {

// A maximum is stored as it is.
struct Unchanged {
  void start(const RowPart&, int64_t) {}
  template <class V>
  WEFT_INLINE V operator()(int64_t, V value) const {
    return value;
  }
};

// Values and places of the windows along one row. Up to four places are compared one by one, in the
// phases of the row; larger windows double: of two neighbouring windows the right one wins only if
// it is larger, so the first of equal ones stays the first.
template <class T>
class PlacesAlongRow {
 public:
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

  explicit PlacesAlongRow(const PoolProblem& p)
      : window_(p.window[2]),
        inner_(p.inner),
        in_(p.in[2]),
        n_(p.out[2] * p.inner),
        pitch_(round_up(n_, kLanes<T>)),
        length_(((p.out[2] - 1) * window_.stride + window_.span()) * p.inner + kLanes<T>),
        doubling_(window_.size > 4),
        phases_(window_, doubling_ ? 1 : p.in[2], doubling_ ? 1 : p.out[2], p.inner, kLowest),
        best_(doubling_ ? length_ + kLanes<T> : 0),
        code_(doubling_ ? length_ + kLanes<T> : 0),
        first_place_(pitch_) {
    // A window without anything above -inf keeps its first place that is not padding.
    fill(first_place_.data(), pitch_, I{0});
    for (int64_t j = 0; j < n_; ++j)
      first_place_[j] = static_cast<I>(places_inside(window_, j / inner_, in_).begin);
  }

  int64_t pitch() const { return pitch_; }

  void run(const T* row, A* out, I* out_codes) {
    if (doubling_) return run_doubling(row, out, out_codes);
    phases_.split(row);
    for (int64_t j = 0; j < n_; j += kLanes<T>) {
      Vec<A> best = broadcast<Vec<A>>(kLowest);
      auto code = load_lanes(first_place_.data() + j);
      for (int64_t s = 0; s < window_.size; ++s)
        take_larger(best, code, load_vec(phases_.place(s) + j),
                    broadcast<Vec<I>>(static_cast<I>(s)));
      store_vec(out + j, best);
      store_lanes(out_codes + j, code);
    }
  }

 private:
  // Window j of twice `size` places from two windows, `shift` places apart.
  void take_right(int64_t n, int64_t shift) {
    A* best = best_.data();
    I* code = code_.data();
    const int64_t offset = shift * window_.dilation * inner_;
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      auto left = load_lanes(best + j);
      auto left_code = load_lanes(code + j);
      take_larger(left, left_code, load_lanes(best + j + offset),
                  load_lanes(code + j + offset) + static_cast<I>(shift));
      store_lanes(best + j, left);
      store_lanes(code + j, left_code);
    }
  }

  void run_doubling(const T* row, A* out, I* out_codes) {
    const int64_t before = window_.padding * inner_;
    const int64_t used = length_ - kLanes<T> - before;
    const int64_t inside = in_ * inner_ < used ? in_ * inner_ : used;
    fill_lanes(best_.data(), before, kLowest);
    widen_row(row, inside, best_.data() + before);
    fill_lanes(best_.data() + before + inside, length_ - before - inside, kLowest);
    fill_lanes(code_.data(), length_, I{0});
    const int64_t reach = length_ - kLanes<T>;
    int64_t power = 1;
    for (; 2 * power <= window_.size; power *= 2)
      take_right(reach - (2 * power - 1) * window_.dilation * inner_, power);
    if (power < window_.size)
      take_right(reach - (window_.span() - 1) * inner_, window_.size - power);
    if (inner_ == 1 && window_.stride > 1) {
      for (int64_t o = 0; o < n_; ++o) {
        out[o] = best_[o * window_.stride];
        out_codes[o] = code_[o * window_.stride];
      }
    } else {
      const int64_t run = window_.stride == 1 ? n_ : inner_;
      for (int64_t at = 0, from = 0; at < n_; at += run, from += window_.stride * run) {
        memcpy(out + at, best_.data() + from, run * sizeof(A));
        memcpy(out_codes + at, code_.data() + from, run * sizeof(I));
      }
    }
    for (int64_t j = 0; j < n_; j += kLanes<T>) {
      const auto code = load_lanes(out_codes + j);
      const auto first = load_lanes(first_place_.data() + j);
      store_lanes(out_codes + j, code > first ? code : first);
    }
  }

  const Window window_;
  const int64_t inner_, in_, n_;
  const int64_t pitch_;   // elements of a row of results
  const int64_t length_;  // elements that the windows of a row touch
  const bool doubling_;
  PhaseRow<T> phases_;
  Scratch<A> best_;
  Scratch<I> code_, first_place_;
};

template <class T, class Place>
void max_values_and_places(const PoolProblem& p, const T* x, T* y, Place* places, int64_t begin,
                           int64_t end) {
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  const int64_t n = p.out[2] * p.inner;
  const int64_t size_w = p.window[2].size;
  PlacesAlongRow<T> along_row(p);
  const int64_t pitch = along_row.pitch();
  Scratch<A> ring(WindowRows::ring_rows(p) * pitch);
  Scratch<I> ring_codes(WindowRows::ring_rows(p) * pitch);
  walk_rows(
      p, x, begin, end,
      [&](const T* row, int64_t slot) {
        along_row.run(row, ring.data() + slot * pitch, ring_codes.data() + slot * pitch);
      },
      [&](int64_t index, int64_t, int64_t, const WindowRows& rows) {
        for (int64_t j = 0; j < n; j += kLanes<T>) {
          Vec<A> best = broadcast<Vec<A>>(PlacesAlongRow<T>::kLowest);
          Vec<I> code = {};
          for (int64_t k = 0; k < rows.count; ++k) {
            const int64_t at = rows.slot[k] * pitch + j;
            const auto value = load_vec(ring.data() + at);
            const auto value_code =
                load_lanes(ring_codes.data() + at) + static_cast<I>(rows.place[k] * size_w);
            if (k == 0) {
              best = value;
              code = value_code;
            } else {
              take_larger(best, code, value, value_code);
            }
          }
          store_row<SumOf<T>>(y + index * n, j, n, best);
          store_places<Place, I>(places + index * n, j, n, code);
        }
      });
}

template <class T, class Place>
void max_keys(const PoolProblem& p, const T* x, T* y, Place* places, const Context& context) {
  run_walk<ValueWalk<KeyOf<T>, T>>(p, x, y, context, [&](const auto& walk) {
    return PlaceOfKey<T, Place>(p, walk.width(), walk.by_strips(), places);
  });
}

template <class T>
void max_values(const PoolProblem& p, const T* x, T* y, const Context& context) {
  if (pool_values_path(p) == PoolPath::planes)
    return reduce_globally<MaxOf<T>>(p, x, y, context, [](auto best) { return best; });
  pool_values<MaxOf<T>>(p, x, y, context, [](const auto&) { return Unchanged(); });
}

// Values and places of whole planes, a few planes at a time, which the places find in the cache.
template <class T, class Place>
void max_planes(const PoolProblem& p, const T* x, T* y, Place* places, const Context& context) {
  constexpr int64_t kPiece = 262144 / static_cast<int64_t>(sizeof(T));
  const int64_t size = p.in_positions();
  const auto planes = [&](int64_t first, int64_t count, const Context& threads) {
    PoolProblem q = p;
    q.outer = count;
    max_values(q, x + first * size, y + first, threads);
    parallel_for(threads, count, pool_grain(count, count * size), [&](int64_t begin, int64_t end) {
      for (int64_t k = first + begin; k < first + end; ++k)
        places[k] = static_cast<Place>(place_in_run(x + k * size, size, widen(y[k])));
    });
  };
  const int64_t few = 1 + kPiece / size;
  if (p.outer <= few) return planes(0, p.outer, context);
  Context alone = context;
  alone.threads = 1;
  parallel_for(context, ceil_div(p.outer, few), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t left = p.outer - piece * few;
      planes(piece * few, left < few ? left : few, alone);
    }
  });
}

}  // namespace

void max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                 const Context& context) {
  const PoolProblem fixed = pool_with_fixed_windows(p);
  const PoolPath path = pool_places_path(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* input = static_cast<const T*>(x);
    auto* output = static_cast<T*>(y);
    if (!fixed.adaptive() && places == nullptr) return max_values(fixed, input, output, context);
    dispatch_place(p, [&](auto place) {
      auto* kept = static_cast<decltype(place)*>(places);
      if (places != nullptr && path == PoolPath::planes)
        return max_planes(fixed, input, output, kept, context);
      if constexpr (!std::is_same_v<T, double>)
        if (path == PoolPath::keys) return max_keys(p, input, output, kept, context);
      const int64_t items = p.outer * p.out[0] * p.out[1];
      const int64_t grain = pool_grain(items, p.in_elements() + p.out_elements());
      parallel_for(context, items, grain, [&](int64_t begin, int64_t end) {
        if (path == PoolPath::boxes) {
          if (p.inner == 1 && p.in[0] * p.in[1] * p.out[0] * p.out[1] == 1)
            adaptive_row_maxima(p, input, output, kept, begin, end);
          else
            adaptive_max_values(p, input, output, kept, begin, end);
        } else if (path == PoolPath::pairs) {
          max_pairs(p, input, begin, end, output, static_cast<uint8_t*>(places));
        } else {
          max_values_and_places(p, input, output, kept, begin, end);
        }
      });
    });
  });
}

}  // namespace weft::WEFT_TARGET
