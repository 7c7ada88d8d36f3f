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
#include "loss.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "ranks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
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
  explicit Losses(const Problem& problem)
      : p_(problem), first_(problem.embeddings.at(0)),
        options_(first_.options().dtype(c10::CppTypeToScalarType<A>::value)), rows_(first_.size(0)),
        dim_(first_.size(1)), cuda_(kEmulated || first_.is_cuda()),
        ranks_(p_.sizes, p_.rank, p_.group, rows_) {
#ifdef MCN_WITH_CUDA
    if (cuda_) stream_ = c10::cuda::getCurrentCUDAStream(first_.get_device()).stream();
#endif
    // The kernels read vectors without strides.
    const auto dense = [](Tensor& vector) { vector = vector.contiguous(); };
    std::for_each(p_.ids.begin(), p_.ids.end(), dense);
    std::for_each(p_.valid.begin(), p_.valid.end(), dense);
    if (p_.labels.defined()) dense(p_.labels);
    for (size_t i = 0; i < p_.embeddings.size(); ++i) {
      Side& side = sides_.emplace_back();
      side.cols.x = (ranks_ ? p_.columns : p_.embeddings)[i].contiguous();
      side.wanted = p_.wanted[i];
    }
    p_.keep = p_.keep && wants_any();
    mark_used();
    for (Side& side : sides_) {
      measure(side.cols);
      side.rows = side.cols;
      if (is_column(side)) side.rows = side.cols.own(ranks_);
    }
    if (p_.centroids.defined()) {
      centroids_.cols.x = p_.centroids.to(first_.scalar_type()).contiguous();
      measure(centroids_.cols);
      const Tensor& labels = p_.labels;
      for (int64_t i : p_.clustered) {
        const bool* valid =
            p_.valid.empty() ? nullptr : ranks_.own(p_.valid[i]).template const_data_ptr<bool>();
        const int64_t bad =
            MCN_RUN(first_outside, stream_, labels.template const_data_ptr<int64_t>(), valid, rows_,
                    centroids_.cols.x.size(0));
        TORCH_CHECK_VALUE(bad < 0, "labels[", bad, "] = ", labels[bad].template item<int64_t>(),
                          " is outside [0, ", centroids_.cols.x.size(0), ")");
      }
    }
    list_terms();
  }

  // (total, contrastive, cluster), the log-sums, and in keep mode the gradients.
  std::tuple<Tensor, Tensor, Tensor> forward() {
    Tensor losses = at::zeros({3}, options_);
    Tensor state = at::zeros({state_size()}, options_);
    Tensor d_temperature = at::zeros({}, options_);
    const bool gradients = p_.keep && wants_any();
    if (p_.keep) keep();
    prepare(gradients);
    int64_t at = 0;
    for (Spec& spec : specs_) {
      Tensor here = state.narrow(0, at, state_size(spec));
      at += here.size(0);
      statistics(spec, here, losses);
      if (gradients) this->gradients(spec, here, d_temperature, nullptr);
    }
    return {losses, state, of_all_ranks(d_temperature)};
  }

  Tensor backward(const Tensor& upstream, const Tensor& state) {
    Tensor d_temperature = at::zeros({}, options_);
    // The ranks' gradients will be averaged.
    const Tensor scaled = ranks_ ? upstream.mul(ranks_.count()) : upstream;
    prepare(true);
    int64_t at = 0;
    for (Spec& spec : specs_) {
      Tensor here = state.narrow(0, at, state_size(spec));
      at += here.size(0);
      gradients(spec, here, d_temperature, scaled.template const_data_ptr<A>());
    }
    return of_all_ranks(d_temperature).mul_(upstream);
  }

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

  // ---------------------------------------------------------------- what there is to do
  // A row that no term reads is as good as not valid: what it holds must not reach the matrix
  // products.
  void mark_used() {
    if (p_.valid.empty()) return;
    for (Side& side : sides_) side.cols.valid = at::zeros_like(p_.valid[0]);
    for (size_t i = 0; i < p_.pairs.size(); i += 2) {
      const int64_t x = p_.pairs[i], y = p_.pairs[i + 1];
      both_.push_back(p_.valid[x].logical_and(p_.valid[y]));
      sides_[x].cols.valid.logical_or_(both_.back());
      sides_[y].cols.valid.logical_or_(both_.back());
    }
    if (p_.centroids.defined())
      for (int64_t i : p_.clustered) sides_[i].cols.valid.logical_or_(p_.valid[i]);
    for (Side& side : sides_)
      if (!is_column(side)) side.cols.valid = ranks_.own(side.cols.valid);
  }
  void measure(Matrix& m) {
    m.scale = at::empty({m.x.size(0)}, options_);
    m.inverse = at::empty_like(m.scale);
    const bool copies = MCN_RUN(template measure<A>, stream_, rows(m), p_.normalize);
    if (!copies) m.work = m.x;
    if (copies && p_.keep) m.work = copy(m, 0, m.x.size(0), at::empty_like(m.x));
  }
  bool is_column(const Side& side) const { return side.cols.x.size(0) == ranks_.rows(); }

  // int32 keys: equal for equal ids; the matrix is compared against them at twice the speed of
  // int64.
  Tensor keys(const Tensor& ids, const Tensor& valid) {
    Tensor key = at::arange(ranks_.rows(), options_.dtype(at::kInt));
    if (ids.defined()) key = at::searchsorted(std::get<0>(ids.sort()), ids, /*out_int32=*/true);
    return valid.defined() ? at::where(valid, key, at::full({}, -1, key.options())) : key;
  }

  void list_terms() {
    const double pairs = p_.pairs.size() / 2, modalities = p_.clustered.size();
    for (size_t i = 0; i < p_.pairs.size(); i += 2) {
      Side &x = sides_[p_.pairs[i]], &y = sides_[p_.pairs[i + 1]];
      Tensor key =
          keys(p_.ids.empty() ? Tensor() : p_.ids[i / 2], both_.empty() ? Tensor() : both_[i / 2]);
      specs_.push_back({&x, &y, ranks_.own(key), key, true, 1 / pairs, 1 / pairs, 1});
    }
    if (!p_.centroids.defined()) return;
    const Tensor clusters = at::arange(centroids_.cols.x.size(0), options_.dtype(at::kInt));
    for (int64_t i : p_.clustered) {
      Side& x = sides_[i];
      const Tensor labels = p_.labels.to(at::kInt);
      Tensor key = labels;
      if (!p_.valid.empty())
        key = at::where(ranks_.own(p_.valid[i]), labels, at::full({}, -1, labels.options()));
      const double report = p_.cluster_scale / modalities;
      specs_.push_back(
          {&x, &centroids_, key, clusters, false, p_.cluster_weight * report, report, 2});
    }
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
  void keep() {
    kept_ = at::empty({largest_matrix()}, options_);
#ifdef __linux__
    // Huge pages: touching 64 MiB for the first time in 4 KiB steps costs as much as a tenth of the
    // products.
    const auto page = reinterpret_cast<uintptr_t>(kept_.mutable_data_ptr()) & ~uintptr_t(4095);
    if (!cuda_ && kept_.nbytes() > (4 << 20))
      madvise(reinterpret_cast<void*>(page + 4096), kept_.nbytes() - 8192, MADV_HUGEPAGE);
#endif
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

  // ---------------------------------------------------------------- forward
  void statistics(Spec& spec, const Tensor& state, const Tensor& losses) {
    Term<A> t = term(spec, state);
    Tensor running = at::zeros({2 * t.n + 2 * t.m}, options_),
           positive = at::empty({t.n}, options_);
    A* at = running.template mutable_data_ptr<A>();
    t.row_sum = at, t.col_sum = at + t.n, t.row_max = at + t.n + t.m,
    t.col_max = at + 2 * t.n + t.m;
    running.narrow(0, t.n + t.m, t.n + t.m).fill_(-std::numeric_limits<double>::infinity());
    Tensor y_copy, x_copy, partial;
    const Tensor y = working(spec.y->cols, 0, t.m, y_copy);
    blocks(t.n, row_block(), [&](int64_t row, int64_t n_rows) {
      const Tensor x = working(spec.x->rows, row, n_rows, x_copy);
      blocks(t.m, col_block(), [&](int64_t col, int64_t n_cols) {
        Tensor s = tile(row, n_rows, col, n_cols, t.m);
        multiply(s, x, y.narrow(0, col, n_cols).t());
        const int64_t size = MCN_RUN(partial_size, n_rows, n_cols);
        if (!partial.defined() || partial.numel() < size) partial = at::empty({size}, options_);
        MCN_RUN(tile_statistics, stream_, t, tile_of(s, row, col),
                spec.x->rows.inverse.template const_data_ptr<A>(),
                spec.y->cols.inverse.template const_data_ptr<A>(),
                partial.template mutable_data_ptr<A>());
      });
    });
    const bool exchange = ranks_ && spec.both;
    Tensor sums = at::empty({4}, options_.dtype(at::kDouble)), merged, final;
    if (exchange) {
      merged = merge_columns(running, t);
      final = at::zeros({2, t.n}, options_);  // where a row is not there, nothing is written
    }
    const Term<A> own = exchange ? own_columns(t, merged, final) : t;
    MCN_RUN(finish, stream_, own, rows(spec.x->rows), rows(partners(spec)),
            positive.template mutable_data_ptr<A>(), sums.template mutable_data_ptr<double>());
    if (exchange)
      state.narrow(0, 2 + 3 * t.n, 2 * t.m).view({2, t.m}).copy_(ranks_.rows_to_all(final.t()).t());
    if (ranks_) sums = ranks_.to_all(sums);
    MCN_RUN(conclude, stream_, t, sums.template const_data_ptr<double>(), ranks_.count(),
            spec.weight, spec.report, spec.slot, losses.template mutable_data_ptr<A>());
  }
  // Row i's positive: row i of this rank's part, or of the centroids the one it is labelled with.
  static const Matrix& partners(const Spec& spec) {
    return spec.both ? spec.y->rows : spec.y->cols;
  }

  // ---------------------------------------------------------------- several ranks
  Tensor of_all_ranks(const Tensor& scalar) const {
    if (!ranks_ || !p_.wants_temperature) return scalar;
    return ranks_.to_all(scalar.view({1})).sum();
  }
  // (2, n) sums and maxima over all ranks of the columns that this rank owns.
  Tensor merge_columns(const Tensor& running, const Term<A>& t) const {
    const Tensor sum = running.narrow(0, t.n, t.m), max = running.narrow(0, 2 * t.n + t.m, t.m);
    const Tensor parts = ranks_.to_owners(at::stack({sum, max}, 1));
    const Tensor maxima = parts.select(2, 1), top = maxima.amax(0);
    const Tensor shift = at::where(top.isneginf(), at::zeros({}, options_), top);
    return at::stack({parts.select(2, 0).mul(maxima.sub(shift).exp_()).sum(0), top});
  }
  Term<A> own_columns(Term<A> t, const Tensor& merged, const Tensor& final) const {
    A* in = merged.template mutable_data_ptr<A>();
    A* out = final.template mutable_data_ptr<A>();
    t.m = t.n, t.col_key = t.row_key;
    t.col_sum = in, t.col_max = in + t.n, t.col_top = out, t.col_rest = out + t.n;
    return t;
  }

  // ---------------------------------------------------------------- gradients
  // A term's row side is summed in a block of its own and then added to the modality's total, so
  // that a modality with this one term never has an fp32 gradient of full size beside its result.
  void prepare(bool gradients) {
    if (!gradients) return;
    for (const Spec& spec : specs_) ++spec.x->terms, ++spec.y->terms;
    for (Side& side : sides_)
      if (side.wanted) {
        // fp32 rows: the total is the result, in place. In keep mode every result is fp32, for
        // upstream to scale.
        side.result = at::empty({rows_, dim_}, p_.keep ? options_ : first_.options());
        if (side.terms == 0) side.result.zero_();
      }
  }
  Tensor total(Side& side) {
    if (!side.total.defined())
      side.total = side.result.scalar_type() == options_.dtype()
                       ? side.result
                       : at::empty({rows_, dim_}, options_);
    return side.total;
  }

  void project(Side& side, int64_t begin, int64_t size, const Tensor& total, const A* upstream) {
    Tensor out = side.result.narrow(0, begin, size);
    MCN_RUN(project, stream_, rows(side.rows), p_.normalize, begin, begin + size,
            total.template const_data_ptr<A>(), upstream, out.mutable_data_ptr(),
            type_of(out.scalar_type()));
  }

  void gradients(Spec& spec, const Tensor& state, const Tensor& d_temperature, const A* upstream) {
    Side &x = *spec.x, &y = *spec.y;
    const bool want_x = x.wanted || p_.wants_temperature, want_y = y.wanted;
    const bool alone =
        x.terms == 1 && !x.started;  // nothing before, nothing after: rows can be finished
    if (!want_x && !want_y) return;
    Term<A> t = term(spec, state);
    const bool narrow =
        first_.scalar_type() != options_.dtype();  // 16-bit rows: the gradient of S is 16-bit too
    const bool late =
        kept_.defined() && !narrow;  // all of P is there in the end: y's sums in blocks, too
    Tensor y_copy, x_copy, p_tile, block_sums, y_sums, dots;
    const Tensor w_y = working(y.cols, 0, t.m, y_copy);
    if (want_y && (ranks_ || !late)) {
      y_sums = y.started || ranks_ ? at::empty({t.m, dim_}, options_) : total(y);
      if (t.n == 0) y_sums.zero_();  // a rank without rows
    }
    if (p_.wants_temperature) dots = at::zeros({t.n}, options_);
    blocks(t.n, row_block(), [&](int64_t row, int64_t n_rows) {
      const Tensor w_x = working(x.rows, row, n_rows, x_copy);
      const bool in_place =
          x.wanted && !x.started && !(alone && x.result.scalar_type() != options_.dtype());
      Tensor sums;
      if (want_x) {
        if (!in_place && !block_sums.defined()) block_sums = at::empty({n_rows, dim_}, options_);
        sums = in_place ? total(x).narrow(0, row, n_rows) : block_sums.narrow(0, 0, n_rows);
      }
      blocks(t.m, col_block(), [&](int64_t col, int64_t n_cols) {
        const Tensor w = w_y.narrow(0, col, n_cols);
        Tensor s = tile(row, n_rows, col, n_cols, t.m), p = s;
        if (!kept_.defined()) multiply(s, w_x, w.t());
        if (narrow) {
          if (!p_tile.defined() || p_tile.numel() < n_rows * n_cols)
            p_tile = at::empty({n_rows * n_cols}, first_.options());
          p = p_tile.narrow(0, 0, n_rows * n_cols).view({n_rows, n_cols});
        }
        MCN_RUN(tile_gradient, stream_, t, tile_of(s, row, col),
                x.rows.inverse.template const_data_ptr<A>(),
                y.cols.inverse.template const_data_ptr<A>(), p.mutable_data_ptr(),
                type_of(p.scalar_type()), p.stride(0));
        if (want_x) multiply(sums, p, w, col > 0);
        if (want_y && !late) multiply(y_sums.narrow(0, col, n_cols), p.t(), w_x, row > 0);
      });
      if (!want_x) return;
      // A frozen x is summed for the temperature's sake only, in place.
      Tensor into = x.wanted && x.started ? total(x).narrow(0, row, n_rows) : sums;
      MCN_RUN(accumulate, stream_, t, rows(x.rows), rows(partners(spec)), row, row + n_rows,
              sums.template const_data_ptr<A>(), into.template mutable_data_ptr<A>(),
              x.wanted && x.started,
              dots.defined() ? dots.template mutable_data_ptr<A>() : nullptr);
      if (x.wanted && alone) project(x, row, n_rows, into, upstream);
    });
    const auto add_y = [&](int64_t col, int64_t n_cols, const Tensor& sums) {
      MCN_RUN(accumulate, stream_, t, rows(y.rows), rows(x.rows), col, col + n_cols,
              sums.template const_data_ptr<A>(),
              total(y).narrow(0, col, n_cols).template mutable_data_ptr<A>(), y.started,
              static_cast<A*>(nullptr));
    };
    if (want_y && !late && !ranks_) add_y(0, t.m, y_sums);
    if (want_y && late)
      blocks(t.m, row_block(), [&](int64_t col, int64_t n_cols) {
        const bool scratch = y.started && !ranks_;
        if (scratch && !block_sums.defined()) block_sums = at::empty({n_cols, dim_}, options_);
        const Tensor sums = scratch ? block_sums.narrow(0, 0, n_cols)
                                    : (ranks_ ? y_sums : total(y)).narrow(0, col, n_cols);
        multiply(sums, tile(0, t.n, col, n_cols, t.m).t(), x.rows.work);
        if (!ranks_) add_y(col, n_cols, sums);
      });
    if (want_y && ranks_) {
      Tensor parts = ranks_.to_owners(y_sums);
      y_sums.reset();
      add_y(0, t.n, parts.sum(0));
    }
    if (p_.wants_temperature)
      MCN_RUN(temperature_gradient, stream_, t, dots.template const_data_ptr<A>(),
              d_temperature.template mutable_data_ptr<A>());
    x.started = y.started = true;
    --x.terms, --y.terms;
    if (x.wanted && x.terms == 0 && !alone) project(x, 0, rows_, total(x), upstream);
    if (y.wanted && y.terms == 0) project(y, 0, rows_, total(y), upstream);
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

// Autocast would round inside the matrix products: what they are given is already in the wanted
// type.
struct Guards {
  c10::DeviceGuard device;
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  explicit Guards(const Tensor& x) : device(x.device()) {}
};

template <typename F>
auto with_type(const Problem& problem, F f) {
  return problem.embeddings.at(0).scalar_type() == at::kDouble ? f(Losses<double>(problem))
                                                               : f(Losses<float>(problem));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> forward(const Problem& problem) {
  const Guards guards(problem.embeddings.at(0));
  return with_type(problem, [](auto losses) {
    auto [values, state, d_temperature] = losses.forward();
    return std::make_tuple(values, state, d_temperature, losses.results());
  });
}

std::tuple<Tensor, std::vector<Tensor>> backward(const Problem& problem, const Tensor& upstream,
                                                 const Tensor& state) {
  const Guards guards(problem.embeddings.at(0));
  return with_type(problem, [&](auto losses) {
    Tensor d_temperature = losses.backward(upstream, state);
    return std::make_tuple(d_temperature, losses.results());
  });
}

}  // namespace mcn
