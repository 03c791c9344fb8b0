// Layer normalisation of the products of a recurrent layer on CUDA, and its backward: a block per
// row and gate reads its H numbers three times, the last two from the cache; sums by a tree in
// shared memory, in an order that depends on H alone. Bound: bytes, and for few rows launches.
#include "rnn/rnn_layer_tile.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kNormThreads = 128;

// The block's sum of everybody's `x`, to all.
template <class Acc>
WEFT_DEVICE Acc block_sum(Acc x, Acc* shared) {
  const int at = device::thread_index();
  shared[at] = x;
  device::barrier();
  for (int half = kNormThreads / 2; half > 0; half /= 2) {
    if (at < half) shared[at] += shared[at + half];
    device::barrier();
  }
  const Acc sum = shared[0];
  device::barrier();
  return sum;
}
template <class Acc>
WEFT_DEVICE Dual<Acc> block_sum(Dual<Acc> x, Acc* shared) {
  const Acc value = block_sum(x.value, shared);
  return {value, block_sum(x.derivative, shared)};
}

// Where a block stands: its row, and the first column of its gate.
struct Block {
  int64_t row, column, width;
};
WEFT_DEVICE Block block_of(const LayerProblem& p, int64_t first, int64_t end) {
  const int64_t count = end - first, at = device::block_index();
  return {at / count, (first + at % count) * p.hidden, p.gates() * p.hidden};
}

template <class N>
struct Moments {
  N mean, scale;  // scale: 1 / sqrt(variance + eps)
};

// `number(i)` is one of the block's H.
template <class M, class Acc, class Number>
WEFT_DEVICE Moments<typename M::Number> moments(int64_t size, Acc* shared, const Number& number) {
  using N = typename M::Number;
  const Acc part = Acc{1} / static_cast<Acc>(size);
  N sum = {}, squares = {};
  for (int64_t i = device::thread_index(); i < size; i += kNormThreads) sum = sum + number(i);
  const N mean = part * block_sum(sum, shared);
  for (int64_t i = device::thread_index(); i < size; i += kNormThreads) {
    const N d = number(i) - mean;
    squares = squares + d * d;
  }
  N variance = part * block_sum(squares, shared);
  if constexpr (M::kDual) {
    variance.value += static_cast<Acc>(kNormEpsilon);
  } else {
    variance += static_cast<Acc>(kNormEpsilon);
  }
  return {mean, inverse_root(variance)};
}

template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_normalise(LayerProblem p, int64_t first, int64_t end,
                                          Numbers products, Numbers scale, const bool* fresh,
                                          int64_t out_row, accumulate_t<T>* out,
                                          accumulate_t<T>* out_d, T* kept, T* kept_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory memory;
  Acc* shared = memory.take<Acc>(kNormThreads);
  const Block at = block_of(p, first, end);
  const bool zero = fresh && load(fresh + at.row);
  const auto number = [&](int64_t i) {
    return zero ? N{} : load_number<M, Acc>(products, at.row * at.width + at.column + i);
  };
  const Moments<N> found = moments<M>(p.hidden, shared, number);
  for (int64_t i = device::thread_index(); i < p.hidden; i += kNormThreads) {
    const N x = number(i);
    if (kept) store_number<M>(kept, kept_d, at.row * at.width + at.column + i, x);
    store_number<M>(out, out_d, at.row * out_row + at.column + i,
                    load_number<M, T>(scale, at.column + i) * ((x - found.mean) * found.scale));
  }
}

template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_normalise_backward(LayerProblem p, int64_t first, int64_t end,
                                                   Numbers grad, Numbers products, Numbers scale,
                                                   T* grad_products, T* grad_products_d,
                                                   T* grad_scale, T* grad_scale_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory memory;
  Acc* shared = memory.take<Acc>(kNormThreads);
  const Block at = block_of(p, first, end);
  const int64_t begin = at.row * at.width + at.column;
  const auto number = [&](int64_t i) { return load_number<M, T>(products, begin + i); };
  const Moments<N> found = moments<M>(p.hidden, shared, number);
  N sum = {}, along = {};
  for (int64_t i = device::thread_index(); i < p.hidden; i += kNormThreads) {
    const N g = load_number<M, T>(grad, begin + i) * load_number<M, T>(scale, at.column + i);
    sum = sum + g;
    along = along + g * ((number(i) - found.mean) * found.scale);
  }
  const Acc part = Acc{1} / static_cast<Acc>(p.hidden);
  sum = part * block_sum(sum, shared);
  along = part * block_sum(along, shared);
  for (int64_t i = device::thread_index(); i < p.hidden; i += kNormThreads) {
    const N n = (number(i) - found.mean) * found.scale, g = load_number<M, T>(grad, begin + i);
    const N scaled = g * load_number<M, T>(scale, at.column + i);
    store_number<M>(grad_products, grad_products_d, begin + i,
                    found.scale * (scaled - sum - n * along));
    store_number<M>(grad_scale, grad_scale_d, begin + i, g * n);
  }
}

}  // namespace

void normalise_rows(const LayerProblem& p, const NormForward& t, const Context& context) {
  dispatch_numbers(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    device::launch({"recurrent_layer_normalise", t.rows * (t.end - t.first), kNormThreads,
                    kNormThreads * static_cast<int64_t>(sizeof(Acc)), context.stream},
                   layer_normalise<T, decltype(dual)::value>, p, t.first, t.end, t.products,
                   t.scale, t.fresh, t.out_row, static_cast<Acc*>(t.out.value),
                   static_cast<Acc*>(t.out.derivative), static_cast<T*>(t.kept.value),
                   static_cast<T*>(t.kept.derivative));
  });
}

void normalise_rows_backward(const LayerProblem& p, const NormBackward& t, const Context& context) {
  dispatch_numbers(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    device::launch({"recurrent_layer_normalise_backward", t.rows * (t.end - t.first), kNormThreads,
                    kNormThreads * static_cast<int64_t>(sizeof(accumulate_t<T>)), context.stream},
                   layer_normalise_backward<T, decltype(dual)::value>, p, t.first, t.end, t.grad,
                   t.products, t.scale, static_cast<T*>(t.grad_products.value),
                   static_cast<T*>(t.grad_products.derivative), static_cast<T*>(t.grad_scale.value),
                   static_cast<T*>(t.grad_scale.derivative));
  });
}

}  // namespace weft::WEFT_TARGET
