// Weights of fprop and dgrad packed for the tile product of conv_product.h.
//
// A panel is what tiles read from end to end: a few vectors of destination channels, place after
// place in the order of the phases, term after term. Terms are source channels, words of two of
// them where the product is of pairs. Weights come in the layout of their tensor; squares of them
// are transposed in registers.
#pragma once

#include "conv/conv_pixel_walk.h"
#include "conv/conv_transpose.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kPanelVectors = 4;
#else
inline constexpr int kPanelVectors = 2;
#endif

// A panel of weights: of one group, some vectors of its destination channels.
template <class Acc>
struct WeightPanel {
  int64_t group;
  int64_t channel;  // the first of the destination's
  int64_t lanes;    // of them
  int vectors;
  const Acc* weights;  // [place, term, lane]
  const Acc* bias;     // whole vectors
};

// How weights [G·K, place, C] are packed: a panel is what tiles read from end to end.
struct PanelLayout {
  int64_t groups;
  int64_t vectors;      // of a group's destination channels
  int64_t panels;       // of a group, of nearly equal width
  int64_t place_terms;  // of one place of the packing, in words or numbers
  int64_t places;

  int64_t begin(int64_t panel) const { return vectors * panel / panels; }
  int64_t terms() const { return places * place_terms; }
};

// One vector of columns of contiguous weights [G·K, C, place], from `column` on: runs of neighbours
// are transposed by squares, whose rows go to their places and terms.
template <class T>
void pack_contiguous(const ConvProblem& p, const Gather& g, const T* weights, int64_t count,
                     const int64_t* packed_place, int64_t place_terms, int vectors,
                     accumulate_t<T>* out) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t places = p.window_elements();
  const int64_t filter = p.c * places;
  // fprop: a column's terms and places are neighbours; dgrad: a term's places.
  const int64_t terms = g.transposed ? 1 : p.c;
  const int64_t column_step = g.transposed ? places : filter;
  for (int64_t term = 0; term < g.src_channels; term += terms, weights += filter)
    for (int64_t first = 0; first < terms * places; first += kLane) {
      const int64_t length = least(kLane, terms * places - first);
      Vec<accumulate_t<T>> rows[kLane];
#pragma GCC unroll 16
      for (int j = 0; j < kLane; ++j)
        rows[j] = j < count ? load_lanes(weights + j * column_step + first, length)
                            : Vec<accumulate_t<T>>{};
      transpose(rows);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t place = packed_place[(first + i) % places];
        if (place < 0) continue;
        const int64_t at = place * place_terms + term + (first + i) / places;
        store_vec(out + at * vectors * kLane, rows[i]);
      }
    }
}

template <bool kPairs, class T>
void pack_panels(const ConvProblem& p, const Gather& g, const PanelLayout& layout,
                 const Place* places, bool folded, const T* weights, accumulate_t<T>* out,
                 const accumulate_t<T>* bias, WeightPanel<accumulate_t<T>>* panels,
                 const Context& context) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t window = p.window_elements(), columns = p.window[2].size;
  // In one run of terms every place begins with a word of its own.
  const int64_t channels = kPairs && folded ? round_up(p.c, 2) : p.c;
  const int64_t filter = window * channels;
  const bool is_last = p.channels_last || window == 1;
  const bool direct =
      !kPairs && !p.channels_last && !folded && (!g.transposed || window >= kLane / 2);
  // Contiguous weights that are not packed as they lie.
  Scratch<T> last(is_last || direct ? 0 : p.weight_elements());
  if (!is_last && !direct) {
    transpose(weights, p.out_channels(), p.c, window, last.data(), context);
    weights = last.data();
  }
  Scratch<T> even(channels == p.c ? 0 : p.out_channels() * filter);
  if (channels != p.c) {
    fill(even.data(), p.out_channels() * filter, T{});
    for (int64_t i = 0; i < p.out_channels() * window; ++i)
      for (int64_t c = 0; c < p.c; ++c) even[i * channels + c] = weights[i * p.c + c];
    weights = even.data();
  }
  const auto index_of = [&](const Place& place) {
    return (place.at[0] * p.window[1].size + place.at[1]) * columns + place.at[2];
  };
  Scratch<int64_t> packed_place(window);  // -1: no destination meets it
  fill(packed_place.data(), window, int64_t{-1});
  if (direct)
    for (int64_t i = 0; i < layout.places; ++i) packed_place[index_of(places[i])] = i;
  const int64_t term_step = g.transposed ? filter : 1;
  const int64_t terms = folded ? channels * columns : g.src_channels;
  parallel_for(context, layout.groups * layout.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / layout.panels;
      const int64_t first = layout.begin(i % layout.panels);
      const auto vectors = static_cast<int>(layout.begin(i % layout.panels + 1) - first);
      accumulate_t<T>* const to = out + (group * layout.vectors + first) * kLane * layout.terms();
      panels[i] = {group,
                   group * g.dst_channels + first * kLane,
                   least(vectors * kLane, g.dst_channels - first * kLane),
                   vectors,
                   to,
                   bias + (group * layout.vectors + first) * kLane};
      for (int v = 0; v < vectors; ++v) {
        const int64_t column = (first + v) * kLane;
        const int64_t count = g.dst_channels - column;
        const T* const of_group = weights + group * p.k * filter;
        if constexpr (!kPairs) {
          if (direct) {
            pack_contiguous(p, g, of_group + column * (g.transposed ? window : filter), count,
                            packed_place.data(), layout.place_terms, vectors, to + v * kLane);
            continue;
          }
        }
        const int64_t column_step = g.transposed ? 1 : filter;
        for (int64_t place = 0; place < layout.places; ++place) {
          const T* const from =
              of_group + index_of(places[place]) * channels + column * column_step;
          accumulate_t<T>* const rows = to + (place * layout.place_terms * vectors + v) * kLane;
          if constexpr (kPairs) {
            pack_pairs(from, term_step, column_step, count, terms, vectors, rows);
          } else {
            pack_vector(from, term_step, column_step, count, terms, vectors, rows);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
