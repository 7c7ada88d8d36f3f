// Forward: statistics of every similarity matrix, the losses from them; and the entry points.
#include "loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "gradients.h"
#include "losses.h"
#include "terms.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mcn {
namespace {

template <typename A>
std::tuple<Tensor, Tensor, Tensor> Losses<A>::forward() {
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

template <typename A>
Tensor Losses<A>::backward(const Tensor& upstream, const Tensor& state) {
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

template <typename A>
void Losses<A>::keep() {
  kept_ = at::empty({largest_matrix()}, options_);
#ifdef __linux__
  // Huge pages: touching 64 MiB for the first time in 4 KiB steps costs as much as a tenth of the
  // products.
  const auto page = reinterpret_cast<uintptr_t>(kept_.mutable_data_ptr()) & ~uintptr_t(4095);
  if (!cuda_ && kept_.nbytes() > (4 << 20))
    madvise(reinterpret_cast<void*>(page + 4096), kept_.nbytes() - 8192, MADV_HUGEPAGE);
#endif
}

template <typename A>
void Losses<A>::statistics(Spec& spec, const Tensor& state, const Tensor& losses) {
  Term<A> t = term(spec, state);
  Tensor running = at::zeros({2 * t.n + 2 * t.m}, options_), positive = at::empty({t.n}, options_);
  A* at = running.template mutable_data_ptr<A>();
  t.row_sum = at, t.col_sum = at + t.n, t.row_max = at + t.n + t.m, t.col_max = at + 2 * t.n + t.m;
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
  MCN_RUN(conclude, stream_, t, sums.template const_data_ptr<double>(), ranks_.count(), spec.weight,
          spec.report, spec.slot, losses.template mutable_data_ptr<A>());
}

template <typename A>
Tensor Losses<A>::of_all_ranks(const Tensor& scalar) const {
  if (!ranks_ || !p_.wants_temperature) return scalar;
  return ranks_.to_all(scalar.view({1})).sum();
}

// (2, n) sums and maxima over all ranks of the columns that this rank owns.
template <typename A>
Tensor Losses<A>::merge_columns(const Tensor& running, const Term<A>& t) const {
  const Tensor sum = running.narrow(0, t.n, t.m), max = running.narrow(0, 2 * t.n + t.m, t.m);
  const Tensor parts = ranks_.to_owners(at::stack({sum, max}, 1));
  const Tensor maxima = parts.select(2, 1), top = maxima.amax(0);
  const Tensor shift = at::where(top.isneginf(), at::zeros({}, options_), top);
  return at::stack({parts.select(2, 0).mul(maxima.sub(shift).exp_()).sum(0), top});
}

template <typename A>
Term<A> Losses<A>::own_columns(Term<A> t, const Tensor& merged, const Tensor& final) const {
  A* in = merged.template mutable_data_ptr<A>();
  A* out = final.template mutable_data_ptr<A>();
  t.m = t.n, t.col_key = t.row_key;
  t.col_sum = in, t.col_max = in + t.n, t.col_top = out, t.col_rest = out + t.n;
  return t;
}

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
