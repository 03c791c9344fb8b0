// The transforms of F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", arXiv 1509.09308): Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A of tiles d of 4 x 4 inputs,
// windows g and tiles Y of 2 x 2 outputs. That is linear in g, so the gradient of g is
// Gᵀ [ Σ_tiles (A Y' Aᵀ) ⊙ (Bᵀ d B) ] G of gradients Y' of Y. Vectors run along the channels.
#pragma once

#include "conv/conv_winograd_plan.h"
#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

// Bᵀ of one row or column.
template <class V>
WEFT_INLINE void winograd_input(const V (&d)[4], V (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// G of one row or column.
template <class V>
WEFT_INLINE void winograd_weights(const V (&g)[3], V (&u)[4]) {
  const V ends = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
  u[0] = g[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = g[2];
}

// Aᵀ of one row or column.
template <class V>
WEFT_INLINE void winograd_output(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// A of one row or column.
template <class V>
WEFT_INLINE void winograd_gradient(const V (&g)[2], V (&v)[4]) {
  v[0] = g[0];
  v[1] = g[0] + g[1];
  v[2] = g[0] - g[1];
  v[3] = -g[1];
}

// Gᵀ of one row or column.
template <class V>
WEFT_INLINE void winograd_window(const V (&m)[4], V (&g)[3]) {
  const V even = 0.5f * (m[1] + m[2]);
  g[0] = m[0] + even;
  g[1] = 0.5f * (m[1] - m[2]);
  g[2] = even + m[3];
}

// A vector of channels of one tile, 4 x 4 inputs or 2 x 2 gradients; points are `point` apart.
template <class T>
WEFT_INLINE void transform_tile(const Vec<T> (&d)[4][4], T* out, int64_t point) {
  Vec<T> rows[4][4];  // [column, row]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec<T> column[4] = {d[0][j], d[1][j], d[2][j], d[3][j]};
    winograd_input(column, rows[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec<T> row[4] = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    Vec<T> v[4];
    winograd_input(row, v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_vec(out + (4 * i + j) * point, v[j]);
  }
}

template <class T>
WEFT_INLINE void transform_tile(const Vec<T> (&d)[2][2], T* out, int64_t point) {
  Vec<T> rows[2][4];  // [column, row]
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const Vec<T> column[2] = {d[0][j], d[1][j]};
    winograd_gradient(column, rows[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec<T> row[2] = {rows[0][i], rows[1][i]};
    Vec<T> v[4];
    winograd_gradient(row, v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_vec(out + (4 * i + j) * point, v[j]);
  }
}

// A vector of destination channels of one source channel: window[3 * i + j] is `place` behind the
// one before.
template <class T>
WEFT_INLINE void transform_window(const T* window, int64_t place, T* out, int64_t point) {
  Vec<T> rows[3][4];  // [column, row]
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vec<T> column[3] = {load_vec(window + j * place), load_vec(window + (3 + j) * place),
                              load_vec(window + (6 + j) * place)};
    winograd_weights(column, rows[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec<T> row[3] = {rows[0][i], rows[1][i], rows[2][i]};
    Vec<T> u[4];
    winograd_weights(row, u);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_vec(out + (4 * i + j) * point, u[j]);
  }
}

// A vector of channels of the 2 x 2 outputs of one tile.
template <class T>
WEFT_INLINE void transform_sums(const T* sums, int64_t point, Vec<T> (&y)[2][2]) {
  Vec<T> rows[4][2];  // [column, row of outputs]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec<T> column[4] = {load_vec(sums + j * point), load_vec(sums + (4 + j) * point),
                              load_vec(sums + (8 + j) * point), load_vec(sums + (12 + j) * point)};
    winograd_output(column, rows[j]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec<T> row[4] = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    winograd_output(row, y[i]);
  }
}

// A vector of channels of the gradient of one window, from the sums of all points.
template <class T>
WEFT_INLINE void transform_gradient_sums(const T* sums, int64_t point, Vec<T> (&g)[3][3]) {
  Vec<T> rows[4][3];  // [column, row of the window]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec<T> column[4] = {load_vec(sums + j * point), load_vec(sums + (4 + j) * point),
                              load_vec(sums + (8 + j) * point), load_vec(sums + (12 + j) * point)};
    winograd_window(column, rows[j]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Vec<T> row[4] = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    winograd_window(row, g[i]);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
