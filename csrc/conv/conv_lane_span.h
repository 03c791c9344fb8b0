// Rows that are read where they lie, their ends by masks: what conv_pairs.h and conv_short_rows.h
// share, with AVX-512 alone.
#pragma once

#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

// Lanes [begin, end) of a vector, where no memory is touched but theirs; what is read has zeros in
// the others.
class LaneSpan {
 public:
  LaneSpan(int64_t begin, int64_t end, int lanes)
      : bits_(below(end, lanes) & ~below(begin, lanes)) {}

  template <class T>
  WEFT_INLINE Vec<accumulate_t<T>> load(const T* address) const {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_maskz_loadu_ps(bits_, address);
    } else if constexpr (std::is_same_v<T, double>) {
      return _mm512_maskz_loadu_pd(bits_, address);
    } else {
      const __m256i halves = _mm256_maskz_loadu_epi16(bits_, address);
      if constexpr (std::is_same_v<T, f16>)
        return _mm512_maskz_cvtph_ps(0xFFFF, halves);
      else
        return (Vec<float>)((Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, halves) << 16);
    }
  }
  template <class T>
  WEFT_INLINE void store(T* address, Vec<accumulate_t<T>> value) const {
    if constexpr (std::is_same_v<T, float>) {
      _mm512_mask_storeu_ps(address, bits_, value);
    } else if constexpr (std::is_same_v<T, double>) {
      _mm512_mask_storeu_pd(address, bits_, value);
    } else {
      T held[kLanes<T>];
      store_vec(held, value);
      _mm256_mask_storeu_epi16(address, bits_,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(held)));
    }
  }
  // `value` with zeros in the other lanes.
  WEFT_INLINE Vec<float> of(Vec<float> value) const { return _mm512_maskz_mov_ps(bits_, value); }
  WEFT_INLINE Vec<double> of(Vec<double> value) const { return _mm512_maskz_mov_pd(bits_, value); }

 private:
  static uint32_t below(int64_t count, int lanes) {
    return (1u << least(most(count, 0), lanes)) - 1;
  }

  uint32_t bits_;
};

// Planes that lie so far ahead are asked for: what memory takes to answer.
inline int64_t planes_ahead(const ConvProblem& p) {
  constexpr int64_t kElements = 2048;
  return ceil_div(kElements, p.in_positions());
}

}  // namespace
}  // namespace weft::WEFT_TARGET
