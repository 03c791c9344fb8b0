// All gradients of depthwise convolution of contiguous tensors on CPU in one walk.
//
// A task is a band of rows of one channel of a chunk of images. Its part of the gradient is read
// once for gx (conv_rows.h), gw (conv_rows_wgrad.h) and gb, while it lies in the cache, and so is
// its part of the input. An activation is undone first, in a plane of scratch. Sums of tasks are
// added in a fixed order. Bound: bytes where windows are small; one by one, the three gradients read
// what they share from memory again.
#pragma once

#include "conv/conv_rows.h"
#include "conv/conv_rows_wgrad.h"

namespace weft::WEFT_TARGET {
namespace {

// A part of the walk: a slice and a band of rows of gx, and of gy. Either may be empty.
struct BackwardPart {
  Range gx_slices, gx_rows;
  Range gy_slices, gy_rows;
};

// Parts of both maps that lie near each other, and whose sources fit into scratch.
class BackwardParts {
 public:
  explicit BackwardParts(const ConvProblem& p)
      : p_(p),
        slices_(most(p.in[0], p.out[0])),
        bands_(most(ceil_div(p.in[1], band_rows(p, dgrad_gather(p), kBandElements)),
                    ceil_div(p.out[1], band_rows(p, fprop_gather(p), kBandElements)))) {}

  int64_t count() const { return slices_ * bands_; }
  BackwardPart part(int64_t i) const {
    const int64_t slice = i / bands_, band = i % bands_;
    return {part_of(p_.in[0], slice, slices_), part_of(p_.in[1], band, bands_),
            part_of(p_.out[0], slice, slices_), part_of(p_.out[1], band, bands_)};
  }

 private:
  static Range part_of(int64_t extent, int64_t i, int64_t parts) {
    return {extent * i / parts, extent * (i + 1) / parts};
  }

  const ConvProblem& p_;
  int64_t slices_, bands_;
};

// One channel of some images of gy with the activation undone, as far as a part reads it.
template <class T>
class SumGradient {
 public:
  SumGradient(const ConvProblem& p, int64_t images)
      : p_(p), data_(images * p.out_positions()) {}

  const T* undo(const BackwardPart& part, const T* gy, const T* y, int64_t images) {
    Range slices = part.gy_slices, rows = part.gy_rows;
    if (part.gx_slices.begin < part.gx_slices.end && part.gx_rows.begin < part.gx_rows.end) {
      slices = joined(slices, read_by(0, part.gx_slices));
      rows = joined(rows, read_by(1, part.gx_rows));
    }
    const int64_t image = p_.groups * p_.out_positions();
    const int64_t count = (rows.end - rows.begin) * p_.out[2];
    for (int64_t i = 0; i < images; ++i)
      for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
        const int64_t at = (slice * p_.out[1] + rows.begin) * p_.out[2];
        activation_grad_row(p_, gy + i * image + at, y + i * image + at,
                            data_.data() + i * p_.out_positions() + at, count);
      }
    return data_.data();
  }

 private:
  Range read_by(int axis, Range gx) const {
    return sources_of(p_.window[axis], gx.begin, gx.end, p_.out[axis], true);
  }
  static Range joined(Range a, Range b) {
    if (a.begin == a.end) return b;
    if (b.begin == b.end) return a;
    return {least(a.begin, b.begin), most(a.end, b.end)};
  }

  const ConvProblem& p_;
  Scratch<T> data_;
};

template <class T>
class RowBackward {
 public:
  using Acc = accumulate_t<T>;

  // `p` has no activation, `activated` may have one.
  RowBackward(const ConvProblem& p, const ConvProblem& activated, const ConvGradients& t,
              const Acc* weights)
      : p_(p),
        g_(dgrad_gather(p)),
        t_(t),
        gather_(p, g_, weights, nullptr),
        wgrad_(p),
        undone_(activated, t.y != nullptr ? kMostImages : 0) {}

  void reset(const BackwardPart& part) {
    part_ = part;
    gathers_ = part.gx_slices.begin < part.gx_slices.end && part.gx_rows.begin < part.gx_rows.end;
    adds_ = part.gy_slices.begin < part.gy_slices.end && part.gy_rows.begin < part.gy_rows.end;
    if (gathers_) gather_.reset(part.gx_slices.begin, part.gx_rows.begin, part.gx_rows.end);
    if (adds_)
      wgrad_.reset(part.gy_slices.begin, part.gy_rows.begin, part.gy_rows.end - part.gy_rows.begin);
  }

  // Of one channel of images [first, last); `after` is the plane that follows. The sums of gw, and
  // then of gb, go to `sums`.
  void run(int64_t channel, int64_t first, int64_t last, int64_t after, Acc* sums) {
    wgrad_.clear();
    const int64_t held = adds_ ? least(wgrad_.held(), kMostImages) : 1;
    for (int64_t n = first; n < last; n += held) {
      const int64_t images = least(held, last - n), plane = n * p_.groups + channel;
      const int64_t next = n + images < last ? plane + images * p_.groups : after;
      step(channel, plane, images, next);
    }
    wgrad_.store(sums);
  }

 private:
  static constexpr int64_t kMostImages = 8;

  void step(int64_t channel, int64_t plane, int64_t images, int64_t next) {
    const int64_t in = p_.in_positions(), out = p_.out_positions();
    const T* const x = static_cast<const T*>(t_.x) + plane * in;
    const T* const grads = static_cast<const T*>(t_.gy);
    ImagePlanes<T> gy = {grads + plane * out, p_.groups * out, 0};
    if (t_.y != nullptr) {
      gy.data = undone_.undo(part_, gy.data, static_cast<const T*>(t_.y) + plane * out, images);
      gy.step = out;
    }
    if (gathers_)
      gather_.run(gy.data, gy.step, static_cast<T*>(t_.gx) + plane * in, p_.groups * in, images,
                  channel, grads + next * out);
    if (adds_) {
      wgrad_.add({x, p_.groups * in, (next - plane) * in}, gy, images);
      if (t_.gb != nullptr) wgrad_.add_bias(images);
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  const ConvGradients& t_;
  RowGather<T> gather_;
  RowWgrad<T> wgrad_;
  SumGradient<T> undone_;
  BackwardPart part_{};
  bool gathers_ = false, adds_ = false;
};

template <class T>
void backward_rows(const ConvProblem& activated, const ConvGradients& t, const Context& context) {
  using Acc = accumulate_t<T>;
  ConvProblem p = activated;
  p.activation = Activation::none;
  const int64_t sums = p.window_elements() + 1;  // of a task: gw, then gb
  const int64_t chunks = image_chunks(p.n, p.groups);
  const BackwardParts parts(p);
  const Widened<T> wide(static_cast<const T*>(t.w), p.weight_elements(), context);
  Scratch<Acc> partial(parts.count() * chunks * p.groups * sums);
  // Tasks of one part follow one another: they share taps, and padding that stays zero.
  parallel_for(context, parts.count() * chunks * p.groups, 1, [&](int64_t begin, int64_t end) {
    RowBackward<T> backward(p, activated, t, wide.data());
    int64_t part = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % p.groups, chunk = task / p.groups % chunks;
      if (task / p.groups / chunks != part) {
        part = task / p.groups / chunks;
        backward.reset(parts.part(part));
      }
      const int64_t first = p.n * chunk / chunks, last = p.n * (chunk + 1) / chunks;
      const int64_t next = task + 1 < end && channel + 1 < p.groups ? channel + 1 : channel;
      backward.run(channel, first, last, first * p.groups + next, partial.data() + task * sums);
    }
  });
  for (int64_t channel = 0; channel < p.groups; ++channel)
    for (int64_t i = 0; i < sums; ++i) {
      Acc total = 0;
      for (int64_t part = 0; part < parts.count(); ++part) {
        Acc sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sum += partial[((part * chunks + chunk) * p.groups + channel) * sums + i];
        total += sum;
      }
      if (i + 1 < sums)
        static_cast<T*>(t.gw)[channel * (sums - 1) + i] = narrow<T>(total);
      else if (t.gb != nullptr)
        static_cast<T*>(t.gb)[channel] = narrow<T>(total);
    }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
