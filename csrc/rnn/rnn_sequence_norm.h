// Layer normalisation inside a kernel of a whole sequence: a row's sums are spread over the blocks
// of its set, so each block makes the moments of its own part, the blocks meet, and each puts all
// parts together, always in the same order (Chan et al. 1979: means and squares around them, which
// lose nothing to cancellation). For .cu files alone.
#pragma once

#include "rnn/rnn_sequence.h"

namespace weft::WEFT_TARGET {
namespace {

// To all lanes, the same bits.
template <class Acc>
WEFT_DEVICE Acc warp_sum(Acc x) {
  for (int mask = 16; mask > 0; mask /= 2) x += device::shuffle_xor(x, mask);
  return x;
}

// Of numbers that a warp holds together.
template <class Acc>
struct PartMoments {
  Acc mean, squares;  // squares: of the distances from the mean, added up
};
template <class Acc, class Number>
WEFT_DEVICE PartMoments<Acc> part_moments(int count, const Number& number) {
  Acc sum = 0, squares = 0;
  for (int i = device::lane(); i < count; i += 32) sum += number(i);
  const Acc mean = warp_sum(sum) / static_cast<Acc>(count);
  for (int i = device::lane(); i < count; i += 32) {
    const Acc distance = number(i) - mean;
    squares += distance * distance;
  }
  return {mean, warp_sum(squares)};
}

template <class Acc>
struct RowMoments {
  Acc mean, scale;  // scale: 1 / sqrt(variance + eps)
};
// From the parts of all blocks, part(b) of block b, by a warp.
template <class Acc, class Part>
WEFT_DEVICE RowMoments<Acc> row_moments(const LayerProblem& p, const SequencePlan& plan,
                                        const Part& part) {
  const auto blocks = static_cast<int>(plan.unit_blocks);
  const auto size = [&](int b) {
    return static_cast<Acc>(share_of(p.hidden, b * plan.units, plan.units));
  };
  const auto all = static_cast<Acc>(p.hidden);
  Acc sum = 0, squares = 0;
  for (int b = device::lane(); b < blocks; b += 32) sum += size(b) * part(b).mean;
  const Acc mean = warp_sum(sum) / all;
  for (int b = device::lane(); b < blocks; b += 32) {
    const PartMoments<Acc> of_block = part(b);
    const Acc distance = of_block.mean - mean;
    squares += of_block.squares + size(b) * distance * distance;
  }
  return {mean, inverse_root(warp_sum(squares) / all + static_cast<Acc>(kNormEpsilon))};
}

}  // namespace
}  // namespace weft::WEFT_TARGET
