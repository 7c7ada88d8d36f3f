// What a device implements for the losses; cpu.cpp and cuda.cu do. No torch header: nvcc compiles
// cuda.cu in seconds, on a machine without a GPU and with a torch that knows none.
//
// A is the type of sums, statistics and logits: double for double rows, else float.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace mcn {

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

// One side of a similarity matrix: n rows of embeddings or centroids. The matrix products read
// "working" rows w = |scale| * x: powers of two that bring every norm to [0.5, 1), exact (fp16: to
// 2^-25 of the norm), so that neither products nor 16-bit gradients leave their range. On the CPU
// scale is 1 and w is x itself unless a norm is extreme.
template <typename A>
struct Rows {
  const void* data;  // (n, d) contiguous
  Type type;
  int64_t n, d;
  const bool* valid;  // (n,), or null: all are
  A* scale;           // (n,) 0: row not valid; negative: norm at most kEps, no gradient
  A* inverse;  // (n,) w * inverse is the unit row; 1 without normalize; NaN: a value not finite
  void* work;  // (n, d) working rows, written by measure; null: not now
};

// What a term knows of each of its rows, or of its columns.
template <typename A>
struct Axis {
  const A* weight;         // in the mean; null: 1
  A *max, *sum;            // running, of the others: negatives
  A *near_max, *near_sum;  // running, of the positives but the partner; unless Term::two_sums, null
  A *top, *rest;           // Direction's; top is +inf where a row is not there
  A *near_top, *near_rest;  // Direction's; without bags, null
  A* point;                 // Term::point of the partners' logits
};

// One term. A pair of modalities: n rows x against m columns y, in both directions; row i's
// partner is column first + i. Or rows against m centroids; row i's partner is its label.
template <typename A>
struct Term {
  int64_t n, m;
  bool both;              // a pair
  int64_t first;          // the column of row 0: other ranks' rows lie before it
  const int32_t* ids;     // pair: (m,) equal: not negatives; null: all differ
  const int32_t* bags;    // pair: (m,) equal, and ids are not: positives; null: all differ
  const int64_t* labels;  // centroids: (n,)
  const bool* valid;      // pair: (m,); centroids: (n,); null: all are
  Form form;
  const A* scalars;  // temperature and bias on the device, or null: the fixed ones
  A fixed_temperature, fixed_bias;
  double margin;
  Axis<A> row, col;  // (n,) and (m,) each
  A* pull;           // (n,) Directions', summed
  A* factor;         // {gradient per logit * 1/temperature, boost}, see conclude_sums

  // Rows and columns with equal keys are in no sum; -1: not there.
  MCN_INLINE int32_t col_key(int64_t j) const {
    if (!both) return static_cast<int32_t>(j);
    return valid && !valid[j] ? -1 : ids ? ids[j] : static_cast<int32_t>(j);
  }
  MCN_INLINE int32_t row_key(int64_t i) const {
    if (both) return col_key(first + i);
    return valid && !valid[i] ? -1 : static_cast<int32_t>(labels[i]);
  }
  // Those with equal bags, but unequal keys, are positives of each other.
  MCN_INLINE int32_t col_bag(int64_t j) const { return bags ? bags[j] : -1; }
  MCN_INLINE int32_t row_bag(int64_t i) const { return bags ? bags[first + i] : -2; }
  MCN_INLINE bool there(int64_t i) const {
    return both ? col_key(first + i) >= 0 : !valid || valid[i];
  }
  MCN_INLINE A tau() const { return scalars ? scalars[0] : fixed_temperature; }
  MCN_INLINE A bias() const { return scalars ? scalars[1] : fixed_bias; }
  MCN_INLINE bool sigmoid() const { return form.kind == Kind::kSigmoid; }
  // What tile_gradient takes from a row's logits before they are summed for the temperature's
  // gradient: the partner's logit where gradients cancel, as a softmax's do.
  MCN_INLINE A point(A positive) const { return sigmoid() ? A(0) : positive; }
  MCN_INLINE bool two_sums() const { return both && (bags || sigmoid()); }

  // Direction of row i, or of column i.
  MCN_INLINE Direction<A> direction(const Axis<A>& axis, int64_t i, A positive) const {
    LogSum<A> others{axis.max[i], axis.sum[i]}, near;
    if (two_sums()) near = {axis.near_max[i], axis.near_sum[i]};
    return {form, others, near, sigmoid() ? positive + bias() : positive,
            axis.weight ? axis.weight[i] : A(1)};
  }
};

// Row i's share of the term in one direction: what it leaves to backward, and adds to the sums.
template <typename A>
MCN_INLINE void finish_direction(const Term<A>& term, const Axis<A>& axis, int64_t i, bool there,
                                 A positive, Sums* sums) {
  axis.top[i] = -lowest<A>(), axis.rest[i] = 0;
  if (axis.near_top) axis.near_top[i] = -lowest<A>(), axis.near_rest[i] = 0;
  if (!there) return;
  const Direction<A> found = term.direction(axis, i, positive);
  term.pull[i] += A(found.pull);
  axis.top[i] = found.top, axis.rest[i] = found.rest;
  if (axis.near_top) axis.near_top[i] = found.near_top, axis.near_rest[i] = found.near_rest;
  Sums own;
  own.loss = found.loss, own.bound = found.bound;
  // To a learnt temperature, beside what tile_gradient adds: see Term::point.
  own.excess = found.excess;
  own.excess_z = (term.sigmoid() ? -found.pull : found.excess) * positive;
  own.broken = axis.weight && axis.weight[i] != axis.weight[i];  // NaN
  sums->merge(own);
}

// A block of S = x y^T: rows from row0, columns from col0, leading dimension ld.
template <typename A>
struct Tile {
  A* data;
  int64_t ld, row0, rows, col0, cols;
};

// A block of the gradient of one side of a term: rows [begin, end). What is not of all rows starts
// at row begin; sums, total and out may be one.
template <typename A>
struct GradientRows {
  Rows<A> own, other;  // other: the positives' side
  int64_t begin, end;
  const A* sums;  // (end - begin, d) P or P^T times the other side's working rows
  A* total;       // (end - begin, d) over terms, before the normalisation's; null: no other term
  bool add;       // total holds earlier terms
  void* out;      // (end - begin, d) of own's type: the result, if this is its last term, or null
};

// Kernels take their sides by value, so many at a time.
constexpr int kSides = 4, kGradientSides = 2;
constexpr int64_t kFinishBlocks = 1024;  // of the device's threads, at most

#define MCN_DECLARE_KERNELS                                                                        \
  /* Elements of A that tile_statistics needs as `partial`, of double that tile_gradient does. */  \
  int64_t partial_size(int64_t rows, int64_t cols, bool two_sums);                                 \
  int64_t temperature_size(int64_t rows, int64_t cols);                                            \
  /* Fill scale, inverse and work of some sides, of one type. copies[i]: the matrix products must  \
     read working rows, not x. */                                                                  \
  template <typename A>                                                                            \
  void measure(void* stream, const Rows<A>* sides, int count, bool normalize, bool* copies);       \
  /* out (end - begin, d), of x's type: working rows, zero where not valid. */                     \
  template <typename A>                                                                            \
  void copy_rows(void* stream, const Rows<A>& x, int64_t begin, int64_t end, void* out);           \
  /* Merge a tile into the running sums, in an order that does not depend on threads. The first    \
     tile of a row or column starts them. Of the others exp(z) is summed, and of the positives;    \
     sigmoid: losses in `sum`, their derivatives in `near_sum`, of both. */                        \
  template <typename A>                                                                            \
  void tile_statistics(void* stream, const Term<A>& term, const Tile<A>& tile,                     \
                       const A* row_inverse, const A* col_inverse, A* partial);                    \
  /* From the running sums: point, Directions and pull, and the rows' sums, with                   \
     `sums_of_blocks` (kFinishBlocks,) for scratch. rows: x; cols: y. ticket: a zero, left as      \
     such. CUDA, whose host does not wait, prints the first label that is no column and ends the   \
     context, as torch's own indexing does. Concludes, too, unless there are other ranks' sums to  \
     wait for (to.total is null). */                                                               \
  template <typename A>                                                                            \
  void finish(void* stream, const Term<A>& term, const Rows<A>& x, const Rows<A>& y,               \
              Sums* sums_of_blocks, Sums* sums, unsigned* ticket, const Conclusion<A>& to);        \
  /* conclude_sums of all ranks' sums (ranks,). */                                                 \
  template <typename A>                                                                            \
  void conclude(void* stream, const Term<A>& term, const Sums* sums, int64_t ranks,                \
                const Conclusion<A>& to);                                                          \
  /* P = boost (g_row + g_col) inverse_i inverse_j, g the Directions' gradients of a logit, as     \
     `type`, leading dimension ld_out; out may be the tile. by_block, unless null, for scratch:    \
     d_temperature -= factor / temperature * sum of g (z - point): what S and its positives        \
     add, before anything is rounded, but for what conclude_sums adds. */                          \
  template <typename A>                                                                            \
  void tile_gradient(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse, \
                     const A* col_inverse, void* out, Type type, int64_t ld_out, double* by_block, \
                     double* d_temperature);                                                       \
  /* g_i = [total_i] + factor (sums_i / boost - pull_i inverse_i inverse_p w_p), p the partner:    \
     total, or through the normalisation and times upstream (a scalar on the device) out. */       \
  template <typename A>                                                                            \
  void add_gradients(void* stream, const Term<A>& term, const GradientRows<A>* sides, int count,   \
                     bool normalize, const A* upstream)

namespace cpu {
MCN_DECLARE_KERNELS;
}
namespace cuda {
MCN_DECLARE_KERNELS;
}

#define MCN_INSTANTIATE_KERNELS(A)                                                                 \
  template void measure<A>(void*, const Rows<A>*, int, bool, bool*);                               \
  template void copy_rows<A>(void*, const Rows<A>&, int64_t, int64_t, void*);                      \
  template void tile_statistics<A>(void*, const Term<A>&, const Tile<A>&, const A*, const A*, A*); \
  template void finish<A>(void*, const Term<A>&, const Rows<A>&, const Rows<A>&, Sums*, Sums*,     \
                          unsigned*, const Conclusion<A>&);                                        \
  template void conclude<A>(void*, const Term<A>&, const Sums*, int64_t, const Conclusion<A>&);    \
  template void tile_gradient<A>(void*, const Term<A>&, const Tile<A>&, const A*, const A*, void*, \
                                 Type, int64_t, double*, double*);                                 \
  template void add_gradients<A>(void*, const Term<A>&, const GradientRows<A>*, int, bool, const A*)

}  // namespace mcn
