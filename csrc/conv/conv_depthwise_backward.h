// All gradients of depthwise convolution of channels-last tensors on CPU in one walk.
//
// A task is a run of rows of gy and the rows of gx that lie beside them: rows of gy and of x are
// read for gx (conv_depthwise.h), gw (conv_depthwise_wgrad.h) and gb while they lie in the cache.
// An activation is undone first, a block of rows at a time. Sums of tasks are added in a fixed
// order. Bound: as conv_rows_backward.h.
#pragma once

#include "conv/conv_depthwise.h"
#include "conv/conv_depthwise_wgrad.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
class PixelBackward {
 public:
  using Acc = accumulate_t<T>;

  // `p` has no activation, `activated` may have one.
  PixelBackward(const ConvProblem& p, const ConvProblem& activated, const ConvGradients& t,
                const Acc* weights)
      : p_(p),
        activated_(activated),
        g_(dgrad_gather(p)),
        t_(t),
        gather_(p, g_, weights),
        wgrad_(p),
        row_(p.out[2] * p.groups) {}

  // Rows [begin, end) of gy, with the rows of gx beside them. The sums of gw, then gb, go to
  // `sums`.
  void run(int64_t begin, int64_t end, Acc* sums) {
    gather_.begin(static_cast<T*>(t_.gx), beside(begin));
    const int64_t step = t_.y == nullptr ? end - begin : most(kBlockRows, kBlockElements / row_);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = least(first + step, end);
      const T* const gy = t_.y == nullptr ? static_cast<const T*>(t_.gy) : undone(first, last);
      block(gy, first, last, sums);
    }
  }

 private:
  static constexpr int64_t kBlockRows = 16, kBlockElements = 64 * 1024;

  int64_t gy_rows() const { return p_.n * p_.out[0] * p_.out[1]; }
  int64_t gx_rows() const { return p_.n * p_.in[0] * p_.in[1]; }
  // The rows of gx before this one lie beside the rows of gy before `at`.
  int64_t beside(int64_t at) const { return gx_rows() * at / gy_rows(); }

  void block(const T* gy, int64_t first, int64_t last, Acc* sums) {
    Acc* const bias = sums + p_.window_elements() * round_up(p_.groups, kLanes<T>);
    for (int64_t at = first; at < last; ++at) {
      wgrad_.add_row(static_cast<const T*>(t_.x), gy, at, sums);
      if (t_.gb != nullptr) wgrad_.add_bias_row(gy, at, bias);
      for (int64_t row = beside(at); row < beside(at + 1); ++row) gather_.row(gy, row);
    }
  }

  // The gradient before the activation, as far as a block reads it, addressed as gy is.
  const T* undone(int64_t first, int64_t last) {
    Range rows = {first, last};
    for (int64_t row = beside(first); row < beside(last); ++row) {
      const Range read = read_by(row);
      if (read.begin < read.end) rows = {least(rows.begin, read.begin), most(rows.end, read.end)};
    }
    const int64_t from = rows.begin * row_, count = (rows.end - rows.begin) * row_;
    if (count > held_) undone_.resize(held_ = count);
    activation_grad_row(activated_, static_cast<const T*>(t_.gy) + from,
                        static_cast<const T*>(t_.y) + from, undone_.data(), count);
    return undone_.data() - from;
  }
  // The rows of gy, counted over all images, that may be read for row `at` of gx.
  Range read_by(int64_t at) const {
    const int64_t h = at % p_.in[1], d = at / p_.in[1] % p_.in[0];
    const int64_t image = at / p_.in[1] / p_.in[0] * p_.out[0] * p_.out[1];
    const Range slices = sources_of(p_.window[0], d, d + 1, p_.out[0], true);
    const Range rows = sources_of(p_.window[1], h, h + 1, p_.out[1], true);
    if (slices.begin == slices.end || rows.begin == rows.end) return {0, 0};
    return {image + slices.begin * p_.out[1] + rows.begin,
            image + (slices.end - 1) * p_.out[1] + rows.end};
  }

  const ConvProblem& p_;
  const ConvProblem& activated_;
  const Gather g_;
  const ConvGradients& t_;
  PixelGather<T> gather_;
  const PixelWgrad<T> wgrad_;
  int64_t row_;  // elements
  int64_t held_ = 0;
  Scratch<T> undone_;
};

template <class T>
void backward_pixels(const ConvProblem& activated, const ConvGradients& t, const Context& context) {
  using Acc = accumulate_t<T>;
  ConvProblem p = activated;
  p.activation = Activation::none;
  const int64_t sums = (p.window_elements() + 1) * round_up(p.groups, kLanes<T>);
  const int64_t rows = p.n * p.out[0] * p.out[1];
  const int64_t chunks = image_chunks(rows, 1);
  const PixelWeights<T> packed(p, static_cast<const T*>(t.w), nullptr);
  Scratch<Acc> partial(chunks * sums);
  parallel_for(context, chunks, 1, [&](int64_t begin, int64_t end) {
    PixelBackward<T> backward(p, activated, t, packed.data());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      fill(partial.data() + chunk * sums, sums, Acc{0});
      backward.run(rows * chunk / chunks, rows * (chunk + 1) / chunks,
                   partial.data() + chunk * sums);
    }
  });
  add_pixel_sums<T>(p, partial.data(), chunks, static_cast<T*>(t.gw), static_cast<T*>(t.gb),
                    context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
