// All gradients of depthwise convolution of contiguous tensors on CPU in one walk.
//
// A task is a band of rows of one channel of a chunk of images; neighbouring channels go along
// together, so that memory is met in its order. A task's part of the gradient is read
// once for gx (conv_rows.h), gw (conv_rows_wgrad.h) and gb, while it lies in the cache, and so is
// its part of the input. An activation is undone first, or the gradient made, in planes of scratch.
// Sums of tasks are added in a fixed order. Bound: bytes where windows are small; one by one, the
// three gradients read what they share from memory again.
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

// The gradient of the sums of some channels of some images, as far as a part reads it: gy as it
// lies, or [image, channel, position] of it with the activation undone, or of what makes it.
template <class T>
class SumGradient {
 public:
  SumGradient(const ConvProblem& p, const ConvGradients& t) : p_(p), t_(t) {}

  // Whether it is held here.
  bool held() const { return t_.y != nullptr || t_.made != nullptr; }

  // Of `channels` of each of `images`, of which the first is plane `first`.
  const T* of(const BackwardPart& part, int64_t first, int64_t images, int64_t channels) {
    const int64_t plane = p_.out_positions();
    if (!held()) return static_cast<const T*>(t_.gy) + first * plane;
    const Range slices = joined(part.gy_slices, read_by(0, part.gx_slices));
    const Range rows = joined(part.gy_rows, read_by(1, part.gx_rows));
    if (images * channels > planes_) data_.resize((planes_ = images * channels) * plane);
    for (int64_t image = 0; image < images; ++image, first += p_.groups) {
      T* const to = data_.data() + image * channels * plane;
      if (t_.made != nullptr)
        t_.made->make(*t_.made, first, channels, slices, rows, to);
      else
        undo(first, channels, slices, rows, to);
    }
    return data_.data();
  }

 private:
  void undo(int64_t first, int64_t channels, Range slices, Range rows, T* to) const {
    const int64_t plane = p_.out_positions();
    const T* const gy = static_cast<const T*>(t_.gy) + first * plane;
    const T* const y = static_cast<const T*>(t_.y) + first * plane;
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
        const int64_t at = channel * plane + (slice * p_.out[1] + rows.begin) * p_.out[2];
        activation_grad_row(p_, gy + at, y + at, to + at, (rows.end - rows.begin) * p_.out[2]);
      }
  }
  Range read_by(int axis, Range gx) const {
    if (gx.begin == gx.end) return {0, 0};
    return sources_of(p_.window[axis], gx.begin, gx.end, p_.out[axis], true);
  }
  static Range joined(Range a, Range b) {
    if (a.begin == a.end) return b;
    if (b.begin == b.end) return a;
    return {least(a.begin, b.begin), most(a.end, b.end)};
  }

  const ConvProblem& p_;
  const ConvGradients& t_;
  int64_t planes_ = 0;
  Scratch<T> data_;
};

template <class T>
class RowBackward {
 public:
  using Acc = accumulate_t<T>;
  using Parts = BackwardParts;

  // `p` has no activation, `activated` may have one.
  RowBackward(const ConvProblem& p, const ConvProblem& activated, const ConvGradients& t,
              const Acc* weights)
      : p_(p),
        g_(dgrad_gather(p)),
        t_(t),
        sums_(p.window_elements() + 1),
        gather_(p, g_, weights, nullptr),
        wgrad_(p),
        grads_(activated, t) {}

  void reset(const BackwardPart& part) {
    part_ = part;
    gathers_ = part.gx_slices.begin < part.gx_slices.end && part.gx_rows.begin < part.gx_rows.end;
    adds_ = part.gy_slices.begin < part.gy_slices.end && part.gy_rows.begin < part.gy_rows.end;
    if (gathers_) gather_.reset(part.gx_slices.begin, part.gx_rows.begin, part.gx_rows.end);
    if (adds_)
      wgrad_.reset(part.gy_slices.begin, part.gy_rows.begin, part.gy_rows.end - part.gy_rows.begin);
  }

  // Of `channels` of `images`, in the order of memory. The sums of gw, and then of gb, of each
  // channel go to `sums`.
  void run(Range channels, Range images, Acc* sums) {
    const int64_t totals = (channels.end - channels.begin) * sums_;
    if (totals > held_) totals_.resize((held_ = totals) * kLanes<T>);
    fill(totals_.data(), totals * kLanes<T>, Acc{0});
    const int64_t held = adds_ ? wgrad_.held() : 1;
    const int64_t planes = gathers_ ? gather_.held() : 1;
    for (int64_t n = images.begin; n < images.end; n += held)
      for (int64_t channel = channels.begin; channel < channels.end; channel += planes)
        step(n, least(held, images.end - n), {channel, least(channel + planes, channels.end)},
             channels, totals_.data() + (channel - channels.begin) * sums_ * kLanes<T>);
    fold_lanes<T>(totals_.data(), totals, sums);
  }

 private:
  // `channels` of `images` images from n on.
  void step(int64_t n, int64_t images, Range channels, Range all, Acc* totals) {
    const int64_t in = p_.in_positions(), out = p_.out_positions();
    const int64_t plane = n * p_.groups + channels.begin, count = channels.end - channels.begin;
    const T* const grads = grads_.of(part_, plane, images, count);
    const int64_t step = grads_.held() ? count : p_.groups;  // from image to image, in planes
    const int64_t ahead = grads_.held() ? count : all.end - channels.begin;
    if (gathers_)
      for (int64_t i = 0; i < images; ++i)
        gather_.run(grads + i * step * out, static_cast<T*>(t_.gx) + (plane + i * p_.groups) * in,
                    count, channels.begin, ahead);
    if (!adds_) return;
    const T* const x = static_cast<const T*>(t_.x) + plane * in;
    for (int64_t i = 0; i < count; ++i, totals += sums_ * kLanes<T>) {
      const int64_t next = channels.begin + i + 1 < all.end ? in : 0;
      const ImagePlanes<T> gy = {grads + i * out, step * out, 0};
      wgrad_.add({x + i * in, p_.groups * in, next}, gy, images, totals);
      if (t_.gb != nullptr) wgrad_.add_bias(gy, images, totals + (sums_ - 1) * kLanes<T>);
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  const ConvGradients& t_;
  int64_t sums_;  // of a channel
  RowGather<T> gather_;
  RowWgrad<T> wgrad_;
  SumGradient<T> grads_;
  BackwardPart part_{};
  bool gathers_ = false, adds_ = false;
  int64_t held_ = 0;
  Scratch<Acc> totals_;  // [channel, place, lane]
};

// How many channels go along together, so that planes are met in the order of memory: as many as
// have their totals in the cache.
inline int64_t channels_together(int64_t sums, int64_t lanes) {
  constexpr int64_t kElements = 32 * 1024;
  return most(1, kElements / (sums * lanes));
}

// `Walk`: RowBackward, or another one of its interface.
template <class T, class Walk>
void backward_walk(const ConvProblem& activated, const ConvGradients& t, const Context& context) {
  using Acc = accumulate_t<T>;
  ConvProblem p = activated;
  p.activation = Activation::none;
  const int64_t sums = p.window_elements() + 1;  // of a task: gw, then gb
  const int64_t chunks = image_chunks(p.n, p.groups);
  const int64_t together = channels_together(sums, kLanes<T>);
  const typename Walk::Parts parts(p);
  const Widened<T> wide(static_cast<const T*>(t.w), p.weight_elements(), context);
  Scratch<Acc> partial(parts.count() * chunks * p.groups * sums);
  // A task is a channel; those of one part follow one another, share taps, and padding that stays
  // zero.
  parallel_for(context, parts.count() * chunks * p.groups, 1, [&](int64_t begin, int64_t end) {
    Walk backward(p, activated, t, wide.data());
    int64_t part = -1;
    for (int64_t task = begin; task < end;) {
      const int64_t channel = task % p.groups, chunk = task / p.groups % chunks;
      if (task / p.groups / chunks != part) {
        part = task / p.groups / chunks;
        backward.reset(parts.part(part));
      }
      const int64_t count = least(together, least(p.groups - channel, end - task));
      backward.run({channel, channel + count}, {p.n * chunk / chunks, p.n * (chunk + 1) / chunks},
                   partial.data() + task * sums);
      task += count;
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
