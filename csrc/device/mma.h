// Words of the device vocabulary for tensor cores: fragments, ldmatrix, mma.
//
//   ldmatrix(row) ldmatrix_transposed(row)   four 8x8 matrices of 16-bit elements in shared memory;
//                                            lane l gives the address of row l % 8 of matrix l / 8,
//                                            16 bytes, aligned. Word i of the result is of matrix i
//   mma<T>(c, a, b)                          c += a · b of T = bf16, f16, tf32 or double; all 32
//                                            lanes of a warp, each with its part of the matrices
//   to_tf32(x)                               x rounded to the 10 fraction bits that mma<tf32> sees
//
// Who holds what (PTX ISA, "Matrix fragments"), with g = lane / 4 and t = lane % 4:
//
//   ldmatrix             word i: elements (g, 2t) and (g, 2t + 1) of matrix i
//   ldmatrix_transposed  word i: elements (2t, g) and (2t + 1, g) of matrix i
//   bf16, f16: m16n8k16  a word i: (g + 8 (i % 2), 2t + 8 (i / 2)) and the next k;
//                        b word i: (k, n) = (2t + 8 i, g) and the next k
//   tf32: m16n8k8        a word i: (g + 8 (i % 2), t + 4 (i / 2));  b word i: (t + 4 i, g)
//   double: m8n8k4       a: (g, t);  b: (t, g)
//   c                    value i: (g + 8 (i / 2), 2t + i % 2)
#pragma once

#include "device/device.h"

namespace weft::device {

// The operand type of float32 products on tensor cores: a float of which 19 bits count.
struct tf32 {
  uint32_t bits;
};

// The extents of one mma and a lane's part of its matrices.
template <class T>
struct Mma {
  static constexpr int kM = 16, kN = 8, kK = 16;
  using A = Pack<uint32_t, 4>;
  using B = Pack<uint32_t, 2>;
  using C = Pack<float, 4>;
};
template <>
struct Mma<tf32> {
  static constexpr int kM = 16, kN = 8, kK = 8;
  using A = Pack<uint32_t, 4>;
  using B = Pack<uint32_t, 2>;
  using C = Pack<float, 4>;
};
template <>
struct Mma<double> {
  static constexpr int kM = 8, kN = 8, kK = 4;
  using A = Pack<double, 1>;
  using B = Pack<double, 1>;
  using C = Pack<double, 2>;
};

}  // namespace weft::device

#if defined(__CUDACC__)
#include "device/mma_cuda.h"
#else
#include "device/mma_host.h"
#endif
