// What a device implements for the losses; cpu.cpp and cuda.cu do. No torch header: nvcc compiles
// cuda.cu in seconds, on a machine without a GPU and with a torch that knows none.
//
// A is the type of sums, statistics and logits: double for double rows, else float.
#pragma once

#include <cstdint>

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
};

// One term: n rows x against m columns y; both directions for a pair of modalities, rows only for
// centroids. A row's positive is the column of its own number, or of its key when rows only.
template <typename A>
struct Term {
  int64_t n, m;
  const int32_t *row_key, *col_key;  // equal: not each other's negatives; below 0: not there
  bool both;
  const A* temperature;  // scalar on the device
  double margin;
  A *row_max, *row_sum, *col_max, *col_sum;    // (n,) (n,) (m,) (m,) running, without positives
  A *row_top, *row_rest, *col_top, *col_rest;  // (n,) (n,) (m,) (m,) with them: lse = top + rest;
                                               // top is +inf where a row is not there
  A* pull;                                     // (n,) -d(loss of row)/d(logit of its positive)
  A* factor;  // {gradient per logit * 1/temperature, boost}, see finish
};

// A block of S = x y^T: rows from row0, columns from col0, leading dimension ld.
template <typename A>
struct Tile {
  A* data;
  int64_t ld, row0, rows, col0, cols;
};

#define MCN_DECLARE_KERNELS                                                                        \
  /* The first valid row whose label is outside [0, k), or -1; CUDA, whose host does not wait,     \
     prints it and ends the context, as torch's own indexing does. */                              \
  int64_t first_outside(void* stream, const int64_t* labels, const bool* valid, int64_t n,         \
                        int64_t k);                                                                \
  /* Elements of A that tile_statistics needs as `partial`. */                                     \
  int64_t partial_size(int64_t rows, int64_t cols);                                                \
  /* Fill scale and inverse; true if the matrix products must read copies (copy_rows). */          \
  template <typename A>                                                                            \
  bool measure(void* stream, const Rows<A>& x, bool normalize);                                    \
  /* out (end - begin, d), of x's type: working rows, zero where not valid. */                     \
  template <typename A>                                                                            \
  void copy_rows(void* stream, const Rows<A>& x, int64_t begin, int64_t end, void* out);           \
  /* Merge a tile into the running statistics, in an order that does not depend on threads. */     \
  template <typename A>                                                                            \
  void tile_statistics(void* stream, const Term<A>& term, const Tile<A>& tile,                     \
                       const A* row_inverse, const A* col_inverse, A* partial);                    \
  /* From the running statistics: top, rest, pull, and sums (4,), see Sums. rows: x; cols: y.      \
     positive: (n,). */                                                                            \
  template <typename A>                                                                            \
  void finish(void* stream, const Term<A>& term, const Rows<A>& x, const Rows<A>& y, A* positive,  \
              double* sums);                                                                       \
  /* From all ranks' sums (ranks, 4): factor = {weight / (valid rows * temperature), boost},       \
     losses[slot] += report * mean, losses[0] += weight * mean. */                                 \
  template <typename A>                                                                            \
  void conclude(void* stream, const Term<A>& term, const double* sums, int64_t ranks,              \
                double weight, double report, int slot, A* losses);                                \
  /* P = boost (exp(z - lse_row) + exp(z - lse_col)) inverse_i inverse_j, as `type`, leading       \
     dimension ld_out; out may be the tile. */                                                     \
  template <typename A>                                                                            \
  void tile_gradient(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse, \
                     const A* col_inverse, void* out, Type type, int64_t ld_out);                  \
  /* total_i (+)= factor (sums_i / boost - pull_i inverse_i inverse_p w_p), p the positive, for    \
     rows [begin, end); sums and total start at row begin and may be one. dots_i, unless null: the \
     bracket times w_i. */                                                                         \
  template <typename A>                                                                            \
  void accumulate(void* stream, const Term<A>& term, const Rows<A>& own, const Rows<A>& other,     \
                  int64_t begin, int64_t end, const A* sums, A* total, bool add, A* dots);         \
  /* d_temperature -= factor / temperature (sum of dots + margin * sum of pull) */                 \
  template <typename A>                                                                            \
  void temperature_gradient(void* stream, const Term<A>& term, const A* dots, A* d_temperature);   \
  /* Through the normalisation, times upstream (a scalar on the device; null: 1): out (end -       \
     begin, d) of `type`; total and out start at row begin and may be one. */                      \
  template <typename A>                                                                            \
  void project(void* stream, const Rows<A>& x, bool normalize, int64_t begin, int64_t end,         \
               const A* total, const A* upstream, void* out, Type type)

namespace cpu {
MCN_DECLARE_KERNELS;
}
namespace cuda {
MCN_DECLARE_KERNELS;
}

#define MCN_INSTANTIATE_KERNELS(A)                                                                 \
  template bool measure<A>(void*, const Rows<A>&, bool);                                           \
  template void copy_rows<A>(void*, const Rows<A>&, int64_t, int64_t, void*);                      \
  template void tile_statistics<A>(void*, const Term<A>&, const Tile<A>&, const A*, const A*, A*); \
  template void finish<A>(void*, const Term<A>&, const Rows<A>&, const Rows<A>&, A*, double*);     \
  template void conclude<A>(void*, const Term<A>&, const double*, int64_t, double, double, int,    \
                            A*);                                                                   \
  template void tile_gradient<A>(void*, const Term<A>&, const Tile<A>&, const A*, const A*, void*, \
                                 Type, int64_t);                                                   \
  template void accumulate<A>(void*, const Term<A>&, const Rows<A>&, const Rows<A>&, int64_t,      \
                              int64_t, const A*, A*, bool, A*);                                    \
  template void temperature_gradient<A>(void*, const Term<A>&, const A*, A*);                      \
  template void project<A>(void*, const Rows<A>&, bool, int64_t, int64_t, const A*, const A*,      \
                           void*, Type)

}  // namespace mcn
