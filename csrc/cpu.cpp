// The kernels on the CPU: parallel over rows in at::parallel_for, loops of cpu_rows.h. Every sum
// has one order, whatever the number of threads.
#include "kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu_rows.h"
#include "formulas.h"

namespace mcn::cpu {
namespace {

constexpr int64_t kGrain = 64;  // rows of d elements that are worth a thread's start

// Fills scale and inverse; true if the matrix products must read working rows.
template <typename A>
bool measure_one(const Rows<A>& x, bool normalize) {
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

// A row of add_gradients; g (d,): scratch.
template <typename A>
void add_row(const Term<A>& term, const GradientRows<A>& side, int64_t i, bool normalize,
             const A* upstream, A* g) {
  const Rows<A>&own = side.own, &other = side.other;
  const int64_t d = own.d, at = (i - side.begin) * d;
  const A factor = term.factor[0], unboost = A(1) / term.factor[1];
  const bool there = term.row.top[i] != -lowest<A>();  // other rows' sums may hold anything
  if (side.add) std::copy(side.total + at, side.total + at + d, g);
  else std::fill(g, g + d, A(0));
  if (there) {
    const int64_t p = term.both ? i : term.labels[i];
    // Apart: the product of two short rows' inverses may leave fp32.
    const A pull = factor * term.pull[i] * own.inverse[i];
    const A unit = other.inverse[p] * std::fabs(other.scale[p]);
    const A *sum = side.sums + at, *partner = row(other, p);
    for (int64_t k = 0; k < d; ++k)
      g[k] += factor * (sum[k] * unboost) - pull * (unit * partner[k]);
  } else if (std::isnan(factor)) {
    std::fill(g, g + d, factor);  // a loss that is NaN has no gradient that is a number
  }
  if (!side.out) {
    std::copy(g, g + d, side.total + at);
    return;
  }
  A* out = static_cast<A*>(side.out) + at;
  const A up = *upstream, scale = own.scale[i], inverse = own.inverse[i];
  if (normalize && scale <= A(0)) {
    std::fill(out, out + d, A(0));
    return;
  }
  const A unit = inverse * scale, *x = row(own, i);
  const A back = normalize ? A(dot(g, x, d, 1, unit)) : A(0);
  for (int64_t k = 0; k < d; ++k)
    out[k] = normalize ? up * (scale * (g[k] - back * (unit * x[k]))) : up * g[k];
}

// A tile's columns, in rows for the loops to read.
template <typename A>
struct TileColumns {
  std::vector<int32_t> key, bag;
  Columns<A> columns;

  TileColumns(const Term<A>& term, const Tile<A>& tile, const A* inverse)
      : key(tile.cols), bag(tile.cols) {
    for (int64_t j = 0; j < tile.cols; ++j)
      key[j] = term.col_key(tile.col0 + j), bag[j] = term.col_bag(tile.col0 + j);
    columns = {key.data(), bag.data(), inverse + tile.col0};
  }
};

}  // namespace

int64_t partial_size(int64_t rows, int64_t cols, bool two_sums) {
  return (two_sums ? 4 : 2) * strips(rows) * cols;
}
int64_t temperature_size(int64_t rows, int64_t) { return rows; }

template <typename A>
void measure(void*, const Rows<A>* sides, int count, bool normalize, bool* copies) {
  for (int i = 0; i < count; ++i) copies[i] = measure_one(sides[i], normalize);
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
  const int64_t n_strips = strips(tile.rows), size = n_strips * tile.cols;
  const TileColumns<A> of_tile(term, tile, col_inverse);
  const auto sums_of = [&](int64_t strip) {
    A* at = partial + strip * tile.cols;
    return ColumnSums<A>{at, at + size, at + 2 * size, at + 3 * size};
  };
  at::parallel_for(0, n_strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      strip_statistics_of(term, tile, row_inverse, of_tile.columns, strip * kStrip,
                          std::min((strip + 1) * kStrip, tile.rows), sums_of(strip));
  });
  if (!term.both) return;
  const auto merge = [&](A* max, A* sum, int64_t j, auto partial_of) {
    LogSum<A> total;
    if (tile.row0 > 0) total = {max[tile.col0 + j], sum[tile.col0 + j]};
    for (int64_t strip = 0; strip < n_strips; ++strip) {
      const auto [strip_max, strip_sum] = partial_of(sums_of(strip));
      total.merge(strip_sum[j] == A(0) ? lowest<A>() : strip_max[j], strip_sum[j]);
    }
    max[tile.col0 + j] = total.max, sum[tile.col0 + j] = total.sum;
  };
  at::parallel_for(0, tile.cols, 512, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      merge(term.col.max, term.col.sum, j,
            [](const ColumnSums<A>& s) { return std::pair(s.max, s.sum); });
      if (term.two_sums())
        merge(term.col.near_max, term.col.near_sum, j,
              [](const ColumnSums<A>& s) { return std::pair(s.near_max, s.near_sum); });
    }
  });
}

template <typename A>
void finish(void*, const Term<A>& term, const Rows<A>& x, const Rows<A>& y, Sums*, Sums* sums,
            unsigned*, const Conclusion<A>& to) {
  at::parallel_for(0, term.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      term.row.point[i] = 0;
      if (!term.there(i)) continue;
      const int64_t p = term.both ? i : term.labels[i];
      const double s = dot(row(x, i), row(y, p), x.d, std::fabs(x.scale[i]), std::fabs(y.scale[p]));
      term.row.point[i] = A((s * x.inverse[i] * y.inverse[p] - term.margin) / term.tau());
    }
  });
  Sums all;
  for (int64_t j = 0; !term.both && j < term.m; ++j)  // every row reads every centroid
    if (std::isnan(y.inverse[j])) all.broken = 1;
  for (int64_t i = 0; i < term.n; ++i) {
    const bool there = term.there(i);
    term.pull[i] = 0;
    const A positive = term.row.point[i];
    finish_direction(term, term.row, i, there, positive, &all);
    if (term.both) finish_direction(term, term.col, i, there, positive, &all);
    term.row.point[i] = term.point(positive);
    if (!there) continue;
    ++all.count;
    if (std::isnan(x.inverse[i]) || (term.both && std::isnan(y.inverse[i]))) all.broken = 1;
  }
  *sums = all;
  if (to.total) conclude_sums(sums, 1, term.tau(), term.factor, to);
}

template <typename A>
void conclude(void*, const Term<A>& term, const Sums* sums, int64_t ranks,
              const Conclusion<A>& to) {
  conclude_sums(sums, ranks, term.tau(), term.factor, to);
}

template <typename A>
void tile_gradient(void*, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                   const A* col_inverse, void* out, Type, int64_t ld_out, double* by_row,
                   double* d_temperature) {
  const TileColumns<A> of_tile(term, tile, col_inverse);
  A top = lowest<A>(), bottom = -lowest<A>();
  const auto spread = [&](const Axis<A>& axis, int64_t begin, int64_t size) {
    for (int64_t i = begin; i < begin + size; ++i) {
      const A sum = axis.top[i] + axis.rest[i];
      if (sum == -lowest<A>()) continue;
      top = std::max(top, sum), bottom = std::min(bottom, sum);
    }
  };
  std::vector<A> col_factor;
  // RINCE's gradients may be as large as exp(kLargestExponent).
  if (term.both && !term.sigmoid() && term.form.kind != Kind::kRince) {
    spread(term.row, tile.row0, tile.rows);
    spread(term.col, tile.col0, tile.cols);
    if (top >= bottom && top - bottom <= 2 * kSpread) {
      col_factor.resize(tile.cols);
      for (int64_t j = 0; j < tile.cols; ++j)
        col_factor[j] = exp_shifted((top + bottom) / 2 - term.col.top[tile.col0 + j] -
                                    term.col.rest[tile.col0 + j]);
    }
  }
  at::parallel_for(0, tile.rows, kStrip, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, A>> mates;
    for (int64_t i = begin; i < end; ++i) {
      const double sum =
          row_gradient_of(term, tile, row_inverse, of_tile.columns, i, (top + bottom) / 2,
                          col_factor.empty() ? nullptr : col_factor.data(), by_row, mates,
                          static_cast<A*>(out) + i * ld_out);
      if (by_row) by_row[i] = sum;
    }
  });
  if (by_row) *d_temperature -= term.factor[0] * std::accumulate(by_row, by_row + tile.rows, 0.0);
}

template <typename A>
void add_gradients(void*, const Term<A>& term, const GradientRows<A>* sides, int count,
                   bool normalize, const A* upstream) {
  for (const GradientRows<A>* side = sides; side < sides + count; ++side) {
    at::parallel_for(side->begin, side->end, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<A> g(side->own.d);
      for (int64_t i = begin; i < end; ++i) add_row(term, *side, i, normalize, upstream, g.data());
    });
  }
}

MCN_INSTANTIATE_KERNELS(float);
MCN_INSTANTIATE_KERNELS(double);

}  // namespace mcn::cpu
