// Adaptive pooling on CPU of channels-last maps with too few channels for vectors, as planes: the
// maps are copied into the other order, pooled there, and copied back, all in the cache. Bound: the
// copies, an element or two per cycle.
#pragma once

#include "core/scratch.h"
#include "pool/pool_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// A tensor of the problem: what is read, or what is written, with as many positions as the input or
// as the output.
struct PoolTensor {
  const void* read;
  void* written;
  int64_t positions;
  int64_t bytes;  // of an element
};

// to [columns, rows] = from [rows, columns].
template <class E>
void transpose_elements(const void* from, int64_t rows, int64_t columns, void* to) {
  const auto* source = static_cast<const E*>(from);
  auto* target = static_cast<E*>(to);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) target[c * rows + r] = source[r * columns + c];
}

inline void transpose(const void* from, int64_t rows, int64_t columns, int64_t bytes, void* to) {
  switch (bytes) {
    case 1:
      return transpose_elements<uint8_t>(from, rows, columns, to);
    case 2:
      return transpose_elements<uint16_t>(from, rows, columns, to);
    case 4:
      return transpose_elements<uint32_t>(from, rows, columns, to);
    default:
      return transpose_elements<uint64_t>(from, rows, columns, to);
  }
}

// Runs body(problem, addresses of the tensors, context) on each image in the other layout; a tensor
// without addresses stays so.
template <int kTensors, class Body>
void pool_transposed(const PoolProblem& p, const PoolTensor (&tensors)[kTensors],
                     const Context& context, const Body& body) {
  const int64_t channels = p.inner;
  Context alone = context;
  alone.threads = 1;
  parallel_for(context, p.outer, pool_grain(p.outer, p.in_elements() + p.out_elements()),
               [&](int64_t begin, int64_t end) {
                 Scratch<char> held[kTensors];
                 void* addresses[kTensors];
                 for (int t = 0; t < kTensors; ++t) {
                   const PoolTensor& tensor = tensors[t];
                   const bool given = tensor.read != nullptr || tensor.written != nullptr;
                   held[t].resize(given ? channels * tensor.positions * tensor.bytes : 0);
                   addresses[t] = given ? held[t].data() : nullptr;
                 }
                 PoolProblem q = p;
                 q.outer = channels;
                 q.inner = 1;
                 for (int64_t image = begin; image < end; ++image) {
                   const int64_t first = image * channels;
                   for (int t = 0; t < kTensors; ++t) {
                     const auto& [read, written, positions, bytes] = tensors[t];
                     if (read == nullptr) continue;
                     const char* from = static_cast<const char*>(read) + first * positions * bytes;
                     transpose(from, positions, channels, bytes, addresses[t]);
                   }
                   body(q, addresses, alone);
                   for (int t = 0; t < kTensors; ++t) {
                     const auto& [read, written, positions, bytes] = tensors[t];
                     if (written == nullptr) continue;
                     char* to = static_cast<char*>(written) + first * positions * bytes;
                     transpose(addresses[t], channels, positions, bytes, to);
                   }
                 }
               });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
