// All terms of the objective in one call: which tile of which similarity matrix is multiplied, read
// and turned into a gradient when. The same for every device; kernels.h says what differs.
//
// keep: the matrices fit the budget. Each is computed once, becomes P = d loss / dS in forward, and
// is kept, in 16 bits where the embeddings are, for backward to multiply: 3 matrix products.
// Otherwise tiles stream: forward leaves the log-sums, backward computes the tiles again: 4
// products.
//
// Several ranks: each computes the rows it owns of every matrix, n x N, against all ranks' rows of
// one side. The columns' statistics and gradients are sent to the ranks that own them and summed
// there in the order of ranks: one exchange of N x D each way, and 1/ranks of the products.
#include "loss.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <memory>
#include <utility>

#include "kernels.h"
#include "ranks.h"

#ifdef MCN_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

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
namespace {

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

template <typename F>
void blocks(int64_t size, int64_t block, F f) {
  for (int64_t begin = 0; begin < size; begin += block) f(begin, std::min(block, size - begin));
}

// The first `rows` rows of `scratch`, made or made larger when it is too small.
Tensor rows_of(Tensor& scratch, int64_t rows, int64_t cols, const at::TensorOptions& options) {
  if (!scratch.defined() || scratch.numel() < rows * cols) {
    scratch.reset();  // first: not both at once
    scratch = at::empty({rows * cols}, options);
  }
  return scratch.narrow(0, 0, rows * cols).view({rows, cols});
}

// ------------------------------------------------------------------------- what there is to do
// Embeddings of one modality, or centroids.
struct Matrix {
  Tensor x, valid;  // valid undefined: all rows
  Tensor scale, inverse;
  Tensor work;  // what the matrix products read: x, or a copy; undefined: copied by blocks

  Matrix own(const Ranks& ranks) const {
    const auto part = [&](const Tensor& t) { return t.defined() ? ranks.own(t) : t; };
    return {part(x), part(valid), part(scale), part(inverse), part(work)};
  }
};
struct Side {
  Matrix rows;           // n, this rank's
  Matrix cols;           // N, all ranks'; rows are a part of it, or where it is no column, it
  bool wanted = false;   // its gradient
  int terms = 0;         // in which it still takes part
  bool started = false;  // total holds something
  Tensor total;   // (n, D) gradient before the normalisation's, summed over terms; undefined: one
                  // term is all, and the result is narrower
  Tensor result;  // (n, D) gradient
};
struct Spec {  // one term
  Side *x, *y;
  bool both;                      // a pair, not rows against centroids
  Tensor ids, bags, valid;        // as in Term
  Tensor row_weight, col_weight;  // (n,) each, or undefined
  double weight = 0, report = 0;  // see Conclusion
  int slot = 0;                   // of the reported loss

  // Row i's positive: row i of this rank's part, or of the centroids the one it is labelled with.
  const Matrix& partners() const { return both ? y->rows : y->cols; }
};

template <typename A>
class Losses {
 public:
  // tiles: similarity matrices will be read, which needs the ids.
  Losses(const Problem& problem, bool tiles)
      : p_(problem), first_(problem.embeddings.at(0)),
        options_(first_.options().dtype(c10::CppTypeToScalarType<A>::value)),
        narrow_(first_.scalar_type() != options_.dtype()), rows_(first_.size(0)),
        dim_(first_.size(1)), cuda_(kEmulated || first_.is_cuda()),
        ranks_(p_.sizes, p_.rank, p_.group, rows_) {
#ifdef MCN_WITH_CUDA
    if (cuda_) stream_ = c10::cuda::getCurrentCUDAStream(first_.get_device()).stream();
#endif
    TORCH_CHECK_TYPE(cuda_ || !narrow_, "mcn: on a CPU embeddings must be float32 or float64, got ",
                     first_.scalar_type());
    TORCH_CHECK_VALUE(p_.kind >= 0 && p_.kind <= static_cast<int64_t>(Kind::kSigmoid), "mcn: loss ",
                      p_.kind, " is in reference.py alone; MCN_LOSS=reference runs it");
    // The kernels read vectors without strides.
    for (auto* vectors : {&p_.ids, &p_.valid, &p_.weights})
      for (Tensor& vector : *vectors) vector = vector.contiguous();
    for (size_t i = 0; i < p_.embeddings.size(); ++i) {
      Side& side = sides_.emplace_back();
      side.cols.x = (ranks_ ? p_.columns : p_.embeddings)[i].contiguous();
      side.wanted = p_.wanted[i];
    }
    if (p_.centroids.defined()) {
      p_.labels = p_.labels.contiguous();
      centroids_.cols.x = p_.centroids.to(first_.scalar_type()).contiguous();
      if (!cuda_) check_labels();
    }
    list_terms(tiles);
    measure();
  }

  Forward forward();
  Backward backward(const Tensor& upstream, const Forward& forward);

 private:
  bool is_column(const Side& side) const { return side.cols.x.size(0) == ranks_.rows(); }
  bool wants_any() const {
    return p_.wants_scalars ||
           std::any_of(sides_.begin(), sides_.end(), [](const Side& s) { return s.wanted; });
  }

  void list_terms(bool tiles);
  void check_labels() const;
  Tensor used_rows(size_t modality) const;
  void measure();

  void statistics(const Spec& spec, const Tensor& state, const Tensor& matrix,
                  const Conclusion<A>& to, unsigned* ticket);
  Tensor keep(const Spec& spec, const Term<A>& t, const Tensor& matrix, double* d_temperature);
  Tensor merge_columns(const Tensor& running, const Term<A>& t) const;
  static Tensor scalars_in(const Tensor& parts) {
    return parts.narrow(0, 4, 2 * sizeof(double) / sizeof(A)).view(at::kDouble);
  }

  void prepare_results();
  void multiply_kept(Spec& spec, const Term<A>& t, const Tensor& p, const A* upstream);
  void multiply_tiles(Spec& spec, const Term<A>& t, const A* upstream, double* d_temperature);
  void add_owned(Spec& spec, const Term<A>& t, Tensor sums, const A* upstream);

  // ---------------------------------------------------------------- state
  // {factor (2), pull, row: top, rest, positive (n each), col: top, rest (N each)}; with bags
  // near_top and near_rest of both; with ranks col.positive (N): without, it is the rows'.
  bool keeps_near(const Spec& spec) const {
    return spec.both && p_.bags.defined() && p_.kind != static_cast<int64_t>(Kind::kSigmoid);
  }
  int64_t col_statistics(const Spec& spec) const {
    return !spec.both ? 0 : 2 + 2 * keeps_near(spec) + static_cast<bool>(ranks_);
  }
  int64_t state_size(const Spec& spec) const {
    return 2 + (4 + 2 * keeps_near(spec)) * rows_ + col_statistics(spec) * ranks_.rows();
  }
  template <typename F>
  void for_terms(const Tensor& state, F f) {
    int64_t at = 0;
    for (size_t i = 0; i < specs_.size(); ++i) {
      f(i, specs_[i], state.narrow(0, at, state_size(specs_[i])));
      at += state_size(specs_[i]);
    }
  }
  Term<A> term(const Spec& spec, const Tensor& state) const {
    const int64_t n = rows_, m = spec.y->cols.x.size(0);
    const auto numbers = [](const Tensor& t) {
      return t.defined() ? t.template const_data_ptr<A>() : nullptr;
    };
    const auto codes = [](const Tensor& t) {
      return t.defined() ? t.template const_data_ptr<int32_t>() : nullptr;
    };
    Term<A> t{};
    t.n = n, t.m = m, t.both = spec.both, t.first = spec.both ? ranks_.begin() : 0;
    t.margin = p_.margin;
    if (spec.both) t.form = {static_cast<Kind>(p_.kind), p_.q, std::log(p_.lambda)};
    t.ids = codes(spec.ids), t.bags = codes(spec.bags);
    if (!spec.both) t.labels = p_.labels.template const_data_ptr<int64_t>();
    if (spec.valid.defined()) t.valid = spec.valid.template const_data_ptr<bool>();
    t.scalars = numbers(p_.scalars);
    t.fixed_temperature = A(p_.fixed_temperature), t.fixed_bias = A(p_.fixed_bias);
    t.row.weight = numbers(spec.row_weight), t.col.weight = numbers(spec.col_weight);
    A* at = state.template mutable_data_ptr<A>();
    const auto next = [&](int64_t size) { return std::exchange(at, at + size); };
    t.factor = next(2), t.pull = next(n);
    t.row.top = next(n), t.row.rest = next(n), t.row.point = next(n);
    if (keeps_near(spec)) t.row.near_top = next(n), t.row.near_rest = next(n);
    if (!spec.both) return t;
    t.col.top = next(m), t.col.rest = next(m);
    if (keeps_near(spec)) t.col.near_top = next(m), t.col.near_rest = next(m);
    t.col.point = ranks_ ? next(m) : t.row.point;
    return t;
  }

  // (2 or 4, size) from `at` on, each sum before its maximum.
  static void point_running(Axis<A>& axis, A* at, int64_t size, int64_t count) {
    axis.sum = at, axis.max = at + size;
    if (count == 4) axis.near_sum = at + 2 * size, axis.near_max = at + 3 * size;
  }

  // ---------------------------------------------------------------- blocks
  int64_t row_block() const {
    if (p_.tile) return p_.tile;
    if (cuda_) return p_.keep || dim_ > 1024 ? 8192 : 4096;
    return 1024;  // of 4096 columns: read back while it is in the last cache
  }
  int64_t col_block(const Term<A>& t) const {
    if (p_.tile) return p_.tile;
    return p_.keep ? std::max<int64_t>(t.m, 1) : cuda_ && dim_ > 1024 ? 8192 : 4096;
  }
  // Rows of a gradient whose fp32 sums take 64 MiB on a GPU.
  int64_t gradient_block() const {
    if (p_.tile || !cuda_) return row_block();
    return std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(dim_, 1) / 1024 * 1024, 1024,
                               8192);
  }

  Rows<A> rows(const Matrix& m) const {
    return {m.x.const_data_ptr(),
            type_of(m.x.scalar_type()),
            m.x.size(0),
            dim_,
            m.valid.defined() ? m.valid.template const_data_ptr<bool>() : nullptr,
            m.scale.template mutable_data_ptr<A>(),
            m.inverse.template mutable_data_ptr<A>(),
            nullptr};
  }
  static const A* inverse(const Matrix& m) { return m.inverse.template const_data_ptr<A>(); }
  // Working rows, in `scratch` where they are copied by blocks.
  Tensor working(const Matrix& m, int64_t begin, int64_t size, Tensor& scratch) const {
    if (m.work.defined()) return m.work.narrow(0, begin, size);
    const Tensor out = rows_of(scratch, size, dim_, m.x.options());
    MCN_RUN(template copy_rows<A>, stream_, rows(m), begin, begin + size, out.mutable_data_ptr());
    return out;
  }
  // A tile: of the whole matrix, where it is there.
  Tensor tile(const Tensor& matrix, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) {
    if (matrix.defined()) return matrix.narrow(0, row, n_rows).narrow(1, col, n_cols);
    return rows_of(tile_, n_rows, n_cols, options_);
  }
  static Tile<A> tile_of(const Tensor& s, int64_t row, int64_t col) {
    return {s.template mutable_data_ptr<A>(), s.stride(0), row, s.size(0), col, s.size(1)};
  }
  // P of a tile; of the temperature's gradient what lies in it, if that is wanted.
  void turn(const Spec& spec, const Term<A>& t, const Tile<A>& tile, const Tensor& p,
            double* d_temperature) {
    double* by_block = nullptr;
    if (p_.wants_scalars)
      by_block = rows_of(by_block_, MCN_RUN(temperature_size, tile.rows, tile.cols), 1,
                         options_.dtype(at::kDouble))
                     .template mutable_data_ptr<double>();
    MCN_RUN(tile_gradient, stream_, t, tile, inverse(spec.x->rows), inverse(spec.y->cols),
            p.mutable_data_ptr(), type_of(p.scalar_type()), p.stride(0), by_block, d_temperature);
  }

  // ---------------------------------------------------------------- gradients of a side
  // Where a product of `size` rows is summed: in the total, if nothing is there yet.
  Tensor sums_of(const Side& side, int64_t begin, int64_t size, Tensor& scratch) const {
    if (!side.started && side.total.defined()) return side.total.narrow(0, begin, size);
    return rows_of(scratch, size, dim_, options_);
  }
  GradientRows<A> of_side(const Side& side, const Matrix& positives, int64_t begin, int64_t size,
                          const Tensor& sums) const {
    GradientRows<A> g{};
    g.own = rows(side.rows), g.other = rows(positives), g.begin = begin, g.end = begin + size;
    g.sums = sums.template const_data_ptr<A>(), g.add = side.started;
    if (side.total.defined())
      g.total = side.total.narrow(0, begin, size).template mutable_data_ptr<A>();
    if (side.terms == 1) g.out = side.result.narrow(0, begin, size).mutable_data_ptr();
    return g;
  }
  void add(const Term<A>& t, const std::vector<GradientRows<A>>& sides, const A* upstream) const {
    MCN_RUN(add_gradients, stream_, t, sides.data(), static_cast<int>(sides.size()), p_.normalize,
            upstream);
  }

  Problem p_;
  Tensor first_;
  at::TensorOptions options_;  // of A, on the device
  bool narrow_;                // 16-bit rows: P is 16-bit, too
  int64_t rows_, dim_;
  bool cuda_;
  Ranks ranks_;
  void* stream_ = nullptr;
  std::deque<Side> sides_;  // whose members stay where they are
  Side centroids_;
  std::vector<Spec> specs_;
  Tensor tile_, by_block_;  // scratch
};

template <typename A>
void Losses<A>::list_terms(bool tiles) {
  // int32, equal for equal numbers: the matrix is compared against them at twice int64's speed.
  const auto codes = [&](const Tensor& given) {
    return at::searchsorted(std::get<0>(given.sort()), given, /*out_int32=*/true);
  };
  const auto valid = [&](int64_t i) { return p_.valid.empty() ? Tensor() : p_.valid[i]; };
  const double pairs = p_.pairs.size() / 2, modalities = p_.clustered.size();
  const Tensor bags = tiles && p_.bags.defined() ? codes(p_.bags) : Tensor();
  for (size_t i = 0; i < p_.pairs.size(); i += 2) {
    const int64_t x = p_.pairs[i], y = p_.pairs[i + 1];
    Spec spec{&sides_[x], &sides_[y], true};
    spec.weight = spec.report = 1 / pairs;
    if (tiles && !p_.ids.empty()) spec.ids = codes(p_.ids[i / 2]);
    spec.bags = bags;
    if (!p_.valid.empty()) spec.valid = valid(x).logical_and(valid(y));
    if (!p_.weights.empty()) {
      spec.row_weight = ranks_.own(p_.weights[i]), spec.col_weight = ranks_.own(p_.weights[i + 1]);
      // NaN is not 0 either: it is not to be hidden.
      const Tensor some = p_.weights[i].ne(0).logical_or(p_.weights[i + 1].ne(0));
      spec.valid = spec.valid.defined() ? spec.valid.logical_and(some) : some;
    }
    specs_.push_back(std::move(spec));
  }
  for (int64_t i : p_.clustered) {
    if (!p_.centroids.defined()) break;
    Spec spec{&sides_[i], &centroids_, false};
    spec.report = p_.cluster_scale / modalities, spec.weight = p_.cluster_weight * spec.report;
    if (valid(i).defined()) spec.valid = ranks_.own(valid(i));
    spec.slot = 1;
    specs_.push_back(std::move(spec));
  }
  for (Spec& spec : specs_) ++spec.x->terms, ++spec.y->terms;
}

template <typename A>
void Losses<A>::check_labels() const {
  const int64_t *label = p_.labels.template const_data_ptr<int64_t>(), k = p_.centroids.size(0);
  for (int64_t modality : p_.clustered)
    for (int64_t i = 0; i < rows_; ++i) {
      const bool there =
          p_.valid.empty() || ranks_.own(p_.valid[modality]).template const_data_ptr<bool>()[i];
      TORCH_CHECK_VALUE(!there || (label[i] >= 0 && label[i] < k), "labels[", i, "] = ", label[i],
                        " is outside [0, ", k, ")");
    }
}

// (N,) rows that some term reads; undefined: all. What others hold must not reach the matrix
// products.
template <typename A>
Tensor Losses<A>::used_rows(size_t modality) const {
  const Side* side = &sides_[modality];
  Tensor used;
  for (const Spec& spec : specs_) {
    if (spec.x != side && spec.y != side) continue;
    if (!spec.valid.defined()) return {};
    const Tensor valid = spec.both ? spec.valid : p_.valid[modality];
    used = used.defined() ? used.logical_or(valid) : valid;
  }
  return used;
}

template <typename A>
void Losses<A>::measure() {
  std::vector<Matrix*> matrices;
  for (size_t i = 0; i < sides_.size(); ++i) {
    Side& side = sides_[i];
    const Tensor valid = used_rows(i);
    side.cols.valid = valid.defined() && !is_column(side) ? ranks_.own(valid) : valid;
    matrices.push_back(&side.cols);
  }
  if (p_.centroids.defined()) matrices.push_back(&centroids_.cols);
  std::vector<Rows<A>> all;
  for (Matrix* m : matrices) {
    m->scale = at::empty({m->x.size(0)}, options_);
    m->inverse = at::empty_like(m->scale);
    all.push_back(rows(*m));
    if (!cuda_ || !p_.keep || !(p_.normalize || m->valid.defined())) continue;
    m->work = at::empty_like(m->x);  // a GPU measures and copies in one
    all.back().work = m->work.mutable_data_ptr();
  }
  const auto copies = std::make_unique<bool[]>(all.size());
  MCN_RUN(measure, stream_, all.data(), static_cast<int>(all.size()), p_.normalize, copies.get());
  for (size_t i = 0; i < all.size(); ++i) {
    Matrix& m = *matrices[i];
    if (!copies[i]) m.work = m.x;
    Tensor whole;
    if (p_.keep && !m.work.defined()) m.work = working(m, 0, m.x.size(0), whole);
  }
  for (Side& side : sides_) side.rows = is_column(side) ? side.cols.own(ranks_) : side.cols;
}

// ------------------------------------------------------------------------------------- forward
template <typename A>
Forward Losses<A>::forward() {
  Forward out;
  out.parts = at::zeros({8}, options_);
  out.total = specs_.empty() ? at::zeros({}, options_) : at::empty({}, options_);
  int64_t size = 0;
  for (const Spec& spec : specs_) size += state_size(spec);
  out.state = at::empty({size}, options_);
  A* parts = out.parts.template mutable_data_ptr<A>();
  double* d_scalars = scalars_in(out.parts).template mutable_data_ptr<double>();
  Tensor scratch;
  for_terms(out.state, [&](size_t i, const Spec& spec, const Tensor& state) {
    const Term<A> t = term(spec, state);
    Tensor matrix;
    if (p_.keep && wants_any() && !narrow_) matrix = at::empty({t.n, t.m}, options_);
    if (p_.keep && !matrix.defined()) matrix = rows_of(scratch, t.n, t.m, options_);
    statistics(spec, state, matrix,
               {spec.weight, spec.report, out.total.template mutable_data_ptr<A>(),
                parts + spec.slot, i == 0, d_scalars},
               reinterpret_cast<unsigned*>(parts + 2));
    if (p_.keep && wants_any()) out.kept.push_back(keep(spec, t, matrix, d_scalars));
  });
  return out;
}

template <typename A>
void Losses<A>::statistics(const Spec& spec, const Tensor& state, const Tensor& matrix,
                           const Conclusion<A>& to, unsigned* ticket) {
  const Term<A> t = term(spec, state);
  Term<A> running = t;
  // Written before they are read, by the first tile; a rank without rows has none.
  const int64_t count = t.two_sums() ? 4 : 2;
  const Tensor statistics =
      t.n > 0 ? at::empty({count * (t.n + t.m)}, options_) : at::zeros({count * t.m}, options_);
  const Tensor of_cols = statistics.narrow(0, count * t.n, count * t.m).view({count, t.m});
  if (t.n == 0)  // sums of nothing
    of_cols.slice(0, 1, count, 2).fill_(-std::numeric_limits<double>::infinity());
  point_running(running.row, statistics.template mutable_data_ptr<A>(), t.n, count);
  point_running(running.col, of_cols.template mutable_data_ptr<A>(), t.m, count);
  Tensor y_copy, x_copy, partial;
  const Tensor y = working(spec.y->cols, 0, t.m, y_copy);
  blocks(t.n, row_block(), [&](int64_t row, int64_t n_rows) {
    const Tensor x = working(spec.x->rows, row, n_rows, x_copy);
    blocks(t.m, col_block(t), [&](int64_t col, int64_t n_cols) {
      const Tensor s = tile(matrix, row, n_rows, col, n_cols);
      multiply(s, x, y.narrow(0, col, n_cols).t());
      const Tensor scratch =
          rows_of(partial, MCN_RUN(partial_size, n_rows, n_cols, t.two_sums()), 1, options_);
      MCN_RUN(tile_statistics, stream_, running, tile_of(s, row, col), inverse(spec.x->rows),
              inverse(spec.y->cols), scratch.template mutable_data_ptr<A>());
    });
  });
  constexpr int64_t kSums = sizeof(Sums) / sizeof(double);
  Tensor sums = at::empty({1 + kFinishBlocks, kSums}, options_.dtype(at::kDouble));
  const auto finish = [&](const Term<A>& term, const Conclusion<A>& conclusion) {
    Sums* at = reinterpret_cast<Sums*>(sums.template mutable_data_ptr<double>());
    MCN_RUN(finish, stream_, term, rows(spec.x->rows), rows(spec.partners()), at + 1, at, ticket,
            conclusion);
  };
  if (!ranks_) return finish(running, to);
  // With ranks, each finishes the columns that it owns, from all ranks' statistics of them.
  const Conclusion<A> later{};
  if (spec.both) {
    const Tensor merged = merge_columns(of_cols, t);
    Term<A> own = running;
    point_running(own.col, merged.template mutable_data_ptr<A>(), t.n, count);
    // top, rest, [near_top, near_rest,] positive: as they lie in the state
    const int64_t k = col_statistics(spec), at = state_size(spec) - k * t.m;
    const Tensor finished = at::empty({k, t.n}, options_);
    A* out = finished.template mutable_data_ptr<A>();
    own.col.top = out, own.col.rest = out + t.n;
    if (own.col.near_top) own.col.near_top = out + 2 * t.n, own.col.near_rest = out + 3 * t.n;
    finish(own, later);
    finished.select(0, k - 1).copy_(state.narrow(0, t.row.point - t.factor, t.n));
    state.narrow(0, at, k * t.m).view({k, t.m}).copy_(ranks_.rows_to_all(finished.t()).t());
  } else {
    finish(running, later);
  }
  sums = ranks_.to_all(sums.narrow(0, 0, 1));
  MCN_RUN(conclude, stream_, t,
          reinterpret_cast<const Sums*>(sums.template const_data_ptr<double>()), ranks_.count(),
          to);
}

// (2 or 4, n) sums and maxima over all ranks of the columns that this rank owns.
template <typename A>
Tensor Losses<A>::merge_columns(const Tensor& running, const Term<A>& t) const {
  const Tensor parts = ranks_.to_owners(running.t());  // (ranks, n, 2 or 4)
  std::vector<Tensor> merged;
  for (int64_t i = 0; i < running.size(0); i += 2) {
    const Tensor maxima = parts.select(2, i + 1), top = maxima.amax(0);
    const Tensor shift = at::where(top.isneginf(), at::zeros({}, options_), top);
    merged.push_back(parts.select(2, i).mul(maxima.sub(shift).exp_()).sum(0));
    merged.push_back(top);
  }
  return at::stack(merged);
}

// P of a whole matrix, in its place where it is as wide.
template <typename A>
Tensor Losses<A>::keep(const Spec& spec, const Term<A>& t, const Tensor& matrix,
                       double* d_temperature) {
  const Tensor p = narrow_ ? at::empty({t.n, t.m}, first_.options()) : matrix;
  blocks(t.n, row_block(), [&](int64_t row, int64_t n_rows) {
    blocks(t.m, col_block(t), [&](int64_t col, int64_t n_cols) {
      turn(spec, t, tile_of(tile(matrix, row, n_rows, col, n_cols), row, col),
           p.narrow(0, row, n_rows).narrow(1, col, n_cols), d_temperature);
    });
  });
  return p;
}

// ------------------------------------------------------------------------------------ backward
template <typename A>
Backward Losses<A>::backward(const Tensor& upstream, const Forward& forward) {
  Backward out;
  prepare_results();
  Tensor d_scalars = scalars_in(forward.parts);
  if (!p_.keep) d_scalars = d_scalars.clone();  // a second backward begins there, too
  // The ranks' gradients will be averaged.
  const Tensor scaled = ranks_ ? upstream.mul(ranks_.count()) : upstream;
  const A* up = scaled.template const_data_ptr<A>();
  for_terms(forward.state, [&](size_t i, Spec& spec, const Tensor& state) {
    const Term<A> t = term(spec, state);
    if (p_.keep) multiply_kept(spec, t, forward.kept[i], up);
    else multiply_tiles(spec, t, up, d_scalars.template mutable_data_ptr<double>());
    for (Side* side : {spec.x, spec.y}) side->started = true, --side->terms;
  });
  out.scalars = at::empty({2}, options_);
  if (p_.wants_scalars) {  // rounded once: the terms' gradients may cancel
    const Tensor all = ranks_ ? ranks_.to_all(d_scalars).view({-1, 2}).sum(0) : d_scalars;
    at::mul_out(out.scalars, all.to(options_.dtype()), upstream);
  }
  for (const Side& side : sides_)
    if (side.wanted) out.gradients.push_back(side.result);
  return out;
}

template <typename A>
void Losses<A>::prepare_results() {
  for (Side& side : sides_) {
    if (!side.wanted) continue;
    side.result = side.terms > 0 ? at::empty({rows_, dim_}, first_.options())
                                 : at::zeros({rows_, dim_}, first_.options());
    if (!narrow_) side.total = side.result;  // in place
    else if (side.terms > 1) side.total = at::empty({rows_, dim_}, options_);
  }
}

// Both sides of the same rows at once, in blocks: P is there for all.
template <typename A>
void Losses<A>::multiply_kept(Spec& spec, const Term<A>& t, const Tensor& p, const A* upstream) {
  Side &x = *spec.x, &y = *spec.y;
  Tensor x_sums, y_sums;
  blocks(rows_, gradient_block(), [&](int64_t begin, int64_t size) {
    std::vector<GradientRows<A>> sides;
    if (x.wanted) {
      const Tensor sums = sums_of(x, begin, size, x_sums);
      multiply(sums, p.narrow(0, begin, size), y.cols.work);
      sides.push_back(of_side(x, spec.partners(), begin, size, sums));
    }
    if (y.wanted && !ranks_) {
      const Tensor sums = sums_of(y, begin, size, y_sums);
      multiply(sums, p.narrow(1, begin, size).t(), x.rows.work);
      sides.push_back(of_side(y, x.rows, begin, size, sums));
    }
    if (!sides.empty()) add(t, sides, upstream);
  });
  if (!y.wanted || !ranks_) return;
  Tensor sums = at::zeros({t.m, dim_}, options_);
  if (rows_ > 0) multiply(sums, p.t(), x.rows.work);
  add_owned(spec, t, std::move(sums), upstream);
}

template <typename A>
void Losses<A>::multiply_tiles(Spec& spec, const Term<A>& t, const A* upstream,
                               double* d_temperature) {
  Side &x = *spec.x, &y = *spec.y;
  if (!x.wanted && !y.wanted && !p_.wants_scalars) return;
  Tensor y_copy, x_copy, p_tile, x_scratch, y_scratch, y_sums;
  const Tensor w_y = working(y.cols, 0, t.m, y_copy);
  if (y.wanted && ranks_)
    y_sums = rows_ > 0 ? at::empty({t.m, dim_}, options_) : at::zeros({t.m, dim_}, options_);
  if (y.wanted && !ranks_) y_sums = sums_of(y, 0, t.m, y_scratch);
  blocks(t.n, row_block(), [&](int64_t row, int64_t n_rows) {
    const Tensor w_x = working(x.rows, row, n_rows, x_copy);
    Tensor x_sums;
    if (x.wanted) x_sums = sums_of(x, row, n_rows, x_scratch);
    blocks(t.m, col_block(t), [&](int64_t col, int64_t n_cols) {
      const Tensor w = w_y.narrow(0, col, n_cols), s = tile({}, row, n_rows, col, n_cols);
      multiply(s, w_x, w.t());
      const Tensor p = narrow_ ? rows_of(p_tile, n_rows, n_cols, first_.options()) : s;
      turn(spec, t, tile_of(s, row, col), p, d_temperature);
      if (x.wanted) multiply(x_sums, p, w, col > 0);
      if (y.wanted) multiply(y_sums.narrow(0, col, n_cols), p.t(), w_x, row > 0);
    });
    if (x.wanted) add(t, {of_side(x, spec.partners(), row, n_rows, x_sums)}, upstream);
  });
  if (!y.wanted) return;
  if (ranks_) return add_owned(spec, t, std::move(y_sums), upstream);
  add(t, {of_side(y, x.rows, 0, t.m, y_sums)}, upstream);
}

// The columns' sums (N, D) of this rank's rows: to their owners, who add them up.
template <typename A>
void Losses<A>::add_owned(Spec& spec, const Term<A>& t, Tensor sums, const A* upstream) {
  Tensor own = ranks_.to_owners(sums);
  sums.reset();
  own = own.sum(0);
  add(t, {of_side(*spec.y, spec.x->rows, 0, rows_, own)}, upstream);
}

// Autocast would round inside the matrix products: what they are given is already in the wanted
// type.
struct Guards {
  c10::DeviceGuard device;
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  explicit Guards(const Tensor& x) : device(x.device()) {}
};

bool is_double(const Problem& problem) {
  return problem.embeddings.at(0).scalar_type() == at::kDouble;
}

}  // namespace

Forward forward(const Problem& problem) {
  const Guards guards(problem.embeddings.at(0));
  return is_double(problem) ? Losses<double>(problem, true).forward()
                            : Losses<float>(problem, true).forward();
}

Backward backward(const Problem& problem, const Tensor& upstream, const Forward& forward) {
  const Guards guards(problem.embeddings.at(0));
  const Tensor up = upstream.contiguous();
  return is_double(problem) ? Losses<double>(problem, !problem.keep).backward(up, forward)
                            : Losses<float>(problem, !problem.keep).backward(up, forward);
}

}  // namespace mcn
