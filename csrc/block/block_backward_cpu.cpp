// All gradients of a CNN's layer on CPU, where convolution takes the map's gradient as it is made.
//
// Convolution's walk (conv_rows_backward.h) asks for a few planes, or a band of one, at a time;
// they are made in its scratch of the pooled gradient, a quarter of the map where windows are of
// 2 × 2: undone by the maxima themselves before they go to their places, or spread over the windows
// and multiplied by the signs. Each sum has the order of the layers one by one, so the bits are
// theirs. Bound: bytes, of x, gx and what is pooled; the map's own gradient never goes to memory.
#include "block/block_cpu.h"

#include <cstring>

#include "conv/conv_activation.h"
#include "core/small_scratch.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
class PooledGradient : public MadeGradient {
 public:
  PooledGradient(const BlockProblem& b, const BlockGradients& t)
      : MadeGradient{make},
        b_(b),
        t_(t),
        signs_(sign_rows(b.pool, false, b.conv.activation, b.conv.slope)),
        axis_(b.pool.in[0] > 1 ? 0 : 1),
        row_(b.pool.in_positions() / b.pool.in[axis_]),
        pooled_row_(b.pool.out_positions() / b.pool.out[axis_]) {}

 private:
  static void make(const MadeGradient& self, int64_t first, int64_t count, Range slices, Range rows,
                   void* to) {
    static_cast<const PooledGradient&>(self).planes(first, count, slices, rows,
                                                    static_cast<T*>(to));
  }

  void planes(int64_t first, int64_t count, Range slices, Range rows, T* to) const {
    const Range asked = axis_ == 0 ? slices : rows;
    if (asked.end - asked.begin == b_.pool.in[axis_]) {
      PoolProblem pool = b_.pool;
      pool.outer = count;
      return gradient(pool, first, 0, 0, to);
    }
    if (asked.begin == asked.end) return;
    const Range read = {with_whole_bytes(asked.begin), asked.end};
    for (int64_t i = 0; i < count; ++i) band(first + i, read, to + i * b_.pool.in_positions());
  }

  // Signs of a band begin with a byte.
  int64_t with_whole_bytes(int64_t row) const {
    while (!b_.maximum && row * row_ % 8 != 0) --row;
    return row;
  }

  // Rows `read` of a plane, as a pooling of its own.
  void band(int64_t plane, Range read, T* to) const {
    PoolProblem pool = b_.pool;
    PoolWindow& window = pool.window[axis_];
    const int64_t last = outputs_covering(window, read.end - 1, pool.out[axis_]).end;
    int64_t first = outputs_covering(window, read.begin, pool.out[axis_]).begin;
    // Where no window holds the first row, the one before: padding is never negative.
    if (first > 0 && (first >= last || window.first_input(first) > read.begin)) --first;
    if (first >= last) {
      memset(to + read.begin * row_, 0, (read.end - read.begin) * row_ * sizeof(T));
      return;
    }
    const int64_t start = window.first_input(first);
    if (b_.maximum) {  // whose windows are whole
      const int64_t end = window.first_input(last - 1) + window.span();
      read.begin = start > 0 ? start : 0;
      if (end > read.end) read.end = end < pool.in[axis_] ? end : pool.in[axis_];
    }
    window.padding = read.begin - start;
    pool.outer = 1;
    pool.in[axis_] = read.end - read.begin;
    pool.out[axis_] = last - first;
    gradient(pool, plane, read.begin, first, to + read.begin * row_);
  }

  // Of planes from `plane` on, from their `row` and pooled row on.
  void gradient(const PoolProblem& pool, int64_t plane, int64_t row, int64_t pooled, T* to) const {
    const Context alone;
    const int64_t at = plane * b_.pool.out_positions() + pooled * pooled_row_;
    const T* const gy = static_cast<const T*>(t_.gy) + at;
    if (!b_.maximum) {
      pool_kernels.avg_backward(pool, gy, to, alone);
      SignRows signs = signs_;
      signs.rows = pool.outer;
      signs.length = pool.in_positions();
      const uint8_t* const bits = t_.kept + plane * signs_.bytes() + row * row_ / 8;
      return block_kernels.pass_signs(signs, bits, to, alone);
    }
    const uint8_t* const places = t_.kept + at * pool.place_bytes();
    if (b_.conv.activation == Activation::none)
      return pool_kernels.max_backward(pool, gy, places, to, alone);
    SmallScratch<T, 4096> undone(pool.out_elements());
    activation_grad_row(b_.conv, gy, static_cast<const T*>(t_.y) + at, undone.data(),
                        pool.out_elements());
    pool_kernels.max_backward(pool, undone.data(), places, to, alone);
  }

  const BlockProblem& b_;
  const BlockGradients& t_;
  SignRows signs_;
  int axis_;
  int64_t row_, pooled_row_;  // elements, of `axis_`
};

}  // namespace

void block_backward(const BlockProblem& b, const BlockGradients& t, const Context& context) {
  ConvProblem p = b.conv;
  p.activation = Activation::none;
  dispatch_dtype(p.dtype, [&](auto tag) {
    const PooledGradient<typename decltype(tag)::type> made(b, t);
    conv_kernels.backward(p, {t.x, nullptr, t.w, nullptr, t.gx, t.gw, t.gb, &made}, context);
  });
}

}  // namespace weft::WEFT_TARGET
