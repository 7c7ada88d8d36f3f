// All terms of the objective in one call: which tile of which similarity matrix is multiplied, read
// and turned into a gradient when. The same for every device; kernels.h says what differs.
//
// keep: the largest similarity matrix fits the budget. It is computed once into one buffer that all
// terms reuse, becomes the gradient in place, and the gradients are ready when forward returns: 3
// matrix products. Otherwise tiles stream: forward leaves the log-sums, backward computes the tiles
// again: 4 products.
//
// Several ranks: each computes the rows it owns of every matrix, n x N, against all ranks' rows of
// one side. The columns' statistics and gradients are sent to the ranks that own them and summed
// there in the order of ranks: one exchange of N x D each way, and 1/ranks of the products.
//
// terms.h lists the terms, loss.cpp has forward and its statistics, gradients.h the gradients.
#pragma once

#include "loss.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "ranks.h"

// The device is known when the code runs, so both sides are compiled. MCN_EMULATE: the tests'
// build, in which the CUDA kernels run on the CPU, thread by thread.
#if defined(MCN_EMULATE)
#define MCN_RUN(kernel, ...) cuda::kernel(__VA_ARGS__)
#elif defined(MCN_WITH_CUDA)
#define MCN_RUN(kernel, ...) (cuda_ ? cuda::kernel(__VA_ARGS__) : cpu::kernel(__VA_ARGS__))
#else
#define MCN_RUN(kernel, ...) cpu::kernel(__VA_ARGS__)
#endif

namespace mcn {
namespace {  // loss.cpp alone includes this

using at::Tensor;

#ifdef MCN_EMULATE
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Type::kFloat;
    case at::kDouble: return Type::kDouble;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_TYPE(false, "mcn: embeddings must be floating point, got ", type);
  }
}

// a b into out, which may be wider; added to it when `add`.
void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add = false) {
#ifdef MCN_EMULATE
  if (a.scalar_type() != out.scalar_type())
    return multiply(out, a.to(out.scalar_type()), b.to(out.scalar_type()), add);
#endif
  if (a.scalar_type() == out.scalar_type()) {
    add ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  } else if (!add) {
    at::mm_out(out, a, b, out.scalar_type());
  } else {
    static std::atomic<bool> wider{true};  // some versions of torch refuse to add to a wider out
    if (wider) try {
        at::addmm_out(out, out, a, b, out.scalar_type());
        return;
      } catch (const c10::Error&) { wider = false; }
    out.add_(at::mm(a, b, out.scalar_type()));
  }
}

// Embeddings of one modality, or centroids.
struct Matrix {
  Tensor x, scale, inverse, valid;  // valid undefined: all rows
  Tensor work;  // what the matrix products read: x, or a copy; undefined: copied by blocks

  Matrix own(const Ranks& ranks) const {
    const auto part = [&](const Tensor& t) { return t.defined() ? ranks.own(t) : t; };
    return {part(x), part(scale), part(inverse), part(valid), part(work)};
  }
};
struct Side {
  Matrix rows;           // n, this rank's
  Matrix cols;           // N, all ranks'; rows are a part of it, or where it is no column, it
  bool wanted = false;   // its gradient
  int terms = 0;         // in which it still takes part
  bool started = false;  // total holds something
  Tensor total;          // (n, D) gradient before the normalisation's
  Tensor result;         // (n, D) gradient
};

template <typename A>
class Losses {
 public:
  explicit Losses(const Problem& problem);

  // (total, contrastive, cluster), the log-sums, d temperature, and in keep mode results().
  std::tuple<Tensor, Tensor, Tensor> forward();
  // d temperature, and results().
  Tensor backward(const Tensor& upstream, const Tensor& state);
  std::vector<Tensor> results() const {
    std::vector<Tensor> out;
    for (const Side& side : sides_)
      if (side.result.defined()) out.push_back(side.result);
    return out;
  }

 private:
  struct Spec {  // one term
    Side *x, *y;
    Tensor row_key, col_key;  // of this rank's rows, of all columns
    bool both;
    double weight, report;
    int slot;
  };

  // ---------------------------------------------------------------- terms.h
  void mark_used();
  Tensor keys(const Tensor& ids, const Tensor& valid);
  void list_terms();

  // ---------------------------------------------------------------- loss.cpp
  void keep();
  void statistics(Spec& spec, const Tensor& state, const Tensor& losses);
  Tensor of_all_ranks(const Tensor& scalar) const;
  Tensor merge_columns(const Tensor& running, const Term<A>& t) const;
  Term<A> own_columns(Term<A> t, const Tensor& merged, const Tensor& final) const;

  // ---------------------------------------------------------------- gradients.h
  void prepare(bool gradients);
  Tensor total(Side& side);
  void project(Side& side, int64_t begin, int64_t size, const Tensor& total, const A* upstream);
  void gradients(Spec& spec, const Tensor& state, const Tensor& d_temperature, const A* upstream);

  // ---------------------------------------------------------------- what there is to do
  void measure(Matrix& m) {
    m.scale = at::empty({m.x.size(0)}, options_);
    m.inverse = at::empty_like(m.scale);
    const bool copies = MCN_RUN(template measure<A>, stream_, rows(m), p_.normalize);
    if (!copies) m.work = m.x;
    if (copies && p_.keep) m.work = copy(m, 0, m.x.size(0), at::empty_like(m.x));
  }
  bool is_column(const Side& side) const { return side.cols.x.size(0) == ranks_.rows(); }

  // Row i's positive: row i of this rank's part, or of the centroids the one it is labelled with.
  static const Matrix& partners(const Spec& spec) {
    return spec.both ? spec.y->rows : spec.y->cols;
  }

  bool wants_any() const {
    return p_.wants_temperature ||
           std::any_of(sides_.begin(), sides_.end(), [](const Side& s) { return s.wanted; });
  }
  int64_t state_size(const Spec& spec) const {
    return 2 + 3 * rows_ + (spec.both ? 2 * ranks_.rows() : 0);
  }
  int64_t state_size() const {
    int64_t size = 0;
    for (const Spec& spec : specs_) size += state_size(spec);
    return size;
  }
  int64_t largest_matrix() const {
    int64_t cols = 0;
    for (const Spec& spec : specs_) cols = std::max(cols, spec.y->cols.x.size(0));
    return rows_ * cols;
  }

  // ---------------------------------------------------------------- blocks
  int64_t row_block() const {
    if (p_.tile) return p_.tile;
    if (cuda_) return p_.keep || dim_ > 1024 ? 8192 : 4096;
    return 1024;  // of 4096 columns: read back while it is in the last cache
  }
  int64_t col_block() const {
    if (p_.tile) return p_.tile;
    return p_.keep ? std::max<int64_t>(largest_matrix(), 1) : cuda_ && dim_ > 1024 ? 8192 : 4096;
  }
  template <typename F>
  static void blocks(int64_t size, int64_t block, F f) {
    for (int64_t begin = 0; begin < size; begin += block) f(begin, std::min(block, size - begin));
  }

  Rows<A> rows(const Matrix& m) const {
    return {m.x.const_data_ptr(),
            type_of(m.x.scalar_type()),
            m.x.size(0),
            dim_,
            m.valid.defined() ? m.valid.template const_data_ptr<bool>() : nullptr,
            m.scale.template mutable_data_ptr<A>(),
            m.inverse.template mutable_data_ptr<A>()};
  }
  Tensor copy(const Matrix& m, int64_t begin, int64_t size, const Tensor& out) const {
    MCN_RUN(template copy_rows<A>, stream_, rows(m), begin, begin + size, out.mutable_data_ptr());
    return out.narrow(0, 0, size);
  }
  // Working rows, in `scratch` where they are copied by blocks.
  Tensor working(const Matrix& m, int64_t begin, int64_t size, Tensor& scratch) const {
    if (m.work.defined()) return m.work.narrow(0, begin, size);
    if (!scratch.defined())
      scratch = at::empty({size, dim_}, m.x.options());  // later blocks are no larger
    return copy(m, begin, size, scratch);
  }
  Term<A> term(const Spec& spec, const Tensor& state) const {
    const int64_t n = rows_, m = spec.y->cols.x.size(0);
    A* at = state.template mutable_data_ptr<A>();
    Term<A> t{};
    t.n = n, t.m = m, t.both = spec.both, t.margin = p_.margin;
    t.row_key = spec.row_key.template const_data_ptr<int32_t>();
    t.col_key = spec.col_key.template const_data_ptr<int32_t>();
    t.temperature = p_.temperature.template const_data_ptr<A>();
    t.factor = at, t.pull = at + 2, t.row_top = at + 2 + n, t.row_rest = at + 2 + 2 * n;
    t.col_top = at + 2 + 3 * n, t.col_rest = at + 2 + 3 * n + m;  // rows only: not there
    return t;
  }
  Tensor tile(int64_t row, int64_t n_rows, int64_t col, int64_t n_cols, int64_t ld) {
    if (kept_.defined()) return kept_.as_strided({n_rows, n_cols}, {ld, 1}, row * ld + col);
    if (!scratch_.defined() || scratch_.numel() < n_rows * n_cols)
      scratch_ = at::empty({n_rows * n_cols}, options_);
    return scratch_.narrow(0, 0, n_rows * n_cols).view({n_rows, n_cols});
  }
  static Tile<A> tile_of(const Tensor& s, int64_t row, int64_t col) {
    return {s.template mutable_data_ptr<A>(), s.stride(0), row, s.size(0), col, s.size(1)};
  }

  Problem p_;
  Tensor first_;
  at::TensorOptions options_;  // of A, on the device
  int64_t rows_, dim_;
  bool cuda_;
  Ranks ranks_;
  void* stream_ = nullptr;
  std::vector<Side> sides_;
  Side centroids_;
  std::vector<Spec> specs_;
  std::vector<Tensor> both_;  // per pair: rows of which both sides are valid
  Tensor kept_, scratch_;
};

}  // namespace
}  // namespace mcn
