// The sums of a block of pixels in conv_product.h: a batch of places, a block of terms and a panel
// of weights at a time.
//
// A batch leaves out the pixels that have only padding at its places: on small maps that is a good
// part of the work (a sixth of 3 x 3 windows on 7 x 7). The last batch of a channels-last
// destination is finished in registers where it has all pixels; else the sums, which wait in
// scratch, are finished by the caller.
#pragma once

#include "conv/conv_panels.h"
#include "conv/conv_pixel_walk.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
struct PixelBlock {
  using Acc = accumulate_t<T>;

  int64_t pixels;
  const WeightPanel<Acc>* panels;
  int64_t panel_count;
  Acc* sums;  // [pixel, lane of a panel]
  int64_t sum_row;
  T* const* to;  // where each pixel's channels go; null: the destination is contiguous
  bool streams;  // they go past the cache
  int64_t ask;   // bytes of a source pixel that are asked for ahead; 0: none
};

// Sums, of which `sums` holds a part unless it is null, as channels of pixels that lie anywhere.
template <bool kPairs, class T>
struct FinishPixels {
  using Acc = accumulate_t<T>;

  const ConvProblem& p;
  const WeightPanel<Acc>& panel;
  const Acc* const* sums;
  T* const* to;
  bool streams;  // past the cache: whole vectors, without an activation or with relu

  void skip(int64_t rows) {
    to += rows;
    if (sums != nullptr) sums += rows;
  }

  template <int Rows, int Vectors>
  WEFT_INLINE void finish(const Vec<Acc> (&sum)[Rows][Vectors]) const {
    constexpr int kLane = kLanes<T>;
    const int64_t lanes = panel.lanes, channel = panel.channel;
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      T* const out = to[r] + channel;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Vec<Acc> value = sum[r][v];
        if (sums != nullptr) value += load_vec(sums[r] + v * kLane);
        value += load_vec(panel.bias + v * kLane);
        if constexpr (std::is_same_v<T, Acc>) {
          if (streams) {
            if (p.activation == Activation::relu) value = value <= 0 ? Vec<Acc>{} : value;
            stream_copy(out + v * kLane, &value, kVectorBytes);
            continue;
          }
        }
        store_sums<kPairs>(out + v * kLane, value, lanes - v * kLane);
      }
    }
    if (streams || p.activation == Activation::none) return;
    for (int r = 0; r < Rows; ++r) activate_row(p, to[r] + channel, lanes);
  }
};

// A target that asks, row by row, for `bytes` of what lies `ahead` of each row of A.
template <class Acc, class Target>
struct Asking {
  Target target;
  const Acc* const* rows;
  int64_t ahead;
  int64_t bytes;

  void skip(int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const auto from = reinterpret_cast<uintptr_t>(rows[r]) + ahead;
      for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(from + at), 0, 2);
    }
    rows += count;
    target.skip(count);
  }
  template <int Rows, int Vectors>
  WEFT_INLINE void finish(const Vec<Acc> (&sum)[Rows][Vectors]) const {
    target.finish(sum);
  }
};

template <bool kPairs, int kVectors = kPanelVectors, class Acc, class Target>
void panel_product(int vectors, const PackedBatch<Acc>& batch, int64_t rows, const Target& to) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return panel_product<kPairs, kVectors - 1>(vectors, batch, rows, to);
  }
  packed_batch<kVectors, kPairs>(batch, rows, to);
}

template <bool kPairs, class T>
class BlockProduct {
 public:
  using Acc = accumulate_t<T>;

  // `terms` of each place, which lie together; a group's are `group_step` behind the one before.
  BlockProduct(const ConvProblem& p, int64_t terms, int64_t group_step, const Acc* zeros)
      : p_(p),
        terms_(terms),
        group_step_(group_step),
        most_places_(least(kBatch, most(1, kSumTerms / most(terms, 1)))),
        zeros_(zeros),
        table_(kBatch * kBlockPixels),
        ways_(kBlockPixels),
        offsets_(kBlockPixels) {}

  // find(place, out) tells where the block's pixels read the source, and how many do. True if the
  // block was finished.
  template <class FindPixels>
  bool run(const FindPixels& find, const PixelPhase& phase, const PixelBlock<T>& block) {
    const int64_t parts = most(1, ceil_div(terms_, kPartTerms));
    bool add = false, finished = false;
    int64_t place = 0;
    while (place < phase.places) {
      int64_t found = 0, reads = 0;
      int64_t index[kBatch];
      // Which places are summed together does not depend on the block's pixels: the bits of a pixel
      // are the same in any part of a map.
      for (const int64_t end = least(place + most_places_, phase.places); place < end; ++place) {
        const int64_t count = find(place, table_.data() + found * kBlockPixels);
        reads += count;
        if (count > 0) index[found++] = phase.first_place + place;
      }
      if (found == 0) continue;
      const int64_t pixels = keep_readers(block, found, reads);
      const bool all = pixels == block.pixels;
      if (!all && !add) {
        fill(block.sums, block.pixels * block.sum_row, Acc{0});
        add = true;
      }
      for (int64_t part = 0; part < parts; ++part) {
        finished = block.to != nullptr && all && place == phase.places && part + 1 == parts;
        part_of_sums(block, index, found, pixels, terms_ * part / parts,
                     terms_ * (part + 1) / parts, add, finished);
        add = true;
      }
    }
    if (!add) fill(block.sums, block.pixels * block.sum_row, Acc{0});
    return finished;
  }

 private:
  static constexpr int64_t kBatch = 16;
  static constexpr int64_t kAskPixels = 48;  // ahead
  // Terms that are added up before they join a block's sums: few places' terms together, and parts
  // of many, since a longer sum leaves more error. That of half types their own rounding hides.
  static constexpr int64_t kSumTerms = 64;
  static constexpr int64_t kPartTerms = sizeof(T) < sizeof(Acc) ? 512 : kSumTerms;

  // Leaves the pixels that read the source at one of `found` places in the table; returns how many.
  int64_t keep_readers(const PixelBlock<T>& block, int64_t found, int64_t reads) {
    const bool all = reads == found * block.pixels;
    int64_t kept = 0;
    for (int64_t r = 0; r < block.pixels; ++r) {
      bool some = all;
      for (int64_t b = 0; b < found && !some; ++b) some = table_[b * kBlockPixels + r] != zeros_;
      if (!some) continue;
      if (kept < r)
        for (int64_t b = 0; b < found; ++b)
          table_[b * kBlockPixels + kept] = table_[b * kBlockPixels + r];
      offsets_[kept++] = r * block.sum_row;
    }
    return kept;
  }

  // Terms [first, last) of each place in the table.
  void part_of_sums(const PixelBlock<T>& block, const int64_t* index, int64_t found, int64_t pixels,
                    int64_t first, int64_t last, bool add, bool finish) {
    Acc* column = block.sums;
    for (int64_t i = 0; i < block.panel_count; ++i) {
      const WeightPanel<Acc>& panel = block.panels[i];
      const int64_t width = panel.vectors * kLanes<Acc>;
      const Acc* weights[kBatch];
      for (int64_t b = 0; b < found; ++b)
        weights[b] = panel.weights + (index[b] * terms_ + first) * width;
      const PackedBatch<Acc> batch{
          table_.data(), kBlockPixels, weights, found, panel.group * group_step_ + first,
          last - first};
      if (add || !finish)
        for (int64_t r = 0; r < pixels; ++r) ways_[r] = column + offsets_[r];
      const auto run = [&](const auto& target) {
        // Where pixels lie one after another, and each is read for the first time.
        const int64_t bytes = i == 0 && first == 0 ? block.ask : 0;
        panel_product<kPairs>(panel.vectors, batch, pixels,
                              Asking<Acc, std::decay_t<decltype(target)>>{
                                  target, table_.data(), kAskPixels * block.ask, bytes});
      };
      if (finish)
        run(FinishPixels<kPairs, T>{p_, panel, add ? ways_.data() : nullptr, block.to,
                                    block.streams});
      else
        run(JoinSums<Acc>{add, ways_.data()});
      column += width;
    }
  }

  const ConvProblem& p_;
  int64_t terms_, group_step_, most_places_;
  const Acc* zeros_;
  Scratch<const Acc*> table_;  // [place, pixel]
  Scratch<Acc*> ways_;
  Scratch<int64_t> offsets_;  // of each pixel's sums
};

}  // namespace
}  // namespace weft::WEFT_TARGET
