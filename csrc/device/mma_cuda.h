// ldmatrix and mma as the hardware's own instructions, from sm_80 on. See device/mma.h.
#pragma once

#include <type_traits>

#include "device/mma.h"

namespace weft::device {

WEFT_DEVICE Pack<uint32_t, 4> ldmatrix(const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  Pack<uint32_t, 4> words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
  return words;
}

WEFT_DEVICE Pack<uint32_t, 4> ldmatrix_transposed(const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  Pack<uint32_t, 4> words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
  return words;
}

WEFT_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

#define WEFT_MMA_F32(shape, type)                                                     \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
WEFT_DEVICE void mma(typename Mma<T>::C& c, const typename Mma<T>::A& a,
                     const typename Mma<T>::B& b) {
  if constexpr (std::is_same_v<T, double>) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1])
                 : "d"(a[0]), "d"(b[0]));
  } else if constexpr (std::is_same_v<T, tf32>) {
    WEFT_MMA_F32("m16n8k8", "tf32");
  } else if constexpr (std::is_same_v<T, bf16>) {
    WEFT_MMA_F32("m16n8k16", "bf16");
  } else {
    static_assert(std::is_same_v<T, f16>);
    WEFT_MMA_F32("m16n8k16", "f16");
  }
}

#undef WEFT_MMA_F32

}  // namespace weft::device
