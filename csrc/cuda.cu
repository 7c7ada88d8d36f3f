// The kernels on CUDA, for sm_80 and later: their launches. No torch header. Nothing waits for the
// device, and every sum has one order, so that a run repeats bit for bit: the one atomic counts
// which block is the last.
//
// The tests compile this file as C++ too (tests/simt.h) and run every kernel, thread by thread,
// without a GPU.
#ifndef MCN_EMULATE
#include <cuda_runtime.h>
#define MCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <algorithm>
#include <initializer_list>
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

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// As with_rows, and W: 16 bytes of the rows, or 1 where a row does not begin at a multiple of them.
template <typename A, typename F>
void with_width(Type type, int64_t d, bool aligned, F f) {
  with_rows<A>(type, [&](auto* rows) {
    constexpr int kWide = 16 / sizeof(*rows);
    if (aligned && d % kWide == 0) return f(rows, std::integral_constant<int, kWide>());
    f(rows, std::integral_constant<int, 1>());
  });
}

// f(how the term's logits are summed), known to the compiler.
template <typename A, typename F>
void with_summed(const Term<A>& term, F f) {
  switch (summed(term)) {
    case Summed::kExp: return f(std::integral_constant<Summed, Summed::kExp>());
    case Summed::kTwoExp: return f(std::integral_constant<Summed, Summed::kTwoExp>());
    case Summed::kElements: return f(std::integral_constant<Summed, Summed::kElements>());
  }
}

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kWarps)); }

template <typename A>
dim3 blocks_of(const Tile<A>& tile) {
  return {static_cast<unsigned>(ceil_div(tile.cols, kBlockCols)),
          static_cast<unsigned>(ceil_div(tile.rows, kBlockRows))};
}

}  // namespace

int64_t partial_size(int64_t rows, int64_t cols, bool two_sums) {
  const int64_t one = rows * ceil_div(cols, kBlockCols) + cols * ceil_div(rows, kBlockRows);
  return (two_sums ? 4 : 2) * one;
}
int64_t temperature_size(int64_t rows, int64_t cols) {
  return ceil_div(cols, kBlockCols) * ceil_div(rows, kBlockRows);
}

template <typename A>
void measure(void* stream, const Rows<A>* sides, int count, bool normalize, bool* copies) {
  for (int from = 0; from < count; from += kSides) {
    const int some = std::min(count - from, kSides);
    Sides<A> by_value{};
    int64_t most = 0;
    bool wide = true;
    for (int i = 0; i < some; ++i) {
      const Rows<A>& x = by_value.side[i] = sides[from + i];
      copies[from + i] = normalize || x.valid;  // which rows are extreme, the device knows
      most = std::max(most, x.n);
      wide = wide && aligned({x.data, x.work});
    }
    if (most == 0) continue;
    with_width<A>(sides->type, sides->d, wide, [&](auto* type, auto width) {
      using T = Pointee<decltype(type)>;
      const dim3 grid(row_blocks(most), static_cast<unsigned>(some));
      MCN_LAUNCH((measure_kernel<A, T, width()>), grid, kThreads, stream, by_value, normalize);
    });
    check("measure");
  }
}

template <typename A>
void copy_rows(void* stream, const Rows<A>& x, int64_t begin, int64_t end, void* out) {
  if (end == begin) return;
  with_width<A>(x.type, x.d, aligned({x.data, out}), [&](auto* type, auto width) {
    using T = Pointee<decltype(type)>;
    MCN_LAUNCH((copy_rows_kernel<A, T, width()>), row_blocks(end - begin), kThreads, stream, x,
               begin, end, static_cast<T*>(out));
  });
  check("copy_rows");
}

template <typename A>
void tile_statistics(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                     const A* col_inverse, A* partial) {
  const dim3 grid = blocks_of(tile);
  with_summed(term, [&](auto of) {
    MCN_LAUNCH((tile_statistics_kernel<of(), A>), grid, kThreads, stream, term, tile, row_inverse,
               col_inverse, tile.ld % kCols == 0 && aligned({tile.data}), partial);
  });
  check("tile_statistics");
  const auto merge = [&](A* partial, const std::initializer_list<A*> sums) {
    A* const* of = sums.begin();
    const Parts<A> rows{partial,           grid.x,        tile.rows, of[0] + tile.row0,
                        of[1] + tile.row0, tile.col0 == 0};
    const Parts<A> cols{partial + 2 * rows.count * tile.rows,
                        grid.y,
                        tile.cols,
                        of[2] + tile.col0,
                        of[3] + tile.col0,
                        tile.row0 == 0};
    const auto blocks = [](const Parts<A>& parts) {
      return static_cast<unsigned>(ceil_div(parts.size, kWarp));
    };
    MCN_LAUNCH((merge_kernel<A>), blocks(rows) + (term.both ? blocks(cols) : 0), kThreads, stream,
               rows, cols, blocks(rows));
    check("merge");
  };
  const Axis<A>&row = term.row, &col = term.col;
  merge(partial, {row.max, row.sum, col.max, col.sum});
  if (term.two_sums())
    merge(partial + partial_size(tile.rows, tile.cols, false),
          {row.near_max, row.near_sum, col.near_max, col.near_sum});
}

template <typename A>
void finish(void* stream, const Term<A>& term, const Rows<A>& x, const Rows<A>& y,
            Sums* sums_of_blocks, Sums* sums, unsigned* ticket, const Conclusion<A>& to) {
  const auto blocks =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div(term.n, kWarps), 1, kFinishBlocks));
  with_width<A>(x.type, x.d, aligned({x.data, y.data}), [&](auto* type, auto width) {
    using T = Pointee<decltype(type)>;
    MCN_LAUNCH((finish_kernel<A, T, width()>), blocks, kThreads, stream, term, x, y, sums_of_blocks,
               sums, ticket, to);
  });
  check("finish");
}

template <typename A>
void conclude(void* stream, const Term<A>& term, const Sums* sums, int64_t ranks,
              const Conclusion<A>& to) {
  MCN_LAUNCH((conclude_kernel<A>), 1, 1, stream, term, sums, ranks, to);
  check("conclude");
}

template <typename A>
void tile_gradient(void* stream, const Term<A>& term, const Tile<A>& tile, const A* row_inverse,
                   const A* col_inverse, void* out, Type type, int64_t ld_out, double* by_block,
                   double* d_temperature) {
  const dim3 grid = blocks_of(tile);
  const bool wide = tile.ld % kCols == 0 && aligned({tile.data});
  const bool out_wide = ld_out % kCols == 0 && aligned({out});
  with_rows<A>(type, [&](auto* kind) {
    using P = Pointee<decltype(kind)>;
    with_summed(term, [&](auto of) {
      if (by_block)
        MCN_LAUNCH((tile_gradient_kernel<of(), true, A, P>), grid, kThreads, stream, term, tile,
                   row_inverse, col_inverse, wide, static_cast<P*>(out), ld_out, out_wide,
                   by_block);
      else
        MCN_LAUNCH((tile_gradient_kernel<of(), false, A, P>), grid, kThreads, stream, term, tile,
                   row_inverse, col_inverse, wide, static_cast<P*>(out), ld_out, out_wide,
                   by_block);
    });
  });
  check("tile_gradient");
  if (!by_block) return;
  MCN_LAUNCH((temperature_kernel<A>), 1, kThreads, stream, term, by_block,
             static_cast<int64_t>(grid.x) * grid.y, d_temperature);
  check("temperature");
}

template <typename A>
void add_gradients(void* stream, const Term<A>& term, const GradientRows<A>* sides, int count,
                   bool normalize, const A* upstream) {
  Gradients<A> by_value{};
  int64_t most = 0;
  bool wide = true;
  for (int i = 0; i < count; ++i) {
    const GradientRows<A>& side = by_value.side[i] = sides[i];
    most = std::max(most, side.end - side.begin);
    wide = wide && aligned({side.own.data, side.other.data, side.sums, side.total, side.out});
  }
  if (most == 0) return;
  with_width<A>(sides->own.type, sides->own.d, wide, [&](auto* type, auto width) {
    using T = Pointee<decltype(type)>;
    const dim3 grid(row_blocks(most), static_cast<unsigned>(count));
    MCN_LAUNCH((add_gradients_kernel<A, T, width()>), grid, kThreads, stream, term, by_value,
               normalize, upstream);
  });
  check("add_gradients");
}

MCN_INSTANTIATE_KERNELS(float);
MCN_INSTANTIATE_KERNELS(double);

}  // namespace mcn::cuda
