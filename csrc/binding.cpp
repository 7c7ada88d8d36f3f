// Registers the operators of namespace mcn with torch; mcn_ext/ops.py adds fake tensors and
// autograd.
//
// torch/library.h, not torch/extension.h: the latter pulls in all of torch and pybind11 and takes
// ten times as long to compile.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "loss.h"

namespace mcn {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// JSON, so that the schema need not change when there is more to say.
std::string build_info() {
  std::string info = "{";
#if defined(__clang__)
  info += "\"compiler\": \"clang " __clang_version__ "\"";
#elif defined(__GNUC__)
  info += "\"compiler\": \"gcc " __VERSION__ "\"";
#else
  info += "\"compiler\": \"unknown\"";
#endif
  info += ", \"cplusplus\": " + std::to_string(__cplusplus);
  info += ", \"torch\": \"" TORCH_VERSION "\"";
#ifdef MCN_WITH_CUDA
  info += ", \"cuda\": true";
#else
  info += ", \"cuda\": false";
#endif
#ifdef _OPENMP
  info += ", \"openmp\": true";
#else
  info += ", \"openmp\": false";
#endif
  return info + "}";
}

#define MCN_PARAMETERS                                                                         \
  Tensors embeddings, Ints pairs, Tensors ids, Tensors valid, Tensors columns,                 \
      std::optional<Tensor> centroids, std::optional<Tensor> labels, Ints clustered,           \
      Tensor temperature, double margin, bool normalize, double cluster_weight,                \
      double cluster_scale, Ints wanted, bool wants_temperature, bool keep, int64_t tile,      \
      Ints sizes, int64_t rank, std::string group
#define MCN_PROBLEM                                                                         \
  Problem {                                                                                 \
    embeddings, pairs, ids, valid, columns, centroids.value_or(Tensor()),                   \
        labels.value_or(Tensor()), clustered, temperature, margin, normalize,               \
        cluster_weight, cluster_scale, wanted, wants_temperature, keep, tile, sizes, rank,  \
        group                                                                               \
  }
#define MCN_SCHEMA                                                                               \
  "Tensor[] embeddings, int[] pairs, Tensor[] ids, Tensor[] valid, Tensor[] columns, "           \
  "Tensor? centroids, Tensor? labels, int[] clustered, Tensor temperature, float margin, "       \
  "bool normalize, float cluster_weight, float cluster_scale, int[] wanted, "                    \
  "bool wants_temperature, bool keep, int tile, int[] sizes, int rank, str group"

std::tuple<Tensor, Tensor, Tensor, Tensors> loss(MCN_PARAMETERS) { return forward(MCN_PROBLEM); }

std::tuple<Tensor, Tensors> loss_backward(Tensor upstream, Tensor state, MCN_PARAMETERS) {
  return backward(MCN_PROBLEM, upstream, state);
}

}  // namespace
}  // namespace mcn

#ifndef MCN_LIBRARY  // the tests load a second one
#define MCN_LIBRARY mcn
#endif

TORCH_LIBRARY(MCN_LIBRARY, m) {
  m.def("build_info() -> str", &mcn::build_info);
  m.def("loss(" MCN_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def("loss_backward(Tensor upstream, Tensor state, " MCN_SCHEMA ") -> (Tensor, Tensor[])");
}
TORCH_LIBRARY_IMPL(MCN_LIBRARY, CPU, m) {
  m.impl("loss", &mcn::loss);
  m.impl("loss_backward", &mcn::loss_backward);
}
#ifdef MCN_WITH_CUDA
TORCH_LIBRARY_IMPL(MCN_LIBRARY, CUDA, m) {
  m.impl("loss", &mcn::loss);
  m.impl("loss_backward", &mcn::loss_backward);
}
#endif
