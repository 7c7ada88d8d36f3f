// The kernels on CUDA, for sm_80 and later: their launches. No torch header. Nothing waits for the
// device, no atomics: every sum has one order, so that a run repeats bit for bit.
//
// The tests compile this file as C++ too (tests/simt.h) and run every kernel, thread by thread,
// without a GPU.
#ifndef MCN_EMULATE
#include <cuda_runtime.h>
#define MCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda_kernels.cuh"
#include "kernels.h"

namespace mcn::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("mcn ") + kernel + ": " + cudaGetErrorString(error));
}

// f(T*) with a null pointer of the rows' type; double sums have double rows only.
template <typename A, typename F>
void with_rows(Type type, F f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<double*>(nullptr));
  } else {
    if (type == Type::kHalf) return f(static_cast<__half*>(nullptr));
    if (type == Type::kBFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
    f(static_cast<float*>(nullptr));
  }
}
template <typename P>
using Pointee = std::remove_pointer_t<P>;

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kWarps)); }

}  // namespace

int64_t first_outside(void* stream, const int64_t* labels, const bool* valid, int64_t n,
                      int64_t k) {
  if (n == 0) return -1;
  MCN_LAUNCH(first_outside_kernel, static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, stream,
             labels, valid, n, k);
  check("first_outside");
  return -1;
}

int64_t partial_size(int64_t rows, int64_t cols) {
  return 2 * (rows * ceil_div(cols, kBlockCols) + cols * ceil_div(rows, kBlockRows));
}

template <typename A>
bool measure(void* stream, const Rows<A>& x, bool normalize) {
  if (x.n > 0) {
    with_rows<A>(x.type, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      MCN_LAUNCH((measure_kernel<A, T>), row_blocks(x.n), kThreads, stream, x, normalize);
    });
    check("measure");
  }
  return normalize || x.valid;  // whether rows are extreme is known on the device only
}

template <typename A>
void copy_rows(void* stream, const Rows<A>& x, int64_t begin, int64_t end, void* out) {
  if (end == begin) return;
  with_rows<A>(x.type, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    MCN_LAUNCH((copy_rows_kernel<A, T>), row_blocks(end - begin), kThreads, stream, x, begin, end,
               static_cast<T*>(out));
  });
  check("copy_rows");
}

template <typename A>
void tile_statistics(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                     const A* col_inverse, A* partial) {
  const int64_t across = ceil_div(tile.cols, kBlockCols), down = ceil_div(tile.rows, kBlockRows);
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  MCN_LAUNCH((tile_statistics_kernel<A>), grid, kThreads, stream, term, tile, row_inverse,
             col_inverse, partial);
  check("tile_statistics");
  const Parts<A> rows{partial, across, tile.rows, term.row_max + tile.row0,
                      term.row_sum + tile.row0};
  const Parts<A> cols{partial + 2 * across * tile.rows, down, tile.cols, term.col_max + tile.col0,
                      term.col_sum + tile.col0};
  const auto blocks = [](const Parts<A>& parts) {
    return static_cast<unsigned>(ceil_div(parts.size, kWarp));
  };
  MCN_LAUNCH((merge_kernel<A>), blocks(rows) + (term.both ? blocks(cols) : 0), kThreads, stream,
             rows, cols, blocks(rows));
  check("merge");
}

template <typename A>
void finish(void* stream, const Term<A>& term, const Rows<A>& x, const Rows<A>& y, A* positive,
            double* sums) {
  if (term.n > 0) {
    with_rows<A>(x.type, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      MCN_LAUNCH((positive_kernel<A, T>), row_blocks(term.n), kThreads, stream, term, x, y,
                 positive);
    });
    check("positive");
  }
  MCN_LAUNCH((finish_kernel<A>), 1, kOneBlock, stream, term, x.inverse, y.inverse, positive, sums);
  check("finish");
}

template <typename A>
void conclude(void* stream, const Term<A>& term, const double* sums, int64_t ranks, double weight,
              double report, int slot, A* losses) {
  MCN_LAUNCH((conclude_kernel<A>), 1, 1, stream, term, sums, ranks, weight, report, slot, losses);
  check("conclude");
}

template <typename A>
void tile_gradient(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                   const A* col_inverse, void* out, Type type, int64_t ld_out) {
  const dim3 grid(static_cast<unsigned>(ceil_div(tile.cols, kBlockCols)),
                  static_cast<unsigned>(ceil_div(tile.rows, kBlockRows)));
  with_rows<A>(type, [&](auto* kind) {
    using P = Pointee<decltype(kind)>;
    MCN_LAUNCH((tile_gradient_kernel<A, P>), grid, kThreads, stream, term, tile, row_inverse,
               col_inverse, static_cast<P*>(out), ld_out);
  });
  check("tile_gradient");
}

template <typename A>
void accumulate(void* stream, const Term<A>& term, const Rows<A>& own, const Rows<A>& other,
                int64_t begin, int64_t end, const A* sums, A* total, bool add, A* dots) {
  if (end == begin) return;
  with_rows<A>(own.type, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    MCN_LAUNCH((accumulate_kernel<A, T>), row_blocks(end - begin), kThreads, stream, term, own,
               other, begin, end, sums, total, add, dots);
  });
  check("accumulate");
}

template <typename A>
void temperature_gradient(void* stream, const Term<A>& term, const A* dots, A* d_temperature) {
  MCN_LAUNCH((temperature_kernel<A>), 1, kOneBlock, stream, term, dots, d_temperature);
  check("temperature_gradient");
}

template <typename A>
void project(void* stream, const Rows<A>& x, bool normalize, int64_t begin, int64_t end,
             const A* total, const A* upstream, void* out, Type type) {
  if (end == begin) return;
  with_rows<A>(x.type, [&](auto* kind) {
    using T = Pointee<decltype(kind)>;
    if (type == x.type)
      MCN_LAUNCH((project_kernel<A, T, T>), row_blocks(end - begin), kThreads, stream, x, normalize,
                 begin, end, total, upstream, static_cast<T*>(out));
    else  // keep mode's gradients of 16-bit rows
      MCN_LAUNCH((project_kernel<A, T, A>), row_blocks(end - begin), kThreads, stream, x, normalize,
                 begin, end, total, upstream, static_cast<A*>(out));
  });
  check("project");
}

MCN_INSTANTIATE_KERNELS(float);
MCN_INSTANTIATE_KERNELS(double);

}  // namespace mcn::cuda
