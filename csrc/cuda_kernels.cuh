// The CUDA kernels, in the order in which a term of the loss needs them; cuda.cu launches them, and
// kernels.h says what each is for.
#pragma once

#include <cstdio>

#include "cuda_warps.cuh"
#include "formulas.h"
#include "kernels.h"

namespace mcn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ rows
__global__ void first_outside_kernel(const int64_t* labels, const bool* valid, int64_t n,
                                     int64_t k) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n || (valid && !valid[i]) || (labels[i] >= 0 && labels[i] < k)) return;
  printf("mcn_ext: labels[%lld] = %lld is outside [0, %lld)\n", static_cast<long long>(i),
         static_cast<long long>(labels[i]), static_cast<long long>(k));
  __trap();
}

template <typename A, typename T>
__global__ void __launch_bounds__(kThreads) measure_kernel(Rows<A> x, bool normalize) {
  const int64_t i = warp_row();
  if (i >= x.n) return;
  const T* row = static_cast<const T*>(x.data) + i * x.d;
  A top = 0;
  bool finite = true;
  for_lane(x.d, [&](int64_t k) {
    const A size = fabs(A(number(row[k])));
    finite = finite && size <= std::numeric_limits<A>::max();
    top = size > top ? size : top;
  });
  top = warp_max(top);
  finite = __all_sync(kAll, finite);
  const bool valid = !x.valid || x.valid[i];
  A scale = valid ? 1 : 0;
  A inverse = !valid ? A(0) : finite ? A(1) : std::numeric_limits<A>::quiet_NaN();
  if (normalize && valid && finite) {
    const double unit = power_below_one(top);  // squares of 1e-30 or 1e30 would be lost
    double sum = 0;
    for_lane(x.d, [&](int64_t k) {
      const double value = double(number(row[k])) * unit;
      sum += value * value;
    });
    const double norm = sqrt(warp_sum(sum)) / unit, power = power_below_one(norm);
    const bool alive = norm > kEps;
    scale = A(alive ? power : -power);
    inverse = norm == 0 ? A(0) : A(1.0 / ((alive ? norm : kEps) * power));
  }
  if (threadIdx.x % kWarp == 0) x.scale[i] = scale, x.inverse[i] = inverse;
}

template <typename A, typename T>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(Rows<A> x, int64_t begin, int64_t end, T* out) {
  const int64_t i = begin + warp_row();
  if (i >= end) return;
  const T* row = static_cast<const T*>(x.data) + i * x.d;
  const A scale = fabs(x.scale[i]);
  T* copy = out + (i - begin) * x.d;
  for_lane(x.d, [&](int64_t k) {
    copy[k] = rounded<T>(scale == A(0) ? A(0) : A(number(row[k])) * scale);
  });
}

// ------------------------------------------------------------------------------------ statistics
// A row's factor, and whether it takes part.
template <typename A>
struct Row {
  A scale;
  int32_t key;
};
template <typename A>
__device__ __forceinline__ A logit(const Row<A>& row, A s, A col_inverse, int32_t col_key) {
  const bool skip = col_key == row.key || col_key < 0 || row.key < 0;
  return skip ? lowest<A>() : s * row.scale * col_inverse;
}

// A lane's columns of a block: their keys and inverse norms, -1 and 0 beyond the tile.
template <typename A>
__device__ __forceinline__ void load_columns(const Term<A>& term, const Tile<A>& tile,
                                             const A* col_inverse, int64_t first, int32_t* col_key,
                                             A* col_scale) {
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const int64_t j = first + c * kWarp;
    const bool there = j < tile.cols;
    col_key[c] = there ? term.col_key[tile.col0 + j] : -1;
    col_scale[c] = there ? col_inverse[tile.col0 + j] : A(0);
  }
}

// partial: maxima and sums of the rows, (column blocks, rows) each, then of the columns, (row
// blocks, cols) each.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    tile_statistics_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                           A* partial) {
  __shared__ A shared_max[kWarps][kBlockCols], shared_sum[kWarps][kBlockCols];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  const int64_t col_begin = static_cast<int64_t>(blockIdx.x) * kBlockCols;
  A z[kRows][kCols], col_scale[kCols], col_max[kCols];
  int32_t col_key[kCols];
  const A inverse_temperature = A(1) / term.temperature[0];
  load_columns(term, tile, col_inverse, col_begin + lane, col_key, col_scale);
#pragma unroll
  for (int c = 0; c < kCols; ++c) col_max[c] = lowest<A>();
  const int64_t row_partials = gridDim.x * tile.rows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r;
    const bool there = i < tile.rows;
    const Row<A> row{there ? row_inverse[tile.row0 + i] * inverse_temperature : A(0),
                     there ? term.row_key[tile.row0 + i] : -1};
    A top = lowest<A>();
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const int64_t j = col_begin + c * kWarp + lane;
      const A s = there && j < tile.cols ? tile.data[i * tile.ld + j] : A(0);
      z[r][c] = logit(row, s, col_scale[c], col_key[c]);
      top = z[r][c] > top ? z[r][c] : top;
      col_max[c] = z[r][c] > col_max[c] ? z[r][c] : col_max[c];
    }
    top = warp_max(top);
    const A shift = top == lowest<A>() ? A(0) : top;  // exp(-inf - -inf) would be NaN
    A sum = 0;
#pragma unroll
    for (int c = 0; c < kCols; ++c) sum += exp_shifted(z[r][c] - shift);
    sum = warp_sum(sum);
    if (there && lane == 0) {
      partial[blockIdx.x * tile.rows + i] = top;
      partial[row_partials + blockIdx.x * tile.rows + i] = sum;
    }
  }
  if (!term.both) return;
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const A shift = col_max[c] == lowest<A>() ? A(0) : col_max[c];
    A sum = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum += exp_shifted(z[r][c] - shift);
    shared_max[warp][c * kWarp + lane] = col_max[c];
    shared_sum[warp][c * kWarp + lane] = sum;
  }
  __syncthreads();
  const int64_t j = col_begin + threadIdx.x;
  if (threadIdx.x >= kBlockCols || j >= tile.cols) return;
  LogSum<A> total;
  for (int w = 0; w < kWarps; ++w)
    total.merge(shared_max[w][threadIdx.x], shared_sum[w][threadIdx.x]);
  A* columns = partial + 2 * row_partials;
  columns[blockIdx.y * tile.cols + j] = total.max;
  columns[(gridDim.y + blockIdx.y) * tile.cols + j] = total.sum;
}

// A lane per row or column, its parts dealt to the block's warps; all in fixed order. Rows, then
// columns.
template <typename A>
struct Parts {
  const A* partial;  // (2, count, size): maxima, sums
  int64_t count, size;
  A *max, *sum;
};
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(Parts<A> rows, Parts<A> cols, unsigned row_blocks) {
  __shared__ A shared_max[kWarps][kWarp], shared_sum[kWarps][kWarp];
  const bool columns = blockIdx.x >= row_blocks;
  const Parts<A>& parts = columns ? cols : rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x - (columns ? row_blocks : 0)) * kWarp + lane;
  LogSum<A> total;
#pragma unroll 1  // double would spill
  for (int64_t part = warp; part < parts.count && i < parts.size; part += kWarps)
    total.merge(parts.partial[part * parts.size + i],
                parts.partial[(parts.count + part) * parts.size + i]);
  shared_max[warp][lane] = total.max, shared_sum[warp][lane] = total.sum;
  __syncthreads();
  if (warp > 0 || i >= parts.size) return;
  LogSum<A> running{parts.max[i], parts.sum[i]};
  for (int w = 0; w < kWarps; ++w) running.merge(shared_max[w][lane], shared_sum[w][lane]);
  parts.max[i] = running.max, parts.sum[i] = running.sum;
}

// In double: a positive's logit is exact to fp32's last digit, which is all there is of a loss of
// 1e-9.
template <typename A, typename T>
__global__ void __launch_bounds__(kThreads)
    positive_kernel(Term<A> term, Rows<A> x, Rows<A> y, A* positive) {
  const int64_t i = warp_row();
  if (i >= term.n || term.row_key[i] < 0) return;
  const int64_t p = term.both ? i : term.row_key[i];
  const T *own = static_cast<const T*>(x.data) + i * x.d,
          *other = static_cast<const T*>(y.data) + p * x.d;
  const double own_scale = fabs(x.scale[i]), other_scale = fabs(y.scale[p]);
  double sum = 0;
  for_lane(x.d, [&](int64_t k) {
    sum += (number(own[k]) * own_scale) * (number(other[k]) * other_scale);
  });
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0)
    positive[i] = A((sum * x.inverse[i] * y.inverse[p] - term.margin) / term.temperature[0]);
}

template <typename A>
__global__ void __launch_bounds__(kOneBlock)
    finish_kernel(Term<A> term, const A* x_inverse, const A* y_inverse, const A* positive,
                  double* sums) {
  __shared__ double shared[kOneBlock / kWarp];
  double sum = 0, bound = 0, count = 0, broken = 0;
  for (int64_t j = threadIdx.x; j < term.m; j += blockDim.x) {
    const bool there = term.col_key[j] >= 0;
    if (there && isnan(y_inverse[j])) broken = 1;
    if (term.both && !there) term.col_top[j] = -lowest<A>();
  }
  for (int64_t i = threadIdx.x; i < term.n; i += blockDim.x) {
    A pull = 0;
    term.row_top[i] = -lowest<A>();
    if (term.row_key[i] >= 0) {
      count += 1;
      if (isnan(x_inverse[i])) broken = 1;
      const auto add = [&](A max, A total, A* top, A* rest) {
        const Direction<A> row(max, total, positive[i]);
        sum += row.loss;
        pull += row.pull;
        *top = row.top, *rest = row.rest;
        const double largest = exp(max - row.top - row.rest);
        bound = largest > bound ? largest : bound;
      };
      add(term.row_max[i], term.row_sum[i], term.row_top + i, term.row_rest + i);
      if (term.both) add(term.col_max[i], term.col_sum[i], term.col_top + i, term.col_rest + i);
    }
    term.pull[i] = pull;
  }
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  sum = block_reduce(sum, shared, add);
  count = block_reduce(count, shared, add);
  bound = block_reduce(bound, shared, larger);
  broken = block_reduce(broken, shared, larger);
  if (threadIdx.x == 0) sums[0] = sum, sums[1] = count, sums[2] = bound, sums[3] = broken;
}

template <typename A>
__global__ void conclude_kernel(Term<A> term, const double* sums, int64_t ranks, double weight,
                                double report, int slot, A* losses) {
  conclude_sums(sums, ranks, double(term.temperature[0]), weight, report, term.factor,
                losses + slot, losses);
}

// ------------------------------------------------------------------------------------- gradients
template <typename A, typename P>
__global__ void __launch_bounds__(kThreads, 2)
    tile_gradient_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                         P* out, int64_t ld_out) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  const int64_t col_begin = static_cast<int64_t>(blockIdx.x) * kBlockCols;
  const A inverse_temperature = A(1) / term.temperature[0], boost = term.factor[1];
  A col_scale[kCols], col_top[kCols], col_rest[kCols];
  int32_t col_key[kCols];
  load_columns(term, tile, col_inverse, col_begin + lane, col_key, col_scale);
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const int64_t j = col_begin + c * kWarp + lane;
    const bool there = j < tile.cols && term.both;
    col_top[c] = there ? term.col_top[tile.col0 + j] : -lowest<A>();
    col_rest[c] = there ? term.col_rest[tile.col0 + j] : A(0);
  }
#pragma unroll 1  // 4 loads in flight a thread are enough, and double would spill
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r;
    if (i >= tile.rows) break;
    const A inverse = row_inverse[tile.row0 + i];
    const A row_top = term.row_top[tile.row0 + i], row_rest = term.row_rest[tile.row0 + i];
    const Row<A> row{inverse * inverse_temperature, term.row_key[tile.row0 + i]};
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const int64_t j = col_begin + c * kWarp + lane;
      if (j >= tile.cols) continue;
      const A z = logit(row, tile.data[i * tile.ld + j], col_scale[c], col_key[c]);
      // A row that is not there has top +inf, a logit left out is -inf: their difference is -inf,
      // never NaN.
      A p = exp_shifted(z - row_top - row_rest);
      if (term.both) p += exp_shifted(z - col_top[c] - col_rest[c]);
      out[i * ld_out + j] = rounded<P>(p * (boost * inverse * col_scale[c]));
    }
  }
}

template <typename A, typename T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(Term<A> term, Rows<A> own, Rows<A> other, int64_t begin, int64_t end,
                      const A* sums, A* total, bool add, A* dots) {
  const int64_t i = begin + warp_row();
  if (i >= end) return;
  const A factor = term.factor[0], unboost = A(1) / term.factor[1];
  const A* sum = sums + (i - begin) * own.d;
  A* g = total + (i - begin) * own.d;
  const bool there = term.row_key[i] >= 0;  // other rows may hold anything
  const int64_t p = term.both ? i : there ? term.row_key[i] : 0;
  const A pull =
      there ? term.pull[i] * own.inverse[i] * other.inverse[p] * A(fabs(other.scale[p])) : A(0);
  const T *w = static_cast<const T*>(own.data) + i * own.d,
          *partner = static_cast<const T*>(other.data) + p * own.d;
  double product = 0;
  for_lane(own.d, [&](int64_t k) {
    const A value = there ? sum[k] * unboost - pull * A(number(partner[k])) : A(0);
    if (dots && there) product += double(value) * double(number(w[k]));
    g[k] = (add ? g[k] : A(0)) + factor * value;
  });
  if (!dots) return;
  product = warp_sum(product) * fabs(double(own.scale[i]));
  if (threadIdx.x % kWarp == 0) dots[i] = A(product);
}

template <typename A>
__global__ void __launch_bounds__(kOneBlock)
    temperature_kernel(Term<A> term, const A* dots, A* d_temperature) {
  __shared__ double shared[kOneBlock / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < term.n; i += blockDim.x)
    sum += dots[i] + term.margin * term.pull[i];
  sum = block_reduce(sum, shared, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *d_temperature -= A(term.factor[0] * sum / term.temperature[0]);
}

template <typename A, typename T, typename O>
__global__ void __launch_bounds__(kThreads)
    project_kernel(Rows<A> x, bool normalize, int64_t begin, int64_t end, const A* total,
                   const A* upstream, O* out) {
  const int64_t i = begin + warp_row();
  if (i >= end) return;
  const A *g = total + (i - begin) * x.d, up = upstream ? *upstream : A(1), scale = x.scale[i];
  const T* row = static_cast<const T*>(x.data) + i * x.d;
  O* result = out + (i - begin) * x.d;
  const bool alive = !normalize || scale > A(0);
  double along = 0;
  if (normalize && alive) {
    const double unit = double(scale) * x.inverse[i];
    for_lane(x.d, [&](int64_t k) { along += double(g[k]) * (double(number(row[k])) * unit); });
    along = warp_sum(along) * unit;
  }
  const A back = A(along);
  for_lane(x.d, [&](int64_t k) {  // the elements that this lane has read: total and out may be one
    const A value = !normalize ? up * g[k]
                    : alive    ? up * (scale * (g[k] - back * A(number(row[k]))))
                               : A(0);
    result[k] = rounded<O>(value);
  });
}

}  // namespace
}  // namespace mcn::cuda
