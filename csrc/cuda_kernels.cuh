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
  int64_t j;                       // the first
  int32_t key[kCols], bag[kCols];  // key: -1 beyond the tile
  A scale[kCols];                  // inverse norms; 0 beyond the tile
  bool wide;  // of all lanes: no column is beyond the tile, and rows can be read 4 at a time

  __device__ __forceinline__ Columns(const Term<A>& term, const Tile<A>& tile, const A* inverse,
                                     bool aligned) {
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlockCols;
    j = begin + threadIdx.x % kWarp * kCols;
    wide = aligned && begin + kBlockCols <= tile.cols;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const bool there = j + c < tile.cols;
      key[c] = there ? term.col_key(tile.col0 + j + c) : -1;
      bag[c] = there ? term.col_bag(tile.col0 + j + c) : -1;
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
  if (term.ids || term.bags || term.labels || term.valid) return false;
  if (row + kBlockRows > tile.rows || col + kBlockCols > tile.cols) return false;
  const int64_t own = term.first + tile.row0 + row - tile.col0 - col;  // the first row's column
  return own + kBlockRows <= 0 || own >= kBlockCols;
}

// How a term's logits are summed: their exponentials, those of positives apart, or elements of the
// sigmoid loss.
enum class Summed { kExp, kTwoExp, kElements };
template <typename A>
Summed summed(const Term<A>& term) {
  return !term.two_sums() ? Summed::kExp : term.sigmoid() ? Summed::kElements : Summed::kTwoExp;
}

// A logit: of each other's negatives, else -inf; `near`, of each other's positives, else -inf.
template <typename A>
struct Logit {
  A z, near;
  __device__ __forceinline__ bool mate() const { return near != lowest<A>(); }  // a NaN is one, too
};
template <bool kNegatives, Summed kSummed, typename A>
__device__ __forceinline__ Logit<A> logit(A s, A row_scale, A margin, int32_t row_key,
                                          int32_t row_bag, const Columns<A>& columns, int c) {
  const A z = s * row_scale * columns.scale[c];
  if (kNegatives) return {z, lowest<A>()};
  const int32_t key = columns.key[c];
  if (key == row_key || key < 0 || row_key < 0) return {lowest<A>(), lowest<A>()};
  if (kSummed == Summed::kExp || columns.bag[c] != row_bag) return {z, lowest<A>()};
  return {lowest<A>(), z - margin};
}

// Of the sigmoid loss; a positive's slope is negative.
template <typename A>
__device__ __forceinline__ Element<A> element(const Logit<A>& logit, A bias) {
  const A x = logit.mate() ? -logit.near - bias : logit.z + bias;
  Element<A> found(x, exp_shifted(x > A(0) ? -x : x));
  if (logit.mate()) found.slope = -found.slope;
  return found;
}

// The block's columns: each warp's sums over its rows become the block's, in `partial`
// (2, row blocks, cols).
template <typename A>
__device__ __forceinline__ void merge_warps(const Tile<A>& tile, const LogSum<A> (&sums)[kCols],
                                            A* partial) {
  __shared__ A shared_max[kWarps][kBlockCols], shared_sum[kWarps][kBlockCols];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // the sums of the call before have been read
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    shared_max[warp][lane * kCols + c] = sums[c].max;
    shared_sum[warp][lane * kCols + c] = sums[c].sum;
  }
  __syncthreads();  // every warp's eight rows of the block's columns are there
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kBlockCols + threadIdx.x;
  if (threadIdx.x >= kBlockCols || j >= tile.cols) return;
  LogSum<A> total;
  for (int w = 0; w < kWarps; ++w)
    total.merge(shared_max[w][threadIdx.x], shared_sum[w][threadIdx.x]);
  partial[blockIdx.y * tile.cols + j] = total.max;
  partial[(gridDim.y + blockIdx.y) * tile.cols + j] = total.sum;
}

// partial: maxima and sums of the rows, (column blocks, rows) each, then of the columns, (row
// blocks, cols) each; if there are two sums, the same again, for the second.
template <bool kNegatives, Summed kSummed, typename A>
__device__ __forceinline__ void block_statistics(const Term<A>& term, const Tile<A>& tile,
                                                 const A* row_inverse, const Columns<A>& columns,
                                                 A* partial) {
  constexpr bool kTwo = kSummed != Summed::kExp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  A z[kRows][kCols], col_max[kCols];
  LogSum<A> cols[kCols], near_cols[kCols];
  const A inverse_temperature = A(1) / term.tau(), bias = kTwo ? term.bias() : A(0);
  const A margin = kTwo ? A(term.margin) * inverse_temperature : A(0);
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    col_max[c] = lowest<A>();
    if (kSummed == Summed::kElements) cols[c] = near_cols[c] = {A(0), A(0)};
  }
  const int64_t row_partials = gridDim.x * tile.rows, col_partials = gridDim.y * tile.cols;
  A* near_partial = partial + 2 * (row_partials + col_partials);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r;
    const bool there = kNegatives || i < tile.rows;
    const A scale = there ? row_inverse[tile.row0 + i] * inverse_temperature : A(0);
    const int32_t key = kNegatives || !there ? -1 : term.row_key(tile.row0 + i);
    const int32_t bag = !kTwo || kNegatives || !there ? -2 : term.row_bag(tile.row0 + i);
    const auto s = there ? columns.row(tile, i) : Pack<A, kCols>{};
    A top = lowest<A>(), sum = 0, near_top = lowest<A>(), near_sum = 0, near[kCols];
    bool mates = false;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      auto found = logit<kNegatives, kSummed>(s.value[c], scale, margin, key, bag, columns, c);
      if (!there) found.z = lowest<A>();
      z[r][c] = found.z, near[c] = found.near, mates |= found.mate();
      if (kSummed == Summed::kElements) {
        const auto e = element(found, bias);
        sum += e.loss, near_sum += e.slope;
        cols[c].sum += e.loss, near_cols[c].sum += e.slope;
      } else {
        top = z[r][c] > top ? z[r][c] : top;
        col_max[c] = z[r][c] > col_max[c] ? z[r][c] : col_max[c];
        near_top = near[c] > near_top ? near[c] : near_top;
      }
    }
    if (kSummed == Summed::kElements) {
      top = near_top = 0, near_sum = warp_sum(near_sum);
    } else {
      top = warp_max(top);
      const A shift = top == lowest<A>() ? A(0) : top;  // exp(-inf - -inf) would be NaN
#pragma unroll
      for (int c = 0; c < kCols; ++c) sum += exp_shifted(z[r][c] - shift);
      // Few rows of few blocks hold positives.
      if (kTwo && !__all_sync(kAll, !mates)) {
        near_top = warp_max(near_top);
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          near_sum += exp_shifted(near[c] - near_top);
          if (near[c] != lowest<A>()) near_cols[c].merge(near[c], 1);
        }
        near_sum = warp_sum(near_sum);
      }
    }
    sum = warp_sum(sum);
    if (there && lane == 0) {
      partial[blockIdx.x * tile.rows + i] = top;
      partial[row_partials + blockIdx.x * tile.rows + i] = sum;
      if (kTwo) {
        near_partial[blockIdx.x * tile.rows + i] = near_top;
        near_partial[row_partials + blockIdx.x * tile.rows + i] = near_sum;
      }
    }
  }
  if (!term.both) return;
  if (kSummed != Summed::kElements) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const A shift = col_max[c] == lowest<A>() ? A(0) : col_max[c];
      cols[c] = {col_max[c], A(0)};
#pragma unroll
      for (int r = 0; r < kRows; ++r) cols[c].sum += exp_shifted(z[r][c] - shift);
    }
  }
  merge_warps(tile, cols, partial + 2 * row_partials);
  if (kTwo) merge_warps(tile, near_cols, near_partial + 2 * row_partials);
}

template <Summed kSummed, typename A>
__global__ void __launch_bounds__(kThreads)
    tile_statistics_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                           bool aligned, A* partial) {
  const Columns<A> columns(term, tile, col_inverse, aligned);
  if (all_negatives(term, tile))
    block_statistics<true, kSummed>(term, tile, row_inverse, columns, partial);
  else block_statistics<false, kSummed>(term, tile, row_inverse, columns, partial);
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

// Rows are dealt to the warps for their partners' logits, then a block's rows to its threads. Each
// block's sums are left in memory; the block that is the last to be done (it draws the last ticket)
// adds them up, in the order of blocks, and concludes.
template <typename A, typename T, int W>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Term<A> term, Rows<A> x, Rows<A> y, Sums* sums_of_blocks, Sums* sums,
                  unsigned* ticket, Conclusion<A> to) {
  __shared__ double shared[kWarps];
  __shared__ bool last;
  Sums own;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = warp_row(); i < term.n; i += stride) {
    const bool there = term.there(i);
    const int64_t p = term.both ? i : there ? term.labels[i] : 0;
    if (there && (p < 0 || p >= (term.both ? term.n : term.m))) {
      printf("mcn_ext: labels[%lld] = %lld is outside [0, %lld)\n", static_cast<long long>(i),
             static_cast<long long>(p), static_cast<long long>(term.m));
      __trap();
    }
    const double s = there ? dot<A, T, W>(x, i, y, p) * x.inverse[i] * y.inverse[p] : 0;
    if (threadIdx.x % kWarp == 0)
      term.row.point[i] = there ? A((s - term.margin) / term.tau()) : A(0);
  }
  __syncthreads();  // the logits of the block's rows are there
  for (int64_t slot = threadIdx.x;; slot += blockDim.x) {
    const int64_t first = slot / kWarps * stride + static_cast<int64_t>(blockIdx.x) * kWarps;
    const int64_t i = first + slot % kWarps;
    if (first >= term.n) break;
    if (i >= term.n) continue;
    const bool there = term.there(i);
    const A positive = term.row.point[i];
    term.row.point[i] = term.point(positive), term.pull[i] = 0;
    finish_direction(term, term.row, i, there, positive, &own);
    if (term.both) finish_direction(term, term.col, i, there, positive, &own);
    own.count += there;
    if (there && (isnan(x.inverse[i]) || isnan(y.inverse[term.both ? i : term.labels[i]])))
      own.broken = 1;
  }
  if (term.labels)  // every row reads every centroid
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j < term.m;
         j += static_cast<int64_t>(gridDim.x) * blockDim.x)
      if (isnan(y.inverse[j])) own.broken = 1;
  const Sums block = block_sums(own, shared);
  if (threadIdx.x == 0) {
    sums_of_blocks[blockIdx.x] = block;
    __threadfence();  // the sums before the ticket, for whoever draws the last one
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();  // thread 0 knows whether this is the last block
  if (!last) return;
  __threadfence();
  Sums dealt;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    const volatile Sums& s = sums_of_blocks[b];
    Sums copy;
    copy.loss = s.loss, copy.count = s.count, copy.excess = s.excess, copy.excess_z = s.excess_z;
    copy.bound = s.bound, copy.broken = s.broken;
    dealt.merge(copy);
  }
  const Sums all = block_sums(dealt, shared);
  if (threadIdx.x != 0) return;
  *ticket = 0;
  *sums = all;
  if (to.total) conclude_sums(sums, 1, double(term.tau()), term.factor, to);
}

template <typename A>
__global__ void conclude_kernel(Term<A> term, const Sums* sums, int64_t ranks, Conclusion<A> to) {
  conclude_sums(sums, ranks, double(term.tau()), term.factor, to);
}

// ------------------------------------------------------------------------------------- gradients
template <bool kNegatives, Summed kSummed, bool kTemperature, typename A, typename P>
__device__ __forceinline__ void block_gradient(const Term<A>& term, const Tile<A>& tile,
                                               const A* row_inverse, const Columns<A>& columns,
                                               bool aligned, P* out, int64_t ld_out,
                                               double* by_block) {
  constexpr bool kTwo = kSummed != Summed::kExp;
  const int warp = threadIdx.x / kWarp;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kBlockRows + warp * kRows;
  const A inverse_temperature = A(1) / term.tau(), boost = term.factor[1];
  const A margin = kTwo ? A(term.margin) * inverse_temperature : A(0);
  const A bias = kTwo ? term.bias() : A(0);
  A col_top[kCols], col_rest[kCols], col_point[kCols], sum = 0;
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const int64_t j = tile.col0 + columns.j + c;
    const bool there = columns.j + c < tile.cols && term.both;
    col_top[c] = there ? term.col.top[j] : -lowest<A>();
    col_rest[c] = there ? term.col.rest[j] : A(0);
    col_point[c] = there && kTemperature ? term.col.point[j] : A(0);
  }
#pragma unroll 1  // 4 loads in flight a thread are enough, and double would spill
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = row_begin + r, row = tile.row0 + i;
    if (i >= tile.rows) break;
    const A inverse = row_inverse[row], row_top = term.row.top[row], row_rest = term.row.rest[row];
    const int32_t key = kNegatives ? -1 : term.row_key(row);
    const int32_t bag = kNegatives || !kTwo ? -2 : term.row_bag(row);
    const auto s = columns.row(tile, i);
    Pack<P, kCols> p;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const auto found = logit<kNegatives, kSummed>(s.value[c], A(inverse * inverse_temperature),
                                                    margin, key, bag, columns, c);
      const A z = found.mate() ? found.near : found.z;
      A of_row, of_col;
      if (kSummed == Summed::kElements) {
        const A slope = element(found, bias).slope;
        of_row = slope * row_rest, of_col = slope * col_rest[c];
      } else if (kTwo && found.mate()) {
        const int64_t j = tile.col0 + columns.j + c;
        of_row = -exp_shifted(z - term.row.near_top[row] - term.row.near_rest[row]);
        of_col = -exp_shifted(z - term.col.near_top[j] - term.col.near_rest[j]);
      } else {
        // A row that is not there has top +inf, a logit left out is -inf: their difference is -inf,
        // never NaN.
        of_row = exp_shifted(z - row_top - row_rest);
        of_col = term.both ? exp_shifted(z - col_top[c] - col_rest[c]) : A(0);
      }
      p.value[c] = rounded<P>((of_row + of_col) * boost * (inverse * columns.scale[c]));
      if (kTemperature) {  // 0 * inf would be NaN
        if (of_row != 0) sum += of_row * (z - term.row.point[row]);
        if (of_col != 0) sum += of_col * (z - col_point[c]);
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

template <Summed kSummed, bool kTemperature, typename A, typename P>
__global__ void __launch_bounds__(kThreads, 2)
    tile_gradient_kernel(Term<A> term, Tile<A> tile, const A* row_inverse, const A* col_inverse,
                         bool aligned, P* out, int64_t ld_out, bool out_aligned, double* by_block) {
  const Columns<A> columns(term, tile, col_inverse, aligned);
  if (all_negatives(term, tile))
    block_gradient<true, kSummed, kTemperature>(term, tile, row_inverse, columns, out_aligned, out,
                                                ld_out, by_block);
  else
    block_gradient<false, kSummed, kTemperature>(term, tile, row_inverse, columns, out_aligned, out,
                                                 ld_out, by_block);
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
  const bool there = term.row.top[i] != -lowest<A>();  // other rows' sums may hold anything
  const int64_t p = term.both || !there ? i : term.labels[i];
  // Apart: the product of two short rows' inverses may leave fp32.
  const A pull = there ? factor * term.pull[i] * x.inverse[i] : A(0);
  const A unit = there ? side.other.inverse[p] * A(fabs(side.other.scale[p])) : A(0);
  const T *row = static_cast<const T*>(x.data) + i * x.d,
          *partner = static_cast<const T*>(side.other.data) + (there ? p * x.d : 0);
  const auto gradient = [&](int64_t k) {
    Pack<A, W> g{}, before{};
    if (there) g = load<W>(side.sums + at + k);
    if (side.add) before = load<W>(side.total + at + k);
    const auto positive = there ? load<W>(partner + k) : Pack<T, W>{};
#pragma unroll
    for (int c = 0; c < W; ++c)
      g.value[c] = before.value[c] + factor * (g.value[c] * unboost) -
                   pull * (unit * A(number(positive.value[c])));
    return g;
  };
  if (!side.out)
    return for_lane<W>(x.d, [&](int64_t k) {
      const auto g = gradient(k);  // before it is overwritten: sums may be total
      store(side.total + at + k, g);
    });
  const A up = *upstream, scale = x.scale[i];
  const bool alive = !normalize || scale > A(0);
  double along = 0;
  const A own_unit = scale * x.inverse[i];
  if (normalize && alive) {
    const double unit = own_unit;
    for_lane<W>(x.d, [&](int64_t k) {
      const auto g = gradient(k);
      const auto own = load<W>(row + k);
#pragma unroll
      for (int c = 0; c < W; ++c)
        along += double(g.value[c]) * (double(number(own.value[c])) * unit);
    });
    along = warp_sum(along);
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
          : alive    ? up * (scale * (g.value[c] - back * (own_unit * A(number(own.value[c])))))
                     : A(0));
    store(out + k, result);
  });
}

}  // namespace
}  // namespace mcn::cuda
