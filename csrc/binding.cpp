// Registers the operators of namespace mcn with torch.
//
// torch/library.h, not torch/extension.h: the latter pulls in all of torch and pybind11 and takes ten
// times as long to compile.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

namespace mcn {


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
  return info + "}";
}

}  // namespace mcn

TORCH_LIBRARY(mcn, m) {
  m.def("build_info() -> str", &mcn::build_info);
}
