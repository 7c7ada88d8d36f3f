// The loops of cpu.cpp over a row's or a strip's elements, vectorised by the compiler for the
// machine the code runs on (target_clones).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "formulas.h"
#include "kernels.h"

// One body per instruction set, chosen when the library loads: by what the machine can do, not by
// its maker (arch=haswell is no AMD). Other compilers and machines get the flags they were given.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MCN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MCN_CLONES
#endif

namespace mcn::cpu {
namespace {

constexpr int64_t kStrip = 32;  // rows of a tile that stay in the cache while they are read twice
int64_t strips(int64_t rows) { return (rows + kStrip - 1) / kStrip; }
constexpr float kSpread =
    40;  // of logits, far enough from fp32's exp(-87) that no sum loses a digit

// exp for arguments up to 88, as shifted logits are; 0 below -87, where fp32 loses precision.
// Cody-Waite reduction and Cephes' polynomial, 1 unit in the last place; written so that it
// vectorises.
MCN_INLINE float exp_shifted(float x) {
  constexpr float kLog2e = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * kLog2e + kRound;
  const float whole = shifted - kRound;
  const float r = (clamped - whole * kHigh) - whole * kLow;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (__builtin_bit_cast(int32_t, shifted) << 23) + (127 << 23);
  const float scaled = p * __builtin_bit_cast(float, bits);
  return x < -87.0f ? 0.0f : scaled;
}
MCN_INLINE double exp_shifted(double x) { return std::exp(x); }

template <typename A>
MCN_INLINE Element<A> element(A x) {
  return {x, exp_shifted(x > A(0) ? -x : x)};
}

template <typename A>
struct Row {  // what a row of a tile brings to its logits
  const A* s;
  A scale;  // inverse norm / temperature
  int32_t key, bag;
};
template <typename A>
struct Columns {  // a tile's columns
  const int32_t *key, *bag;
  const A* inverse;
};

// -inf unless row and column j are each other's negatives. kBags: known to the compiler, as a
// comparison an element is a fifth of a loop's time.
template <bool kBags, typename A>
MCN_INLINE A logit(Row<A> row, Columns<A> columns, int64_t j) {
  const int32_t key = columns.key[j];
  const bool skip = (key == row.key) | (key < 0) | (kBags && columns.bag[j] == row.bag);
  const A z = row.s[j] * row.scale * columns.inverse[j];
  return skip ? lowest<A>() : z;
}

template <typename A>
MCN_INLINE Row<A> row_of(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                         int64_t i) {
  const int64_t row = tile.row0 + i;
  return {tile.data + i * tile.ld, row_inverse[row] / term.tau(), term.row_key(row),
          term.row_bag(row)};
}

// f(j, logit) for the positives in a row but the partner: few.
template <typename A, typename F>
MCN_INLINE void for_mates(const Term<A>& term, const Row<A>& row, Columns<A> columns, int64_t cols,
                          F f) {
  if (!term.bags || row.key < 0) return;
  const A margin = A(term.margin / term.tau());
  for (int64_t j = 0; j < cols; ++j) {
    const int32_t key = columns.key[j];
    if (columns.bag[j] == row.bag && key != row.key && key >= 0)
      f(j, row.s[j] * row.scale * columns.inverse[j] - margin);
  }
}

// Running sums of a strip's columns, (cols,) each.
template <typename A>
struct ColumnSums {
  A *max, *sum, *near_max, *near_sum;
};

template <typename A>
MCN_INLINE void merge_row(const Term<A>& term, const Tile<A>& tile, int64_t i, LogSum<A> others,
                          LogSum<A> near) {
  const int64_t row = tile.row0 + i;
  const Axis<A>& of = term.row;
  if (tile.col0 > 0) others.merge(of.max[row], of.sum[row]);
  of.max[row] = others.max, of.sum[row] = others.sum;
  if (!term.two_sums()) return;
  if (tile.col0 > 0) near.merge(of.near_max[row], of.near_sum[row]);
  of.near_max[row] = near.max, of.near_sum[row] = near.sum;
}

// As strip_statistics, of the sigmoid loss: plain sums, as log-sums of largest logit 0.
template <bool kBags, typename A>
MCN_INLINE void strip_elements(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                               Columns<A> columns, int64_t begin, int64_t end,
                               const ColumnSums<A>& of) {
  const int64_t cols = tile.cols;
  const A bias = term.bias();
  for (A* all : {of.max, of.sum, of.near_max, of.near_sum}) std::fill(all, all + cols, A(0));
  for (int64_t i = begin; i < end; ++i) {
    const Row<A> row = row_of(term, tile, row_inverse, i);
    A loss = 0, slope = 0;
#pragma omp simd reduction(+ : loss, slope)
    for (int64_t j = 0; j < cols; ++j) {
      const A z = logit<kBags>(row, columns, j);
      const Element<A> e = element(row.key < 0 ? lowest<A>() : z + bias);
      loss += e.loss, slope += e.slope;
      of.sum[j] += e.loss, of.near_sum[j] += e.slope;
    }
    for_mates(term, row, columns, cols, [&](int64_t j, A z) {
      const Element<A> e = element(-z - bias);
      loss += e.loss, slope -= e.slope;
      of.sum[j] += e.loss, of.near_sum[j] -= e.slope;
    });
    merge_row(term, tile, i, {0, loss}, {0, slope});
  }
}

// Rows [begin, end) of the tile: their sums merged into the term's, the columns' over these rows
// into `of`. Twice over the strip, which stays in the cache: the largest, then the sums.
template <bool kBags, typename A>
MCN_INLINE void strip_statistics(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                                 Columns<A> columns, int64_t begin, int64_t end,
                                 const ColumnSums<A>& of) {
  const int64_t cols = tile.cols;
  A largest[kStrip], *col_max = of.max, *col_sum = of.sum;
  if (term.both) {
    std::fill(col_max, col_max + cols, lowest<A>());
    std::fill(col_sum, col_sum + cols, A(0));
  }
  if (term.two_sums()) {
    std::fill(of.near_max, of.near_max + cols, lowest<A>());
    std::fill(of.near_sum, of.near_sum + cols, A(0));
  }
  for (int64_t i = begin; i < end; ++i) {
    const Row<A> row = row_of(term, tile, row_inverse, i);
    A top = lowest<A>();
    if (row.key >= 0) {
      if (term.both) {
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < cols; ++j) {
          const A z = logit<kBags>(row, columns, j);
          top = z > top ? z : top;
          col_max[j] = z > col_max[j] ? z : col_max[j];
        }
      } else {
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < cols; ++j) {
          const A z = logit<kBags>(row, columns, j);
          top = z > top ? z : top;
        }
      }
    }
    largest[i - begin] = top;
  }
  // Within kSpread of each other, one shift and so one exponential serves rows and columns; else
  // each its own.
  A top = lowest<A>(), bottom = -lowest<A>();
  const auto spread = [&](A value) {
    if (value == lowest<A>()) return;
    top = std::max(top, value), bottom = std::min(bottom, value);
  };
  std::for_each(largest, largest + (end - begin), spread);
  if (term.both) std::for_each(col_max, col_max + cols, spread);
  const bool shared = term.both && top >= bottom && top - bottom <= kSpread;
  // Nothing unmasked in a column so far: the shift is 0, as exp(-inf - -inf) would be NaN.
  for (int64_t j = 0; term.both && j < cols; ++j)
    col_max[j] = shared ? top : col_max[j] == lowest<A>() ? A(0) : col_max[j];
  for (int64_t i = begin; i < end; ++i) {
    const Row<A> row = row_of(term, tile, row_inverse, i);
    if (row.key < 0) continue;
    const A shift = shared ? top : largest[i - begin] == lowest<A>() ? A(0) : largest[i - begin];
    A sum = 0;
    if (shared) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) {
        const A e = exp_shifted(logit<kBags>(row, columns, j) - shift);
        sum += e;
        col_sum[j] += e;
      }
    } else if (term.both) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) {
        const A z = logit<kBags>(row, columns, j);
        sum += exp_shifted(z - shift);
        col_sum[j] += exp_shifted(z - col_max[j]);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) sum += exp_shifted(logit<kBags>(row, columns, j) - shift);
    }
    LogSum<A> near;
    for_mates(term, row, columns, cols, [&](int64_t j, A z) {
      near.merge(z, 1);
      LogSum<A> of_col{of.near_max[j], of.near_sum[j]};
      of_col.merge(z, 1);
      of.near_max[j] = of_col.max, of.near_sum[j] = of_col.sum;
    });
    merge_row(term, tile, i, {sum == A(0) ? lowest<A>() : shift, sum}, near);
  }
}
#define MCN_STRIP_STATISTICS(A)                                                                   \
  MCN_CLONES void strip_statistics_of(const Term<A>& term, const Tile<A>& tile,                   \
                                      const A* row_inverse, Columns<A> columns, int64_t begin,    \
                                      int64_t end, const ColumnSums<A>& of) {                     \
    if (term.sigmoid()) strip_elements<true>(term, tile, row_inverse, columns, begin, end, of);   \
    else if (term.bags) strip_statistics<true>(term, tile, row_inverse, columns, begin, end, of); \
    else strip_statistics<false>(term, tile, row_inverse, columns, begin, end, of);               \
  }
MCN_STRIP_STATISTICS(float)
MCN_STRIP_STATISTICS(double)

// The gradient of one direction, given axis' entry k, with respect to a positive's logit z.
template <typename A>
MCN_INLINE A mate_gradient(const Term<A>& term, const Axis<A>& axis, int64_t k, A z) {
  if (term.sigmoid()) return -axis.rest[k] * element(-z - term.bias()).slope;
  return -exp_shifted(z - axis.near_top[k] - axis.near_rest[k]);
}

// exp(z - lse_row) + exp(z - lse_col) = exp(z - center) (exp(center - lse_row) + exp(center -
// lse_col)): one exponential an element where all log-sums of a tile lie close. col_factor: the
// last term, or null if they do not. Returns, if `temperature`, the row's sum of g (z - z of the
// partner). mates: scratch.
template <bool kBags, typename A>
MCN_INLINE double row_gradient(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                               Columns<A> columns, int64_t i, A center, const A* col_factor,
                               bool temperature, std::vector<std::pair<int64_t, A>>& mates,
                               A* out) {
  const int64_t cols = tile.cols, at = tile.row0 + i;
  const Row<A> row = row_of(term, tile, row_inverse, i);
  if (row.key < 0) {
    std::fill(out, out + cols, A(0));
    return 0;
  }
  const A* inverse = columns.inverse;
  const A row_top = term.row.top[at], row_rest = term.row.rest[at];
  const A *col_top = term.col.top + tile.col0, *col_rest = term.col.rest + tile.col0;
  // Gradients times boost are small; boost times the inverse of a short row may be infinite.
  const A row_scale = row_inverse[at], boost = term.factor[1], bias = term.bias();
  double sum = 0;
  const auto add = [&](A of_row, A of_col, A z, int64_t j) {
    if (of_row != A(0)) sum += of_row * double(z - term.row.point[at]);
    if (of_col != A(0)) sum += of_col * double(z - term.col.point[tile.col0 + j]);
  };
  for (int64_t j = 0; temperature && j < cols; ++j) {  // before out overwrites the tile
    const A z = logit<kBags>(row, columns, j);
    if (z == lowest<A>()) continue;  // 0 * inf would be NaN
    if (term.sigmoid()) {
      const A slope = element(z + bias).slope;
      add(row_rest * slope, col_rest[j] * slope, z, j);
    } else {
      add(exp_shifted(z - row_top - row_rest),
          term.both ? exp_shifted(z - col_top[j] - col_rest[j]) : A(0), z, j);
    }
  }
  mates.clear();
  for_mates(term, row, columns, cols, [&](int64_t j, A z) {
    const A of_row = mate_gradient(term, term.row, at, z);
    const A of_col = mate_gradient(term, term.col, tile.col0 + j, z);
    mates.emplace_back(j, (of_row + of_col) * boost * (row_scale * inverse[j]));
    if (temperature) add(of_row, of_col, z, j);
  });
  if (term.sigmoid()) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A slope = element(logit<kBags>(row, columns, j) + bias).slope;
      out[j] = slope * (row_rest + col_rest[j]) * boost * (row_scale * inverse[j]);
    }
  } else if (col_factor) {
    const A row_factor = exp_shifted(center - row_top - row_rest);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A e = exp_shifted(logit<kBags>(row, columns, j) - center);
      out[j] = e * (row_factor + col_factor[j]) * boost * (row_scale * inverse[j]);
    }
  } else if (term.both) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A z = logit<kBags>(row, columns, j);
      out[j] = (exp_shifted(z - row_top - row_rest) + exp_shifted(z - col_top[j] - col_rest[j])) *
               boost * (row_scale * inverse[j]);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A z = logit<kBags>(row, columns, j);
      out[j] = exp_shifted(z - row_top - row_rest) * boost * (row_scale * inverse[j]);
    }
  }
  for (const auto& [j, value] : mates) out[j] = value;
  return sum;
}
#define MCN_ROW_GRADIENT(A)                                                                        \
  MCN_CLONES double row_gradient_of(const Term<A>& term, const Tile<A>& tile,                      \
                                    const A* row_inverse, Columns<A> columns, int64_t i, A center, \
                                    const A* col_factor, bool temperature,                         \
                                    std::vector<std::pair<int64_t, A>>& mates, A* out) {           \
    if (term.bags || term.sigmoid())                                                               \
      return row_gradient<true>(term, tile, row_inverse, columns, i, center, col_factor,           \
                                temperature, mates, out);                                          \
    return row_gradient<false>(term, tile, row_inverse, columns, i, center, col_factor,            \
                               temperature, mates, out);                                           \
  }
MCN_ROW_GRADIENT(float)
MCN_ROW_GRADIENT(double)

// In double: a positive's logit is exact to fp32's last digit, which is all there is of a loss of
// 1e-9.
#define MCN_DOT(A)                                                                           \
  MCN_CLONES double dot(const A* x, const A* y, int64_t d, double x_scale, double y_scale) { \
    double sum = 0;                                                                          \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t k = 0; k < d; ++k) sum +=            \
        (x[k] * x_scale) * (y[k] * y_scale);                                                 \
    return sum;                                                                              \
  }
MCN_DOT(float)
MCN_DOT(double)

#define MCN_LARGEST(A) /* infinite if any value is inf or NaN */                    \
  MCN_CLONES double largest(const A* x, int64_t d) {                                \
    A top = 0;                                                                      \
    _Pragma("omp simd reduction(max : top)") for (int64_t k = 0; k < d; ++k) {      \
      const A size = std::fabs(x[k]);                                               \
      const A finite = size <= std::numeric_limits<A>::max() ? size : -lowest<A>(); \
      top = finite > top ? finite : top;                                            \
    }                                                                               \
    return top;                                                                     \
  }
MCN_LARGEST(float)
MCN_LARGEST(double)

template <typename A>
const A* row(const Rows<A>& x, int64_t i) {
  return static_cast<const A*>(x.data) + i * x.d;
}

}  // namespace
}  // namespace mcn::cpu
