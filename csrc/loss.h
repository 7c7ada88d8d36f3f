// The losses of any device; loss.cpp says how.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <vector>

namespace mcn {

// The arguments of mcn::loss, as binding.cpp registers it and mcn_ext/ops.py calls it.
struct Problem {
  std::vector<at::Tensor> embeddings;  // (n, D) each, of one dtype: this rank's rows
  std::vector<int64_t> pairs;          // 2 per pair, into embeddings
  std::vector<at::Tensor> ids;         // none, or (N,) int64 per pair, of all ranks' rows
  std::vector<at::Tensor> valid;       // none, or (N,) bool per modality, of all ranks' rows
  std::vector<at::Tensor> columns;     // none, or per modality: all ranks' rows if it is second in
                                       // any pair, else this rank's
  at::Tensor centroids, labels;        // (K, D), (n,) int64, or undefined
  std::vector<int64_t> clustered;      // into embeddings
  at::Tensor temperature;              // scalar of the type that is computed in
  double margin;
  bool normalize;
  double cluster_weight;        // of the clustering in the total
  double cluster_scale;         // of the sum over rows and modalities' mean: 1 / log K
  std::vector<int64_t> wanted;  // per modality: its gradient, or not (0)
  bool wants_temperature;
  bool keep;     // the similarity matrix
  int64_t tile;  // rows and columns of a tile; 0: chosen
  std::vector<int64_t> sizes;  // rows of each rank, their sum is N; none: there is one rank, n = N
  int64_t rank;
  std::string group;  // of ranks, by its name in torch.distributed
};

// (total, contrastive, cluster) in one tensor, state for backward, d total / d temperature, and in
// keep mode the gradient of each wanted modality, fp32 (fp64 for fp64).
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    const Problem& problem);

// Streaming: d temperature and the gradients, times upstream, in the embeddings' dtype.
std::tuple<at::Tensor, std::vector<at::Tensor>> backward(const Problem& problem,
                                                         const at::Tensor& upstream,
                                                         const at::Tensor& state);

}  // namespace mcn
