// Weight gradients of contiguous tensors by windows of one place on CPU, and all gradients in one
// walk.
//
// gw[k, c] = Σ_position gy[k, position] · x[c, position]: the positions of a panel (conv_flat.h)
// are the terms, rows of gy the rows of A as they lie, and x, turned round, is B: the narrower side
// of most layers. A task walks down some panels of a group's images; what it read of gy, with the
// activation undone, is then also the panel of gx's product and what gb is summed of, so that gy
// goes through memory once. Where the sums of several such tasks would be more than they are made
// of, gradients come one by one, and tasks are blocks of gw's rows as well. Sums of panels, of runs
// of panels, of tasks: short chains of additions in a fixed order. Bound: FLOPs.
#pragma once

#include "conv/conv_flat.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int64_t kPanelsJoined = 32;

// How the work on gw is cut, whatever the number of threads.
struct FlatWgradCut {
  int64_t chunks;  // of all images' panels
  int64_t blocks;  // of a group's rows

  FlatWgradCut(const ConvProblem& p, int64_t panels, bool whole) {
    constexpr int64_t kTasks = 16, kLeastRows = 48, kLeastPanels = 4, kMapsPerSums = 4;
    const int64_t wanted = ceil_div(kTasks, p.groups);
    // Each block turns x round, each chunk has sums of its own.
    const int64_t sums = kMapsPerSums * p.weight_elements();
    const int64_t affordable = whole ? wanted : (p.in_elements() + p.out_elements()) / sums;
    chunks = most(1, least(least(wanted, affordable), p.n * panels / kLeastPanels));
    blocks = whole ? 1 : most(1, least(ceil_div(wanted, chunks), p.k / kLeastRows));
  }
};

template <class T>
class FlatBackward {
 public:
  using Acc = accumulate_t<T>;

  // `p` has no activation, `activated` may have one; `weights`: null without gx.
  FlatBackward(const ConvProblem& p, const ConvProblem& activated, const ConvGradients& t,
               const FlatWeights<T>* weights, int64_t rows)
      : p_(p),
        activated_(activated),
        t_(t),
        weights_(weights),
        panels_(p.out_positions(), kLanes<T>),
        product_(dgrad_gather(p), p.c),
        lanes_(round_up(p.c, kLanes<T>)),
        gy_(rows * kWidest),
        x_(kWidest * kWidest),
        sums_(rows * sum_row()),
        at_(rows),
        ways_(rows) {
    fill(sums_.data(), rows * sum_row(), Acc{0});
  }

  // Of a row of gw: its sums, then lanes of the sum of gb.
  int64_t sum_row() const { return lanes_ + kLanes<T>; }

  // total [row, sum_row()] = the sums of rows [rows.begin, rows.end) of a group over panels [begin,
  // end) of all images.
  void run(int64_t group, Range rows, int64_t begin, int64_t end, Acc* total) {
    const int64_t count = (rows.end - rows.begin) * sum_row();
    fill(total, count, Acc{0});
    for (int64_t from = begin; from < end; from += kPanelsJoined) {
      for (int64_t at = from; at < least(from + kPanelsJoined, end); ++at)
        panel((at / panels_.count * p_.groups + group), group, at % panels_.count, rows, at > from);
      for (int64_t i = 0; i < count; i += kLanes<T>)
        store_vec(total + i, load_vec(total + i) + load_vec(sums_.data() + i));
    }
  }

 private:
  static constexpr int64_t kWidest = FlatPanels::widest(kLanes<T>);

  // Panel `at` of an image's group, counted over all images.
  void panel(int64_t of_all, int64_t group, int64_t at, Range rows, bool add) {
    const int64_t first = panels_.begin(at), width = panels_.width(at), plane = panels_.positions;
    const int vectors = panels_.vectors_of(at);
    const int64_t gy = (of_all * p_.k + rows.begin) * plane + first;
    const int64_t x = of_all * p_.c * plane + first;
    load_gradient(gy, rows.end - rows.begin, width, vectors, add);
    if (weights_ != nullptr)
      product_.run(gy_.data(), vectors, weights_->rows(group * p_.c), p_.c,
                   {p_, nullptr, nullptr, static_cast<T*>(t_.gx) + x, plane, width, false});
    const T* const from = static_cast<const T*>(t_.x) + x;
    const int64_t all = lanes_ / kLanes<T>, parts = ceil_div(all, kFlatVectors);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t vector = all * part / parts;
      const auto taken = static_cast<int>(all * (part + 1) / parts - vector);
      for (int v = 0; v < taken; ++v) {
        const int64_t channel = (vector + v) * kLanes<T>;
        for (int64_t c = channel; c < least(channel + kLanes<T>, p_.c); ++c)
          for (int64_t i = 0; i < width; i += 64 / sizeof(T))  // of the next panel
            __builtin_prefetch(from + c * plane + width + i);
        pack_vector(from + channel * plane, 1, plane, p_.c - channel, width, taken,
                    x_.data() + v * kLanes<T>);
      }
      for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
        at_[r] = gy_.data() + r * vectors * kLanes<T>;
        ways_[r] = sums_.data() + r * sum_row() + vector * kLanes<T>;
      }
      const Acc* const turned = x_.data();
      flat_batch(taken, PackedBatch<Acc>{at_.data(), 0, &turned, 1, 0, width},
                 rows.end - rows.begin, JoinSums<Acc>{add, ways_.data()});
    }
  }

  // Rows of gy from element `from` on, with the activation undone, and their part of gb.
  void load_gradient(int64_t from, int64_t rows, int64_t width, int vectors, bool add) {
    const auto* const gy = static_cast<const T*>(t_.gy) + from;
    const int64_t plane = panels_.positions, row = vectors * kLanes<T>;
    if (t_.y == nullptr) {
      load_flat(gy, plane, rows, width, vectors, gy_.data());
    } else {
      const auto* const y = static_cast<const T*>(t_.y) + from;
      T undone[kWidest];
      for (int64_t r = 0; r < rows; ++r) {
        const T *const of_gy = gy + r * plane, *const of_y = y + r * plane;
        for (int64_t i = row; i < 2 * row; i += 64 / sizeof(T)) {  // of the next panel
          __builtin_prefetch(of_gy + i);
          __builtin_prefetch(of_y + i);
        }
        activation_grad_row(activated_, of_gy, of_y, undone, width);
        for (int64_t i = 0; i < row; i += kLanes<T>)
          store_vec(gy_.data() + r * row + i, load_lanes(undone + i, width - i));
      }
    }
    if (t_.gb == nullptr) return;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<Acc> sum = load_vec(gy_.data() + r * row);
      for (int64_t i = kLanes<T>; i < row; i += kLanes<T>)
        sum += load_vec(gy_.data() + r * row + i);
      Acc* const to = sums_.data() + r * sum_row() + lanes_;
      store_vec(to, add ? load_vec(to) + sum : sum);
    }
  }

  const ConvProblem& p_;
  const ConvProblem& activated_;
  const ConvGradients& t_;
  const FlatWeights<T>* weights_;
  FlatPanels panels_;
  FlatProduct<T> product_;
  int64_t lanes_;
  Scratch<Acc> gy_;  // [row, lane]
  Scratch<Acc> x_;   // [position, lane]
  Scratch<Acc> sums_;
  Scratch<const Acc*> at_;
  Scratch<Acc*> ways_;
};

// gw, and gx and gb where they are asked for.
template <class T>
void backward_flat(const ConvProblem& activated, const ConvGradients& t, const Context& context) {
  using Acc = accumulate_t<T>;
  ConvProblem p = activated;
  p.activation = Activation::none;
  const bool whole = t.gx != nullptr;
  const int64_t panels = FlatPanels(p.out_positions(), kLanes<T>).count;
  const FlatWgradCut cut(p, panels, whole);
  const auto walk = [&](const FlatWeights<T>* weights) {
    const int64_t block = ceil_div(p.k, cut.blocks), row = round_up(p.c, kLanes<T>) + kLanes<T>;
    const int64_t of_group = p.k * row, count = p.groups * of_group;
    Scratch<Acc> partial(cut.chunks * count);
    parallel_for(context, cut.chunks * p.groups * cut.blocks, 1, [&](int64_t begin, int64_t end) {
      FlatBackward<T> backward(p, activated, t, weights, block);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % cut.blocks, group = task / cut.blocks % p.groups;
        const int64_t chunk = task / cut.blocks / p.groups, all = p.n * panels;
        const Range rows = {p.k * at / cut.blocks, p.k * (at + 1) / cut.blocks};
        backward.run(group, rows, all * chunk / cut.chunks, all * (chunk + 1) / cut.chunks,
                     partial.data() + chunk * count + group * of_group + rows.begin * row);
      }
    });
    parallel_for(context, p.out_channels(), ceil_div(4096, p.c), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t c = 0; c < row; c += kLanes<T>) {
          const Acc* const from = partial.data() + k * row + c;
          Vec<Acc> sum = load_vec(from);
          for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
            sum += load_vec(from + chunk * count);
          if (c < p.c)
            store_lanes(static_cast<T*>(t.gw) + k * p.c + c, sum, p.c - c);
          else if (t.gb != nullptr)
            static_cast<T*>(t.gb)[k] = narrow<T>(sum_of_lanes<Acc>(sum));
        }
    });
  };
  if (!whole) return walk(nullptr);
  const FlatWeights<T> weights(p, dgrad_gather(p), static_cast<const T*>(t.w), context);
  walk(&weights);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
