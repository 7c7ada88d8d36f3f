// The losses of any device; loss.cpp says how.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace mcn {

// The arguments of mcn::loss, in the order in which binding.cpp registers them.
struct Problem {
  std::vector<at::Tensor> embeddings;  // (n, D) each, of one dtype: this rank's rows
  std::vector<at::Tensor> ids;         // none, or (N,) int64 per pair, of all ranks' rows
  std::vector<at::Tensor> valid;       // none, or (N,) bool per modality, of all ranks' rows
  std::vector<at::Tensor> columns;     // none, or per modality: all ranks' rows if it is second in
                                       // any pair, else this rank's
  std::vector<at::Tensor> weights;     // none, or 2 per pair, (N,): of rows and of columns in the
                                       // mean, 1 on average
  at::Tensor bags;                     // (N,) int64, or undefined
  at::Tensor centroids, labels;        // (K, D), (n,) int64, or undefined
  at::Tensor scalars;  // temperature and bias (2,), of the type that is computed in,
  double fixed_temperature, fixed_bias;  // or undefined: these
  double margin;
  int64_t kind;                    // of the pairs' loss, see Kind
  double q, lambda;                // of RINCE
  std::vector<int64_t> pairs;      // 2 per pair, into embeddings
  std::vector<int64_t> clustered;  // into embeddings
  bool normalize;
  double cluster_weight;        // of the clustering in the total
  double cluster_scale;         // of the sum over rows and modalities' mean: 1 / log K
  std::vector<int64_t> wanted;  // per modality: its gradient, or not (0)
  bool wants_scalars;
  bool keep;                   // what similarity matrices are needed for, from forward to backward
  int64_t tile;                // rows and columns of a tile; 0: chosen
  std::vector<int64_t> sizes;  // rows of each rank, their sum is N; none: there is one rank, n = N
  int64_t rank;
  std::string group;  // of ranks, by its name in torch.distributed
};

struct Forward {
  at::Tensor total;  // scalar
  at::Tensor parts;  // (8,) contrastive, cluster, scratch (2), two doubles: d scalars so far
  at::Tensor state;  // statistics for backward
  std::vector<at::Tensor> kept;  // in keep mode, per term: P (n, columns), of the embeddings' dtype
};
struct Backward {
  at::Tensor scalars;                 // (2,)
  std::vector<at::Tensor> gradients;  // of each wanted modality, in the embeddings' dtype
};

Forward forward(const Problem& problem);
Backward backward(const Problem& problem, const at::Tensor& upstream, const Forward& forward);

}  // namespace mcn
