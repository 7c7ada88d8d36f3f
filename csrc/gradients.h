// Gradients: each tile of P = dL/dS times the rows of both of its sides, or of one.
#pragma once

#include "losses.h"

namespace mcn {
namespace {

// A term's row side is summed in a block of its own and then added to the modality's total, so
// that a modality with this one term never has an fp32 gradient of full size beside its result.
template <typename A>
void Losses<A>::prepare(bool gradients) {
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

template <typename A>
Tensor Losses<A>::total(Side& side) {
  if (!side.total.defined())
    side.total = side.result.scalar_type() == options_.dtype() ? side.result
                                                               : at::empty({rows_, dim_}, options_);
  return side.total;
}

template <typename A>
void Losses<A>::project(Side& side, int64_t begin, int64_t size, const Tensor& total,
                        const A* upstream) {
  Tensor out = side.result.narrow(0, begin, size);
  MCN_RUN(project, stream_, rows(side.rows), p_.normalize, begin, begin + size,
          total.template const_data_ptr<A>(), upstream, out.mutable_data_ptr(),
          type_of(out.scalar_type()));
}

template <typename A>
void Losses<A>::gradients(Spec& spec, const Tensor& state, const Tensor& d_temperature,
                          const A* upstream) {
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
            x.wanted && x.started, dots.defined() ? dots.template mutable_data_ptr<A>() : nullptr);
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

}  // namespace
}  // namespace mcn
