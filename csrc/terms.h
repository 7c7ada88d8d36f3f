// What there is to do: the rows that count, and a term for each pair and each clustered modality.
#pragma once

#include "losses.h"

#ifdef MCN_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace mcn {
namespace {

template <typename A>
Losses<A>::Losses(const Problem& problem)
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
      const int64_t bad = MCN_RUN(first_outside, stream_, labels.template const_data_ptr<int64_t>(),
                                  valid, rows_, centroids_.cols.x.size(0));
      TORCH_CHECK_VALUE(bad < 0, "labels[", bad, "] = ", labels[bad].template item<int64_t>(),
                        " is outside [0, ", centroids_.cols.x.size(0), ")");
    }
  }
  list_terms();
}

// A row that no term reads is as good as not valid: what it holds must not reach the matrix
// products.
template <typename A>
void Losses<A>::mark_used() {
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

// int32 keys: equal for equal ids; the matrix is compared against them at twice the speed of
// int64.
template <typename A>
Tensor Losses<A>::keys(const Tensor& ids, const Tensor& valid) {
  Tensor key = at::arange(ranks_.rows(), options_.dtype(at::kInt));
  if (ids.defined()) key = at::searchsorted(std::get<0>(ids.sort()), ids, /*out_int32=*/true);
  return valid.defined() ? at::where(valid, key, at::full({}, -1, key.options())) : key;
}

template <typename A>
void Losses<A>::list_terms() {
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

}  // namespace
}  // namespace mcn
