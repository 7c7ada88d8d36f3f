// The kernels on the CPU: parallel over rows in at::parallel_for, loops of cpu_rows.h. Every sum
// has one order, whatever the number of threads.
#include "kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu_rows.h"
#include "formulas.h"

namespace mcn::cpu {
namespace {

constexpr int64_t kGrain = 64;  // rows of d elements that are worth a thread's start

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
