// A block's tile of a gathering convolution on Hopper's words: 128 positions x 64 to 256 channels.
//
// One thread of the last warp copies: at each step the 64 channels that 128 windows see at one
// place, which the copy unit gathers itself, padding and the borders between rows and images
// included, and the weights that belong to them, into a ring of four stages. Two warpgroups
// multiply, 64 positions each, sums in registers; the stage of the step before is given back as
// soon as its products are done, so copies, products of this step and of the next overlap. Sums run
// over places, then channels, in the order of the walk. The epilogue adds the bias, rounds and
// applies the activation, as conv_mma.cu does; four lanes exchange their pairs of columns, so that
// each stores 16 bytes.
#pragma once

#include "conv/conv_wgmma.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::Major;
using device::Pack;

struct Epilogue {
  Activation activation = Activation::none;  // none, relu or leaky_relu
  float slope = 0;
};

// One thread. The tile's first window, then every place with all its channels.
template <class Ring, Major kWeights, int kColumns>
WEFT_DEVICE void produce(const Ring& ring, const TensorMap& map, const TensorMap& weights,
                         const Walk& walk, int64_t first_row, int first_column) {
  device::WindowAt at = window_at(walk, first_row);
  const int places = walk.all_places();
  int step = 0;
  for (int place = 0; place < places; ++place) {
    const int weight_place = set_place(walk, place, at);
    for (int i = 0; i < walk.channel_steps; ++i, ++step) {
      const int stage = step % kStages;
      ring.empty[stage].wait(1 - step / kStages % 2);
      ring.full[stage].arrive_expect(Ring::kStageBytes);
      at.channel = i * kDepth;
      copy_windows(walk.rank, ring.a(stage), map, ring.full[stage], at);
      if constexpr (kWeights == Major::reduction) {
        device::tma_load(ring.b(stage), weights, ring.full[stage], at.channel, weight_place,
                         first_column);
      } else {
        for (int piece = 0; piece < kColumns; piece += 64)
          device::tma_load(ring.b(stage) + piece * kDepth, weights, ring.full[stage],
                           first_column + piece, weight_place, at.channel);
      }
    }
  }
}

template <class T, class Ring, Major kWeights, int kColumns>
WEFT_DEVICE void consume(const Ring& ring, int steps, device::WgmmaSums<kColumns>& sums) {
  const int group = device::thread_index() / device::kWarpgroup;
  sums.clear();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ring.full[stage].wait(step / kStages % 2);
    const T* a = ring.a(stage) + group * kGroupRows * kDepth;
    const T* b = ring.b(stage);
    device::wgmma_fence(sums);
    WEFT_UNROLL
    for (int k = 0; k < kDepth; k += 16)
      device::wgmma<T, kWeights>(sums, a + k, b + (kWeights == Major::reduction ? k : k * 64));
    device::wgmma_commit();
    device::wgmma_wait<1>(sums);
    if (step > 0 && device::lane() == 0) ring.empty[(step - 1) % kStages].arrive();
  }
  device::wgmma_wait<0>(sums);
}

template <class T>
WEFT_DEVICE uint32_t finished(const Epilogue& epilogue, float sum, float bias) {
  const T rounded = narrow<T>(sum + bias);
  if (epilogue.activation == Activation::none) return rounded.bits;
  const float x = widen(rounded);
  if (epilogue.activation == Activation::relu)  // NaN stays NaN
    return x <= 0 ? 0 : rounded.bits;
  return x > 0 ? rounded.bits : narrow<T>(x * epilogue.slope).bits;
}

// Word q of lane t of four goes to word t of lane q.
WEFT_DEVICE void transpose_words(Pack<uint32_t, 4>& words) {
  const int t = device::lane() % 4;
  WEFT_UNROLL
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool upper = (t & mask) != 0;
    WEFT_UNROLL
    for (int q = 0; q < 4; ++q) {
      if ((q & mask) != 0) continue;
      const uint32_t given = upper ? words[q] : words[q | mask];
      const uint32_t taken = device::shuffle_xor(given, mask);
      words[q] = upper ? taken : words[q];
      words[q | mask] = upper ? words[q | mask] : taken;
    }
  }
}

// position(row): where a row of the product lies among the positions of the output.
template <class T, int kColumns, class Position>
WEFT_DEVICE void store_sums(const device::WgmmaSums<kColumns>& sums, const Walk& walk,
                            const Epilogue& epilogue, int64_t first_row, int first_column,
                            const T* bias, T* out, const Position& position) {
  using Sums = device::WgmmaSums<kColumns>;
  const int t = device::lane() % 4;
  T* to[2];  // this thread's rows; null past the last
  WEFT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + Sums::row(2 * half);
    to[half] = row < walk.total_rows ? out + position(row) * walk.columns : nullptr;
  }
  WEFT_UNROLL
  for (int j = 0; j < kColumns; j += 32) {
    Pack<uint32_t, 4> words[2];  // of this thread's rows
    WEFT_UNROLL
    for (int q = 0; q < 4; ++q) {
      const int i = (j / 8 + q) * 4;
      const int column = first_column + Sums::column(i);
      float added[2] = {0, 0};
      if (bias != nullptr && column < walk.columns) {
        added[0] = widen(load(bias + column));
        added[1] = widen(load(bias + column + 1));
      }
      WEFT_UNROLL
      for (int half = 0; half < 2; ++half)
        words[half][q] = finished<T>(epilogue, sums.value[i + 2 * half], added[0]) |
                         finished<T>(epilogue, sums.value[i + 2 * half + 1], added[1]) << 16;
    }
    const int column = first_column + j + 8 * t;
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      transpose_words(words[half]);
      if (to[half] == nullptr || column >= walk.columns) continue;
      device::store(reinterpret_cast<uint32_t*>(to[half] + column), words[half]);
    }
  }
}

// Tile `block` of a walk. kWeights: what lies together in the weights.
template <class T, Major kWeights, int kColumns, class Position>
WEFT_DEVICE void make_tile(unsigned block, const TensorMap& map, const TensorMap& weights,
                           const Walk& walk, const Epilogue& epilogue, const T* bias, T* out,
                           const Position& position) {
  using Stages = Ring<T, kColumns>;
  const Stages ring;
  const auto tiles_n = static_cast<unsigned>(walk.tiles_n);
  const int first_column = static_cast<int>(block % tiles_n) * kColumns;
  const int64_t first_row = int64_t{block / tiles_n} * kRows;
  if (device::thread_index() >= 32 * kConsumerWarps) {
    if (device::lane() == 0)
      produce<Stages, kWeights, kColumns>(ring, map, weights, walk, first_row, first_column);
    return;
  }
  device::WgmmaSums<kColumns> sums;
  consume<T, Stages, kWeights>(ring, walk.steps(), sums);
  const int group = device::thread_index() / device::kWarpgroup;
  store_sums(sums, walk, epilogue, first_row + group * kGroupRows, first_column, bias, out,
             position);
}

// ---- on the host -----------------------------------------------------------------------------

// The weights as [k, place, c], copied in boxes of 64 channels of a place and `rows` of k.
inline TensorMap weights_of(const ConvProblem& p, int rows, const void* w) {
  const int64_t places = p.window_elements();
  const device::TensorView view{w, p.dtype, 3, {p.c, places, p.k}, {1, p.c, p.c * places}};
  return device::tensor_map(view, device::TileBox{{64, 1, rows}});
}

// For the device at hand, where the context asks for Hopper's words; else it does not fit.
inline ConvWgmmaPlan plan_here(const ConvProblem& p, ConvProduct step, bool aligned,
                               const Context& context) {
  const int multiprocessors = context.sm90a ? device::sm90a_multiprocessors() : 0;
  if (multiprocessors == 0) return {};
  return plan_conv_wgmma(p, step, aligned, {multiprocessors});
}

}  // namespace
}  // namespace weft::WEFT_TARGET
