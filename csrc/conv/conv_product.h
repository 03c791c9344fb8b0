// fprop and dgrad of channels-last tensors on CPU as a tile product: vectors along the channels.
//
// A task is a block of destination pixels, from any rows and images, × a slab of destination
// channels. For each place of the window a table holds where each pixel of the block reads the
// source; the batch-reduce product of gemm/packed_cpu.h then takes the pixels' channels as rows of
// A and weights, packed once per call, as panels of B (conv_block_product.h). Blocks of weights
// stay in the first-level cache while all pixels of the block go through them, the block's sums in
// the second-level one. A strided dgrad takes its pixels phase by phase, so that all of a block
// meet the same places. Few channels: the places of a block of terms are one call, and where the
// source is copied anyhow, its columns are padded, so that a row of the window is one run of terms.
// The finished block is written in either layout, a large channels-last one past the cache; windows
// of one place, which have few products for each byte, ask for source pixels ahead. Bound: FLOPs;
// bytes where windows are of one place and channels few. Groups narrower than a vector waste it.
//
// Operands are numbers of the accumulation type or, where the processor has products of bf16, words
// of two neighbouring channels (pairs_cpu.h). Tried and lost: tiles of one row of pixels that take
// all terms at once, which stream the weights once a row.
#pragma once

#include "conv/conv_block_product.h"
#include "conv/conv_panels.h"
#include "conv/conv_pixel_walk.h"
#include "conv/conv_transpose.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int64_t kSlabVectors = 16;  // of destination channels that a task takes

// Blocks of equal size, so that threads have equal work.
inline int64_t block_count(int64_t pixels) {
  constexpr int64_t kBlocks = 8, kLeastPixels = 24;
  const int64_t wanted = round_up(ceil_div(pixels, kBlockPixels), kBlocks);
  return most(1, least(wanted, pixels / kLeastPixels));
}

template <bool kPairs, class T>
void gather_blocks(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                   const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  using Stored = std::conditional_t<kPairs, T, Acc>;  // a source's elements
  constexpr int64_t kWord = kPairs ? 2 : 1;           // of them in an operand
  constexpr int64_t kLane = kLanes<T>;
  const bool planes = !p.channels_last;
  // Few channels: the copy's padded columns make a row of the window one run of terms.
  const bool folded = !g.transposed && p.groups == 1 && g.src_channels < 16 &&
                      p.window[2].dilation == 1 && p.window[2].size > 1;
  const int64_t channels = round_up(g.src_channels, kWord);
  const bool padded = folded || channels != g.src_channels;
  const bool copies = planes || padded || !std::is_same_v<T, Stored>;
  PixelSource<Acc> source{};
  source.pixel = p.groups * channels / kWord;
  source.lead = folded ? p.window[2].padding : 0;
  source.columns = folded ? most(source.lead + g.src[2], p.window[2].first_input(g.dst[2] - 1) +
                                                             source.lead + p.window[2].size)
                          : g.src[2];

  const int64_t places = p.window_elements() / (folded ? p.window[2].size : 1);
  Scratch<Place> place(places);
  int64_t phase_count = 1;
  if (g.transposed)
    for (int axis = 0; axis < 3; ++axis) phase_count *= least(p.window[axis].stride, g.dst[axis]);
  Scratch<PixelPhase> phases(phase_count);
  list_phases(p, g, folded, phases.data(), place.data());
  const PixelPhase* const last_phase = phases.data() + phase_count - 1;
  const int64_t met = last_phase->first_place + last_phase->places;  // places

  const int64_t vectors = ceil_div(g.dst_channels, kLane);
  const int64_t terms = channels / kWord * (folded ? p.window[2].size : 1);
  const PanelLayout layout{p.groups, vectors, ceil_div(vectors, kPanelVectors), terms, met};
  const int64_t panel_count = layout.groups * layout.panels;
  Scratch<Acc> packed(p.groups * vectors * kLane * layout.terms());
  Scratch<WeightPanel<Acc>> panels(panel_count);
  Scratch<Acc> wide_bias(p.groups * vectors * kLane);
  fill(wide_bias.data(), p.groups * vectors * kLane, Acc{0});
  if (bias != nullptr)
    for (int64_t i = 0; i < p.groups; ++i)
      for (int64_t k = 0; k < g.dst_channels; ++k)
        wide_bias[i * vectors * kLane + k] = widen(bias[i * g.dst_channels + k]);
  pack_panels<kPairs>(p, g, layout, place.data(), folded, weights, packed.data(), wide_bias.data(),
                      panels.data(), context);
  const int64_t zero_count = source.pixel * (folded ? p.window[2].size : 1);
  Scratch<Acc> zeros(zero_count);
  fill(zeros.data(), zero_count, Acc{0});

  const int64_t slab = most(1, kSlabVectors / ceil_div(vectors, layout.panels));
  const int64_t slabs = ceil_div(panel_count, slab);
  const int64_t sum_row = least(slab, panel_count) * ceil_div(vectors, layout.panels) * kLane;
  const int64_t src_image = p.groups * g.src_channels * g.src_positions();
  const int64_t dst_pixel = p.groups * g.dst_channels;
  const int64_t dst_image = dst_pixel * g.dst_positions();
  const int64_t images = copies ? images_at_a_time(p.n, src_image) : p.n;
  Scratch<Acc> copy(copies ? images * source.image(g) : 0);
  Scratch<T> last(copies && planes && !padded && !std::is_same_v<T, Stored> ? images * src_image
                                                                            : 0);
  // Windows of one place read each pixel once, as it lies.
  const bool asks =
      !copies && p.window_elements() == 1 && p.window[1].stride == 1 && p.window[2].stride == 1;
  const bool streams = std::is_same_v<T, Acc> && !planes && g.dst_channels % kLane == 0 &&
                       reinterpret_cast<uintptr_t>(dst) % kVectorBytes == 0 &&
                       (p.activation == Activation::none || p.activation == Activation::relu) &&
                       conv_streams(p.n * dst_image * size_of(p.dtype));
  for (int64_t n = 0; n < p.n; n += images) {
    const int64_t loaded = least(images, p.n - n);
    const T* const from = src + n * src_image;
    auto* const stored = reinterpret_cast<Stored*>(copy.data());
    source.data = copies ? copy.data() : reinterpret_cast<const Acc*>(from);
    if (padded) {
      copy_padded(p, g, from, loaded, source.lead, source.columns, channels, stored, context);
    } else if (copies) {
      const int64_t src_channels = p.groups * g.src_channels;
      if constexpr (std::is_same_v<T, Stored>) {
        transpose(from, loaded, src_channels, g.src_positions(), stored, context);
      } else {
        if (planes) transpose(from, loaded, src_channels, g.src_positions(), last.data(), context);
        copy_rows(stored, planes ? last.data() : from, loaded * src_image, context);
      }
    }
    for (int64_t i = 0; i < phase_count; ++i) {
      const PixelPhase& phase = phases[i];
      const int64_t all = loaded * phase.image();
      const int64_t step = phase_count == 1 ? 1 : phase.axis[2].step;
      // Several tasks, whatever the number of threads.
      const int64_t blocks = block_count(all);
      parallel_for(context, blocks * slabs, 1, [&](int64_t begin, int64_t end) {
        const int64_t size = ceil_div(all, blocks);
        Scratch<PixelRun> runs(size);
        Scratch<PixelSegment> segments(size);
        Scratch<T*> to(planes ? 0 : size);
        Scratch<Acc> sums(size * sum_row);
        BlockProduct<kPairs, T> product(p, terms, channels / kWord, zeros.data());
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = all * (task / slabs) / blocks;
          const int64_t last_pixel = all * (task / slabs + 1) / blocks;
          const int64_t first_panel = task % slabs * slab;
          const int64_t last_panel = least(first_panel + slab, panel_count);
          const int64_t run_count = list_runs(phase, first, last_pixel, runs.data());
          const auto find = [&](int64_t at, const Acc** out) {
            return find_pixels(p, g, source, zeros.data(), runs.data(), run_count,
                               place[phase.first_place + at], out);
          };
          if (!planes)
            list_pixels(g, runs.data(), run_count, step, dst + n * dst_image, dst_pixel, to.data());
          const PixelBlock<T> block = {last_pixel - first,
                                       panels.data() + first_panel,
                                       last_panel - first_panel,
                                       sums.data(),
                                       sum_row,
                                       planes ? nullptr : to.data(),
                                       streams,
                                       asks ? source.pixel * static_cast<int64_t>(sizeof(Acc)) : 0};
          if (product.run(find, phase, block)) continue;
          const int64_t segment_count =
              list_segments(g, runs.data(), run_count, phase_count == 1, segments.data());
          const Acc* column = sums.data();
          for (int64_t at = first_panel; at < last_panel; ++at) {
            const WeightPanel<Acc>& panel = panels[at];
            const int64_t width = panel.vectors * kLane;
            for (int64_t s = 0; s < segment_count; ++s) {
              const PixelSegment& segment = segments[s];
              T* const image = dst + (n + segment.n) * dst_image;
              const Acc* const from_sums = column + segment.first * sum_row;
              if (planes)
                store_planes<kPairs>(p, segment, step, from_sums, sum_row, panel.bias,
                                     image + panel.channel * g.dst_positions() + segment.at,
                                     g.dst_positions(), panel.lanes);
              else
                store_pixels<kPairs>(p, segment, step, from_sums, sum_row, panel.bias,
                                     image + segment.at * dst_pixel + panel.channel, dst_pixel,
                                     panel.lanes);
            }
            column += width;
          }
        }
        if (streams) stream_fence();
      });
    }
  }
}

template <class T>
void gather_product(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                    const T* bias, T* dst, const Context& context) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_pairs()) return gather_blocks<true>(p, g, src, weights, bias, dst, context);
  }
#endif
  gather_blocks<false>(p, g, src, weights, bias, dst, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
