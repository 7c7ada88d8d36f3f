// The kernels on the CPU: vectorised by the compiler for the machine the code runs on
// (target_clones), parallel over rows in at::parallel_for. Every sum has one order, whatever the
// number of threads.
#include "kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "formulas.h"

// One body per instruction set, chosen when the library loads. Other compilers and machines get the
// flags they were given.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MCN_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define MCN_CLONES
#endif

namespace mcn::cpu {
namespace {

constexpr int64_t kStrip = 32;  // rows of a tile that stay in the cache while they are read twice
int64_t strips(int64_t rows) { return (rows + kStrip - 1) / kStrip; }
constexpr float kSpread =
    40;  // of logits, far enough from fp32's exp(-87) that no sum loses a digit
constexpr int64_t kGrain = 64;  // rows of d elements that are worth a thread's start

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
struct Row {  // what a row of a tile brings to its logits
  const A* s;
  A scale;  // inverse norm / temperature
  int32_t key;
};

template <typename A>
MCN_INLINE A logit(const Row<A>& row, A s, A col_inverse, int32_t col_key) {
  const bool skip = (col_key == row.key) | (col_key < 0);
  const A z = s * row.scale * col_inverse;
  return skip ? lowest<A>() : z;
}

template <typename A>
MCN_INLINE Row<A> row_of(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                         int64_t i) {
  const int64_t row = tile.row0 + i;
  return {tile.data + i * tile.ld, row_inverse[row] / term.temperature[0], term.row_key[row]};
}

// Rows [begin, end) of the tile: their statistics merged into the term's, the columns' over these
// rows into col_max and col_sum. Twice over the strip, which stays in the cache: the largest, then
// the sums.
template <typename A>
MCN_INLINE void strip_statistics(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                                 const A* col_inverse, int64_t begin, int64_t end, A* col_max,
                                 A* col_sum) {
  const int64_t cols = tile.cols;
  const int32_t* col_key = term.col_key + tile.col0;
  const A* inverse = col_inverse + tile.col0;
  A largest[kStrip];
  if (term.both) {
    std::fill(col_max, col_max + cols, lowest<A>());
    std::fill(col_sum, col_sum + cols, A(0));
  }
  for (int64_t i = begin; i < end; ++i) {
    const Row<A> row = row_of(term, tile, row_inverse, i);
    A top = lowest<A>();
    if (row.key >= 0) {
      if (term.both) {
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < cols; ++j) {
          const A z = logit(row, row.s[j], inverse[j], col_key[j]);
          top = z > top ? z : top;
          col_max[j] = z > col_max[j] ? z : col_max[j];
        }
      } else {
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < cols; ++j) {
          const A z = logit(row, row.s[j], inverse[j], col_key[j]);
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
        const A e = exp_shifted(logit(row, row.s[j], inverse[j], col_key[j]) - shift);
        sum += e;
        col_sum[j] += e;
      }
    } else if (term.both) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) {
        const A z = logit(row, row.s[j], inverse[j], col_key[j]);
        sum += exp_shifted(z - shift);
        col_sum[j] += exp_shifted(z - col_max[j]);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) {
        sum += exp_shifted(logit(row, row.s[j], inverse[j], col_key[j]) - shift);
      }
    }
    LogSum<A> total{term.row_max[tile.row0 + i], term.row_sum[tile.row0 + i]};
    total.merge(sum == A(0) ? lowest<A>() : shift, sum);
    term.row_max[tile.row0 + i] = total.max;
    term.row_sum[tile.row0 + i] = total.sum;
  }
}
#define MCN_STRIP_STATISTICS(A)                                                            \
  void strip_statistics_of(const Term<A>& term, const Tile<A>& tile, const A* row_inverse, \
                           const A* col_inverse, int64_t begin, int64_t end, A* col_max,   \
                           A* col_sum) {                                                   \
    strip_statistics(term, tile, row_inverse, col_inverse, begin, end, col_max, col_sum);  \
  }
MCN_CLONES MCN_STRIP_STATISTICS(float) MCN_STRIP_STATISTICS(double)

    // exp(z - lse_row) + exp(z - lse_col) = exp(z - center) (exp(center - lse_row) + exp(center -
    // lse_col)): one exponential an element where all log-sums of a tile lie close. col_factor: the
    // last term, or null if they do not.
    template <typename A>
    MCN_INLINE
    void row_gradient(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                      const A* col_inverse, int64_t i, A center, const A* col_factor, A* out) {
  const int64_t cols = tile.cols;
  const Row<A> row = row_of(term, tile, row_inverse, i);
  if (row.key < 0) {
    std::fill(out, out + cols, A(0));
    return;
  }
  const int32_t* col_key = term.col_key + tile.col0;
  const A* inverse = col_inverse + tile.col0;
  const A row_top = term.row_top[tile.row0 + i], row_rest = term.row_rest[tile.row0 + i];
  const A scale = row_inverse[tile.row0 + i] * term.factor[1];
  if (col_factor) {
    const A row_factor = exp_shifted(center - row_top - row_rest);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A e = exp_shifted(logit(row, row.s[j], inverse[j], col_key[j]) - center);
      out[j] = e * (row_factor + col_factor[j]) * scale * inverse[j];
    }
  } else if (term.both) {
    const A *col_top = term.col_top + tile.col0, *col_rest = term.col_rest + tile.col0;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A z = logit(row, row.s[j], inverse[j], col_key[j]);
      out[j] = (exp_shifted(z - row_top - row_rest) + exp_shifted(z - col_top[j] - col_rest[j])) *
               scale * inverse[j];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const A z = logit(row, row.s[j], inverse[j], col_key[j]);
      out[j] = exp_shifted(z - row_top - row_rest) * scale * inverse[j];
    }
  }
}
#define MCN_ROW_GRADIENT(A)                                                                      \
  void row_gradient_of(const Term<A>& term, const Tile<A>& tile, const A* row_inverse,           \
                       const A* col_inverse, int64_t i, A center, const A* col_factor, A* out) { \
    row_gradient(term, tile, row_inverse, col_inverse, i, center, col_factor, out);              \
  }
MCN_CLONES MCN_ROW_GRADIENT(float) MCN_ROW_GRADIENT(double)
// In double: a positive's logit is exact to fp32's last digit, which is all there is of a loss of
// 1e-9.
#define MCN_DOT(A)                                                                \
  double dot(const A* x, const A* y, int64_t d, double x_scale, double y_scale) { \
    double sum = 0;                                                               \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t k = 0; k < d; ++k) sum += \
        (x[k] * x_scale) * (y[k] * y_scale);                                      \
    return sum;                                                                   \
  }
    MCN_CLONES MCN_DOT(float) MCN_DOT(double)

#define MCN_LARGEST(A) /* infinite if any value is inf or NaN */                    \
  double largest(const A* x, int64_t d) {                                           \
    A top = 0;                                                                      \
    _Pragma("omp simd reduction(max : top)") for (int64_t k = 0; k < d; ++k) {      \
      const A size = std::fabs(x[k]);                                               \
      const A finite = size <= std::numeric_limits<A>::max() ? size : -lowest<A>(); \
      top = finite > top ? finite : top;                                            \
    }                                                                               \
    return top;                                                                     \
  }
        MCN_CLONES MCN_LARGEST(float) MCN_LARGEST(double)

            template <typename A>
            const A* row(const Rows<A>& x, int64_t i) {
  return static_cast<const A*>(x.data) + i * x.d;
}

}  // namespace

int64_t first_outside(void*, const int64_t* labels, const bool* valid, int64_t n, int64_t k) {
  for (int64_t i = 0; i < n; ++i)
    if ((!valid || valid[i]) && (labels[i] < 0 || labels[i] >= k)) return i;
  return -1;
}

int64_t partial_size(int64_t rows, int64_t cols) { return 2 * strips(rows) * cols; }

template <typename A>
bool measure(void*, const Rows<A>& x, bool normalize) {
  // Between these, products and squares of norms stay far inside fp32.
  constexpr double kLow = 1e-8, kHigh = 1e8;
  std::vector<char> extreme(x.n, 0);
  std::vector<double> norms(normalize ? x.n : 0);
  at::parallel_for(0, x.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double top = largest(row(x, i), x.d);
      const bool finite = top <= std::numeric_limits<A>::max();
      const bool valid = !x.valid || x.valid[i];
      x.scale[i] = valid ? 1 : 0;
      x.inverse[i] = !valid ? A(0) : finite ? A(1) : std::numeric_limits<A>::quiet_NaN();
      extreme[i] = !valid && !finite;  // 0 * NaN in a product would reach valid rows
      if (!valid || !normalize) continue;
      const double unit = power_below_one(top);  // squares of 1e-200 would be lost
      norms[i] = std::sqrt(dot(row(x, i), row(x, i), x.d, unit, unit)) / unit;
      extreme[i] = finite && top > 0 && !(norms[i] >= kLow && norms[i] <= kHigh);
    }
  });
  const bool copies = std::find(extreme.begin(), extreme.end(), 1) != extreme.end();
  for (int64_t i = 0; normalize && i < x.n; ++i) {
    if (x.scale[i] == 0 || std::isnan(x.inverse[i])) continue;
    const double scale = copies ? power_below_one(norms[i]) : 1.0;
    const bool alive = norms[i] > kEps;
    x.scale[i] = A(alive ? scale : -scale);
    x.inverse[i] = norms[i] == 0 ? A(0) : A(1.0 / ((alive ? norms[i] : kEps) * scale));
  }
  return copies;
}

template <typename A>
void copy_rows(void*, const Rows<A>& x, int64_t begin, int64_t end, void* out) {
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const A scale = std::fabs(x.scale[i]);
      A* w = static_cast<A*>(out) + (i - begin) * x.d;
      for (int64_t k = 0; k < x.d; ++k) w[k] = scale == A(0) ? A(0) : row(x, i)[k] * scale;
    }
  });
}

template <typename A>
void tile_statistics(void*, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                     const A* col_inverse, A* partial) {
  const int64_t n_strips = strips(tile.rows);
  A *maxima = partial, *sums = partial + n_strips * tile.cols;
  at::parallel_for(0, n_strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      strip_statistics_of(term, tile, row_inverse, col_inverse, strip * kStrip,
                          std::min((strip + 1) * kStrip, tile.rows), maxima + strip * tile.cols,
                          sums + strip * tile.cols);
    }
  });
  if (!term.both) return;
  at::parallel_for(0, tile.cols, 512, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      LogSum<A> total{term.col_max[tile.col0 + j], term.col_sum[tile.col0 + j]};
      for (int64_t strip = 0; strip < n_strips; ++strip) {
        const A sum = sums[strip * tile.cols + j];
        total.merge(sum == A(0) ? lowest<A>() : maxima[strip * tile.cols + j], sum);
      }
      term.col_max[tile.col0 + j] = total.max;
      term.col_sum[tile.col0 + j] = total.sum;
    }
  });
}

template <typename A>
void finish(void*, const Term<A>& term, const Rows<A>& x, const Rows<A>& y, A* positive,
            double* sums) {
  const double temperature = term.temperature[0];
  at::parallel_for(0, term.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (term.row_key[i] < 0) continue;
      const int64_t p = term.both ? i : term.row_key[i];
      const double s = dot(row(x, i), row(y, p), x.d, std::fabs(x.scale[i]), std::fabs(y.scale[p]));
      positive[i] = A((s * x.inverse[i] * y.inverse[p] - term.margin) / temperature);
    }
  });
  Sums all;
  for (int64_t j = 0; j < term.m; ++j) {
    if (term.col_key[j] >= 0 && std::isnan(y.inverse[j])) all.broken = 1;
    if (term.both && term.col_key[j] < 0) term.col_top[j] = -lowest<A>();
  }
  for (int64_t i = 0; i < term.n; ++i) {
    term.pull[i] = 0;
    term.row_top[i] = -lowest<A>();
    if (term.row_key[i] < 0) continue;
    ++all.count;
    if (std::isnan(x.inverse[i])) all.broken = 1;
    const auto add = [&](A max, A total, A* top, A* rest) {
      const Direction<A> row(max, total, positive[i]);
      all.loss += row.loss;
      term.pull[i] += row.pull;
      *top = row.top, *rest = row.rest;
      all.bound = std::max(all.bound, double(std::exp(max - row.top - row.rest)));
    };
    add(term.row_max[i], term.row_sum[i], term.row_top + i, term.row_rest + i);
    if (term.both) add(term.col_max[i], term.col_sum[i], term.col_top + i, term.col_rest + i);
  }
  sums[0] = all.loss, sums[1] = all.count, sums[2] = all.bound, sums[3] = all.broken;
}

template <typename A>
void conclude(void*, const Term<A>& term, const double* sums, int64_t ranks, double weight,
              double report, int slot, A* losses) {
  conclude_sums(sums, ranks, term.temperature[0], weight, report, term.factor, losses + slot,
                losses);
}

template <typename A>
void tile_gradient(void*, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                   const A* col_inverse, void* out, Type, int64_t ld_out) {
  A top = lowest<A>(), bottom = -lowest<A>();
  const auto spread = [&](const A* tops, const A* rests, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      if (tops[i] == -lowest<A>()) continue;
      top = std::max(top, tops[i] + rests[i]), bottom = std::min(bottom, tops[i] + rests[i]);
    }
  };
  std::vector<A> col_factor;
  if (term.both) {
    spread(term.row_top + tile.row0, term.row_rest + tile.row0, tile.rows);
    spread(term.col_top + tile.col0, term.col_rest + tile.col0, tile.cols);
    if (top >= bottom && top - bottom <= 2 * kSpread) {
      col_factor.resize(tile.cols);
      for (int64_t j = 0; j < tile.cols; ++j)
        col_factor[j] = exp_shifted((top + bottom) / 2 - term.col_top[tile.col0 + j] -
                                    term.col_rest[tile.col0 + j]);
    }
  }
  at::parallel_for(0, tile.rows, kStrip, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      row_gradient_of(term, tile, row_inverse, col_inverse, i, (top + bottom) / 2,
                      col_factor.empty() ? nullptr : col_factor.data(),
                      static_cast<A*>(out) + i * ld_out);
  });
}

template <typename A>
void accumulate(void*, const Term<A>& term, const Rows<A>& own, const Rows<A>& other, int64_t begin,
                int64_t end, const A* sums, A* total, bool add, A* dots) {
  const A factor = term.factor[0], boost = term.factor[1];
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const A* sum = sums + (i - begin) * own.d;
      A* g = total + (i - begin) * own.d;
      const int64_t p = term.both ? i : std::max(term.row_key[i], 0);
      const bool there = term.row_key[i] >= 0;  // other rows may hold anything
      const A pull =
          there ? term.pull[i] * own.inverse[i] * other.inverse[p] * std::fabs(other.scale[p])
                : A(0);
      const A *w = row(own, i), *partner = row(other, p), scale = std::fabs(own.scale[i]);
      double product = 0;
      for (int64_t k = 0; k < own.d; ++k) {
        const A value = there ? sum[k] / boost - pull * partner[k] : A(0);
        if (dots && there) product += double(value) * (w[k] * scale);
        g[k] = (add ? g[k] : A(0)) + factor * value;
      }
      if (dots) dots[i] = A(product);
    }
  });
}

template <typename A>
void temperature_gradient(void*, const Term<A>& term, const A* dots, A* d_temperature) {
  double sum = 0;
  for (int64_t i = 0; i < term.n; ++i) sum += dots[i] + term.margin * term.pull[i];
  *d_temperature -= A(term.factor[0] * sum / term.temperature[0]);
}

template <typename A>
void project(void*, const Rows<A>& x, bool normalize, int64_t begin, int64_t end, const A* total,
             const A* upstream, void* out, Type) {
  const A up = upstream ? *upstream : A(1);
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const A* g = total + (i - begin) * x.d;
      A* result = static_cast<A*>(out) + (i - begin) * x.d;
      const A scale = x.scale[i], inverse = x.inverse[i];
      if (normalize && scale <= A(0)) {
        std::fill(result, result + x.d, A(0));
        continue;
      }
      const A along = normalize
                          ? A(dot(g, row(x, i), x.d, 1, double(scale) * inverse)) * inverse * scale
                          : A(0);
      if (!normalize) {
        for (int64_t k = 0; k < x.d; ++k) result[k] = up * g[k];
        continue;
      }
      for (int64_t k = 0; k < x.d; ++k) result[k] = up * (scale * (g[k] - along * row(x, i)[k]));
    }
  });
}

MCN_INSTANTIATE_KERNELS(float);
MCN_INSTANTIATE_KERNELS(double);

}  // namespace mcn::cpu
