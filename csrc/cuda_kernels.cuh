// The CUDA kernels, in the order in which a term of the loss needs them; cuda.cu launches them, and
// kernels.h says what each is for. W is how many neighbours a lane loads at once: 16 bytes, or 1.
#pragma once

#include <cstdio>

#include "formulas.h"
#include "kernels.h"

#include "cuda_warps.cuh"

namespace mcn::cuda {
namespace {

// ------------------------------------------------------------------------------------------ rows
template <typename A>
struct Sides {
  Rows<A> side[kSides];
};

// Chosen by comparison: an index that is known at run time only would put all sides into memory.
template <typename V, int count>
__device__ __forceinline__ V chosen(const V (&values)[count]) {
  V value = values[0];
#pragma unroll
  for (unsigned i = 1; i < count; ++i)
    if (blockIdx.y == i) value = values[i];
  return value;
}

template <typename A, typename T, int W>
__device__ __forceinline__ void write_work(const Rows<A>& x, int64_t i, A scale, T* out) {
  const T* row = static_cast<const T*>(x.data) + i * x.d;
  for_lane<W>(x.d, [&](int64_t k) {
    const auto from = load<W>(row + k);
    Pack<T, W> to;
#pragma unroll
    for (int c = 0; c < W; ++c)  // a row that is not there may hold NaN, and 0 * NaN is NaN
      to.value[c] = rounded<T>(scale == A(0) ? A(0) : A(number(from.value[c])) * scale);
    store(out + k, to);
  });
}

// A side for each blockIdx.y, a warp for each row.
template <typename A, typename T, int W>
__global__ void __launch_bounds__(kThreads) measure_kernel(Sides<A> sides, bool normalize) {
  const Rows<A> x = chosen(sides.side);
  const int64_t i = warp_row();
  if (i >= x.n) return;
  const T* row = static_cast<const T*>(x.data) + i * x.d;
  A top = 0;
  bool finite = true;
  for_lane<W>(x.d, [&](int64_t k) {
    const auto from = load<W>(row + k);
#pragma unroll
    for (int c = 0; c < W; ++c) {
      const A size = fabs(A(number(from.value[c])));
      finite = finite && size <= std::numeric_limits<A>::max();
      top = size > top ? size : top;
    }
  });
  top = warp_max(top);
  finite = __all_sync(kAll, finite);
  const bool valid = !x.valid || x.valid[i];
  A scale = valid ? 1 : 0;
  A inverse = !valid ? A(0) : finite ? A(1) : std::numeric_limits<A>::quiet_NaN();
  if (normalize && valid && finite) {
    const double unit = power_below_one(top);  // squares of 1e-30 or 1e30 would be lost
    double sum = 0;
    for_lane<W>(x.d, [&](int64_t k) {
      const auto from = load<W>(row + k);
#pragma unroll
      for (int c = 0; c < W; ++c) {
        const double value = double(number(from.value[c])) * unit;
        sum += value * value;
      }
    });
    const double norm = sqrt(warp_sum(sum)) / unit, power = power_below_one(norm);
    const bool alive = norm > kEps;
    scale = A(alive ? power : -power);
    inverse = norm == 0 ? A(0) : A(1.0 / ((alive ? norm : kEps) * power));
  }
  if (threadIdx.x % kWarp == 0) x.scale[i] = scale, x.inverse[i] = inverse;
  if (x.work) write_work<A, T, W>(x, i, A(fabs(scale)), static_cast<T*>(x.work) + i * x.d);
}

template <typename A, typename T, int W>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(Rows<A> x, int64_t begin, int64_t end, T* out) {
  const int64_t i = begin + warp_row();
  if (i < end) write_work<A, T, W>(x, i, A(fabs(x.scale[i])), out + (i - begin) * x.d);
}

// ------------------------------------------------------------------------------------ statistics
// A lane's four neighbouring columns of a block of a tile.
template <typename A>
struct Columns {
  int64_t j;           // the first
  int32_t key[kCols];  // -1 beyond the tile
  A scale[kCols];      // inverse norms; 0 beyond the tile
  bool wide;           // of all lanes: no column is beyond the tile, and rows can be read 4 at a time

  __device__ __forceinline__ Columns(const Term<A>& term, const Tile<A>& tile, const A* inverse,
                                     bool aligned) {
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlockCols;
    j = begin + threadIdx.x % kWarp * kCols;
    wide = aligned && begin + kBlockCols <= tile.cols;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const bool there = j + c < tile.cols;
      key[c] = there ? term.col_key(tile.col0 + j + c) : -1;
      scale[c] = there ? inverse[tile.col0 + j + c] : A(0);
    }
  }
  __device__ __forceinline__ Pack<A, kCols> row(const Tile<A>& tile, int64_t i) const {
    const A* from = tile.data + i * tile.ld + j;
    if (wide) return load<kCols>(from);
    Pack<A, kCols> s;
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.value[c] = j + c < tile.cols ? from[c] : A(0);
    return s;
  }
};

// Whether this block holds no logit that is to be left out: keys are all different and there, and
// no row meets its own column. Most blocks of most losses; they compare no keys.
template <typename A>
__device__ __forceinline__ bool all_negatives(const Term<A>& term, const Tile<A>& tile) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kBlockRows;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kBlockCols;
  if (term.ids || term.labels || term.valid || term.partner_valid) return false;
  if (row + kBlockRows > tile.rows || col + kBlockCols > tile.cols) return false;
  const int64_t own = term.first + tile.row0 + row - tile.col0 - col;  // the first row's column
  return own + kBlockRows <= 0 || own >= kBlockCols;
}

template <bool kNegatives, typename A>
__device__ __forceinline__ A logit(A s, A row_scale, A col_scale, int32_t row_key,
                                   int32_t col_key) {
  if (!kNegatives && (col_key == row_key || col_key < 0 || row_key < 0)) return lowest<A>();
  return s * row_scale * col_scale;
}

// partial: maxima and sums of the rows, (column blocks, rows) each, then of the columns, (row
// blocks, cols) each.
template <bool kNegatives, typename A>
__device__ __forceinline__ void block_statistics(const Term<A>& term, const Tile<A>& tile,
                                                 const A* row_inverse, const Columns<A>& columns,
                                                 A* partial) {
  __shared__ A shared_max[kWarps][kBlockCols], shared_sum[kWarps][kBlockCols];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  A z[kRows][kCols], col_max[kCols];
  const A inverse_temperature = A(1) / term.tau();
#pragma unroll
  for (int c = 0; c < kCols; ++c) col_max[c] = lowest<A>();
  const int64_t row_partials = gridDim.x * tile.rows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r;
    const bool there = kNegatives || i < tile.rows;
    const A scale = there ? row_inverse[tile.row0 + i] * inverse_temperature : A(0);
    const int32_t key = kNegatives || !there ? -1 : term.row_key(tile.row0 + i);
    const auto s = there ? columns.row(tile, i) : Pack<A, kCols>{};
    A top = lowest<A>();
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      z[r][c] = logit<kNegatives>(s.value[c], scale, columns.scale[c], key, columns.key[c]);
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
  Pack<A, kCols> maxima, sums;
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const A shift = col_max[c] == lowest<A>() ? A(0) : col_max[c];
    maxima.value[c] = col_max[c], sums.value[c] = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums.value[c] += exp_shifted(z[r][c] - shift);
  }
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    shared_max[warp][lane * kCols + c] = maxima.value[c];
    shared_sum[warp][lane * kCols + c] = sums.value[c];
  }
  __syncthreads();  // every warp's eight rows of the block's columns are there
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kBlockCols + threadIdx.x;
  if (threadIdx.x >= kBlockCols || j >= tile.cols) return;
  LogSum<A> total;
  for (int w = 0; w < kWarps; ++w)
    total.merge(shared_max[w][threadIdx.x], shared_sum[w][threadIdx.x]);
  A* of_columns = partial + 2 * row_partials;
  of_columns[blockIdx.y * tile.cols + j] = total.max;
  of_columns[(gridDim.y + blockIdx.y) * tile.cols + j] = total.sum;
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    tile_statistics_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                           bool aligned, A* partial) {
  const Columns<A> columns(term, tile, col_inverse, aligned);
  if (all_negatives(term, tile))
    block_statistics<true>(term, tile, row_inverse, columns, partial);
  else
    block_statistics<false>(term, tile, row_inverse, columns, partial);
}

// A lane per row or column, its parts dealt to the block's warps; all in fixed order. Rows, then
// columns.
template <typename A>
struct Parts {
  const A* partial;  // (2, count, size): maxima, sums
  int64_t count, size;
  A *max, *sum;
  bool first;  // nothing is there yet to merge with
};
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(Parts<A> rows, Parts<A> cols, unsigned row_blocks) {
  __shared__ A shared_max[kWarps][kWarp], shared_sum[kWarps][kWarp];
  const bool columns = blockIdx.x >= row_blocks;
  const Parts<A> parts = columns ? cols : rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x - (columns ? row_blocks : 0)) * kWarp + lane;
  LogSum<A> total;
#pragma unroll 1  // double would spill
  for (int64_t part = warp; part < parts.count && i < parts.size; part += kWarps)
    total.merge(parts.partial[part * parts.size + i],
                parts.partial[(parts.count + part) * parts.size + i]);
  shared_max[warp][lane] = total.max, shared_sum[warp][lane] = total.sum;
  __syncthreads();  // every warp's share of the parts is there
  if (warp > 0 || i >= parts.size) return;
  LogSum<A> running;
  if (!parts.first) running = {parts.max[i], parts.sum[i]};
  for (int w = 0; w < kWarps; ++w) running.merge(shared_max[w][lane], shared_sum[w][lane]);
  parts.max[i] = running.max, parts.sum[i] = running.sum;
}

// The dot product of two working rows of one warp. In double: a positive's logit is exact to fp32's
// last digit, which is all there is of a loss of 1e-9.
template <typename A, typename T, int W>
__device__ __forceinline__ double dot(const Rows<A>& x, int64_t i, const Rows<A>& y, int64_t p) {
  const T *own = static_cast<const T*>(x.data) + i * x.d,
          *other = static_cast<const T*>(y.data) + p * x.d;
  const double own_scale = fabs(x.scale[i]), other_scale = fabs(y.scale[p]);
  double sum = 0;
  for_lane<W>(x.d, [&](int64_t k) {
    const auto a = load<W>(own + k), b = load<W>(other + k);
#pragma unroll
    for (int c = 0; c < W; ++c)
      sum += (number(a.value[c]) * own_scale) * (number(b.value[c]) * other_scale);
  });
  return warp_sum(sum);
}

// A row's statistics become what its gradient needs; a warp's lanes all do the same.
template <typename A>
__device__ __forceinline__ void finish_row(const Term<A>& term, int64_t i, A positive, bool there,
                                           bool broken, Sums* sums) {
  const bool writes = threadIdx.x % kWarp == 0;
  A pull = 0;
  const auto direction = [&](const A* max, const A* sum, A* top, A* rest) {
    if (!there) {
      if (writes) top[i] = -lowest<A>(), rest[i] = 0;
      return;
    }
    const Direction<A> row(max[i], sum[i], positive);
    pull += row.pull;
    if (!writes) return;
    top[i] = row.top, rest[i] = row.rest;
    sums->loss += row.loss;
    const double largest = exp(double(max[i] - row.top - row.rest));
    sums->bound = largest > sums->bound ? largest : sums->bound;
  };
  direction(term.row_max, term.row_sum, term.row_top, term.row_rest);
  if (term.both) direction(term.col_max, term.col_sum, term.col_top, term.col_rest);
  if (!writes) return;
  term.positive[i] = positive, term.pull[i] = pull;
  if (there) sums->count += 1, sums->broken = broken ? 1 : sums->broken;
}

// Rows are dealt to the warps, and each block's sums are left in memory; the block that is the last
// to be done (it draws the last ticket) adds them up, in the order of blocks, and concludes.
template <typename A, typename T, int W>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Term<A> term, Rows<A> x, Rows<A> y, double* sums_of_blocks, double* sums,
                  unsigned* ticket, Conclusion<A> to) {
  __shared__ double shared[kWarps];
  __shared__ bool last;
  Sums own;
  for (int64_t i = warp_row(); i < term.n; i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const bool there = term.there(i);
    const int64_t p = term.both ? i : there ? term.labels[i] : 0;
    if (there && (p < 0 || p >= (term.both ? term.n : term.m))) {
      printf("mcn_ext: labels[%lld] = %lld is outside [0, %lld)\n", static_cast<long long>(i),
             static_cast<long long>(p), static_cast<long long>(term.m));
      __trap();
    }
    A positive = 0;
    bool broken = false;
    if (there) {
      const double s = dot<A, T, W>(x, i, y, p) * x.inverse[i] * y.inverse[p];
      positive = A((s - term.margin) / term.tau());
      broken = isnan(x.inverse[i]) || isnan(y.inverse[p]);
    }
    finish_row(term, i, positive, there, broken, &own);
  }
  if (term.labels)  // every row reads every centroid
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j < term.m;
         j += static_cast<int64_t>(gridDim.x) * blockDim.x)
      if (isnan(y.inverse[j])) own.broken = 1;
  const Sums block = block_sums(own, shared);
  if (threadIdx.x == 0) {
    double* mine = sums_of_blocks + kSums * blockIdx.x;
    mine[0] = block.loss, mine[1] = block.count, mine[2] = block.bound, mine[3] = block.broken;
    __threadfence();  // the sums before the ticket, for whoever draws the last one
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();  // thread 0 knows whether this is the last block
  if (!last) return;
  __threadfence();
  Sums dealt;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    const volatile double* s = sums_of_blocks + kSums * b;
    dealt.loss += s[0], dealt.count += s[1];
    dealt.bound = s[2] > dealt.bound ? s[2] : dealt.bound;
    dealt.broken = s[3] > dealt.broken ? s[3] : dealt.broken;
  }
  const Sums all = block_sums(dealt, shared);
  if (threadIdx.x != 0) return;
  *ticket = 0;
  sums[0] = all.loss, sums[1] = all.count, sums[2] = all.bound, sums[3] = all.broken;
  if (to.total) conclude_sums(sums, 1, double(term.tau()), term.factor, to);
}

template <typename A>
__global__ void conclude_kernel(Term<A> term, const double* sums, int64_t ranks, Conclusion<A> to) {
  conclude_sums(sums, ranks, double(term.tau()), term.factor, to);
}

// ------------------------------------------------------------------------------------- gradients
template <bool kNegatives, bool kTemperature, typename A, typename P>
__device__ __forceinline__ void block_gradient(const Term<A>& term, const Tile<A>& tile,
                                               const A* row_inverse, const Columns<A>& columns,
                                               bool aligned, P* out, int64_t ld_out,
                                               double* by_block) {
  const int warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  const A inverse_temperature = A(1) / term.tau(), boost = term.factor[1];
  A col_top[kCols], col_rest[kCols], col_positive[kCols], sum = 0;
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const int64_t j = tile.col0 + columns.j + c;
    const bool there = columns.j + c < tile.cols && term.both;
    col_top[c] = there ? term.col_top[j] : -lowest<A>();
    col_rest[c] = there ? term.col_rest[j] : A(0);
    col_positive[c] = there && kTemperature ? term.col_positive[j] : A(0);
  }
#pragma unroll 1  // 4 loads in flight a thread are enough, and double would spill
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r, row = tile.row0 + i;
    if (i >= tile.rows) break;
    const A inverse = row_inverse[row], row_top = term.row_top[row], row_rest = term.row_rest[row];
    const int32_t key = kNegatives ? -1 : term.row_key(row);
    const auto s = columns.row(tile, i);
    Pack<P, kCols> p;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const A z = logit<kNegatives>(s.value[c], A(inverse * inverse_temperature),
                                    columns.scale[c], key, columns.key[c]);
      // A row that is not there has top +inf, a logit left out is -inf: their difference is -inf,
      // never NaN.
      const A of_row = exp_shifted(z - row_top - row_rest);
      const A of_col = term.both ? exp_shifted(z - col_top[c] - col_rest[c]) : A(0);
      p.value[c] = rounded<P>((of_row + of_col) * boost * (inverse * columns.scale[c]));
      if (kTemperature) {  // 0 * inf would be NaN
        if (of_row > 0) sum += of_row * (z - term.positive[row]);
        if (of_col > 0) sum += of_col * (z - col_positive[c]);
      }
    }
    P* to = out + i * ld_out + columns.j;
    if (columns.wide && aligned) {
      store_at_once(to, p);
    } else {
#pragma unroll
      for (int c = 0; c < kCols; ++c)
        if (columns.j + c < tile.cols) to[c] = p.value[c];
    }
  }
  if (!kTemperature) return;
  __shared__ double shared[kWarps];
  const double all = block_reduce(sum, shared, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) by_block[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = all;
}

template <bool kTemperature, typename A, typename P>
__global__ void __launch_bounds__(kThreads, 2)
    tile_gradient_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                         bool aligned, P* out, int64_t ld_out, bool out_aligned, double* by_block) {
  const Columns<A> columns(term, tile, col_inverse, aligned);
  if (all_negatives(term, tile))
    block_gradient<true, kTemperature>(term, tile, row_inverse, columns, out_aligned, out, ld_out,
                                       by_block);
  else
    block_gradient<false, kTemperature>(term, tile, row_inverse, columns, out_aligned, out, ld_out,
                                        by_block);
}

// One block: the tile's blocks in order.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    temperature_kernel(Term<A> term, const double* by_block, int64_t blocks,
                       double* d_temperature) {
  __shared__ double shared[kWarps];
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) sum += by_block[b];
  sum = block_reduce(sum, shared, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *d_temperature -= term.factor[0] * sum;
}

template <typename A>
struct Gradients {
  GradientRows<A> side[kGradientSides];
};
// A side for each blockIdx.y, a warp for each row. The gradient is computed once for its part along
// the row, which normalising takes out, and again for the result: rather than kept in between.
template <typename A, typename T, int W>
__global__ void __launch_bounds__(kThreads)
    add_gradients_kernel(Term<A> term, Gradients<A> sides, bool normalize, const A* upstream) {
  const GradientRows<A> side = chosen(sides.side);
  const Rows<A>& x = side.own;
  const int64_t i = side.begin + warp_row(), at = (i - side.begin) * x.d;
  if (i >= side.end) return;
  const A factor = term.factor[0], unboost = A(1) / term.factor[1];
  const bool there = term.row_top[i] != -lowest<A>();  // other rows' sums may hold anything
  const int64_t p = term.both || !there ? i : term.labels[i];
  const A pull = there ? term.pull[i] * x.inverse[i] * side.other.inverse[p] *
                             A(fabs(side.other.scale[p]))
                       : A(0);
  const T *row = static_cast<const T*>(x.data) + i * x.d,
          *partner = static_cast<const T*>(side.other.data) + (there ? p * x.d : 0);
  const auto gradient = [&](int64_t k) {
    Pack<A, W> g{}, before{};
    if (there) g = load<W>(side.sums + at + k);
    if (side.add) before = load<W>(side.total + at + k);
    const auto positive = there ? load<W>(partner + k) : Pack<T, W>{};
#pragma unroll
    for (int c = 0; c < W; ++c)
      g.value[c] = before.value[c] +
                   factor * (g.value[c] * unboost - pull * A(number(positive.value[c])));
    return g;
  };
  if (!side.out) return for_lane<W>(x.d, [&](int64_t k) {
      const auto g = gradient(k);  // before it is overwritten: sums may be total
      store(side.total + at + k, g);
    });
  const A up = *upstream, scale = x.scale[i];
  const bool alive = !normalize || scale > A(0);
  double along = 0;
  if (normalize && alive) {
    const double unit = double(scale) * x.inverse[i];
    for_lane<W>(x.d, [&](int64_t k) {
      const auto g = gradient(k);
      const auto own = load<W>(row + k);
#pragma unroll
      for (int c = 0; c < W; ++c)
        along += double(g.value[c]) * (double(number(own.value[c])) * unit);
    });
    along = warp_sum(along) * unit;
  }
  const A back = A(along);
  T* out = static_cast<T*>(side.out) + at;
  for_lane<W>(x.d, [&](int64_t k) {  // the elements that this lane has read: out may be sums
    const auto g = gradient(k);
    const auto own = load<W>(row + k);
    Pack<T, W> result;
#pragma unroll
    for (int c = 0; c < W; ++c)
      result.value[c] = rounded<T>(
          !normalize ? up * g.value[c]
          : alive    ? up * (scale * (g.value[c] - back * A(number(own.value[c]))))
                     : A(0));
    store(out + k, result);
  });
}

}  // namespace
}  // namespace mcn::cuda
