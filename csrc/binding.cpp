// Registers the operators of namespace mcn with torch, and their autograd; mcn_ext/ops.py adds fake
// tensors.
//
// Boxed: an operator's arguments arrive as one list, so that they are spelled out in the schema and
// in loss.h's Problem, and nowhere else. torch/library.h, not torch/extension.h: the latter pulls
// in all of torch and pybind11, takes ten times as long to compile and ties the library to a
// Python.
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "loss.h"

#ifndef MCN_LIBRARY  // the tests load a second one
#define MCN_LIBRARY mcn
#endif
#define MCN_TEXT_OF(name) #name
#define MCN_TEXT(name) MCN_TEXT_OF(name)

namespace mcn {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

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

// Lists of tensors, then single ones, then the rest.
#define MCN_ARGUMENTS                                                                            \
  "Tensor[] embeddings, Tensor[] ids, Tensor[] valid, Tensor[] columns, Tensor[] weights, "      \
  "Tensor? bags, Tensor? centroids, Tensor? labels, Tensor? scalars, float fixed_temperature, "  \
  "float fixed_bias, float margin, int kind, float q, float lam, int[] pairs, int[] clustered, " \
  "bool normalize, float cluster_weight, float cluster_scale, int[] wanted, "                    \
  "bool wants_scalars, bool keep, int tile, int[] sizes, int rank, str group"
constexpr size_t kLists = 5, kTensors = 9, kArguments = 27, kScalars = 8, kWanted = 20;

Problem problem_of(at::ArrayRef<IValue> a) {
  size_t next = 0;
  const auto list = [&] { return a[next++].toTensorVector(); };
  const auto tensor = [&] {
    const IValue& value = a[next++];
    return value.isNone() ? Tensor() : value.toTensor();
  };
  const auto real = [&] { return a[next++].toDouble(); };
  const auto whole = [&] { return a[next++].toInt(); };
  const auto ints = [&] { return a[next++].toIntVector(); };
  const auto flag = [&] { return a[next++].toBool(); };
  // Braces: evaluated in this order.
  return {
      list(), list(), list(), list(),  list(), tensor(), tensor(), tensor(), tensor(),
      real(), real(), real(), whole(), real(), real(),   ints(),   ints(),   flag(),
      real(), real(), ints(), flag(),  flag(), whole(),  ints(),   whole(),  a[next].toStringRef()};
}

// (arguments) -> total, parts, state, kept
void loss(const c10::OperatorHandle&, Stack* stack) {
  Forward found = forward(problem_of(torch::jit::last(*stack, kArguments)));
  torch::jit::drop(*stack, kArguments);
  torch::jit::push(*stack, found.total, found.parts, found.state, std::move(found.kept));
}

// (upstream, parts, state, kept, arguments) -> d scalars, gradients
void loss_backward(const c10::OperatorHandle&, Stack* stack) {
  const auto given = torch::jit::last(*stack, kArguments + 4);
  Backward found =
      backward(problem_of(given.slice(4)), given[0].toTensor(),
               {Tensor(), given[1].toTensor(), given[2].toTensor(), given[3].toTensorVector()});
  torch::jit::drop(*stack, kArguments + 4);
  torch::jit::push(*stack, found.scalars, std::move(found.gradients));
}

c10::OperatorHandle operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// Gradients as they are, but an error for whoever differentiates them by what they depend on.
struct Last : torch::autograd::Function<Last> {
  static variable_list forward(AutogradContext*, at::TensorList /*inputs*/,
                               at::TensorList gradients) {
    variable_list out;
    for (const Tensor& g : gradients) out.push_back(g.clone());
    return out;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "mcn_ext's compiled losses have no second derivative; "
                                "mcn_ext.reference's losses have");
  }
};

IValue tuple_of(const std::vector<int64_t>& numbers) {
  return c10::ivalue::Tuple::create(std::vector<IValue>(numbers.begin(), numbers.end()));
}
std::vector<int64_t> ints_of(const IValue& tuple) {
  std::vector<int64_t> numbers;
  for (const IValue& number : tuple.toTupleRef().elements()) numbers.push_back(number.toInt());
  return numbers;
}

struct Loss : torch::autograd::Function<Loss> {
  static variable_list forward(AutogradContext* ctx, Stack* arguments,
                               const std::optional<Tensor>& /*scalars*/,
                               at::TensorList /*embeddings*/) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = operator_of(MCN_TEXT(MCN_LIBRARY) "::loss");
    Stack stack = *arguments;
    op.callBoxed(stack);  // total, parts, state, kept
    const variable_list kept = stack[3].toTensorVector();
    variable_list out{stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
    out.insert(out.end(), kept.begin(), kept.end());
    // Tensors are saved apart from the other arguments: torch then finds out who changes one.
    variable_list saved(out.begin() + 1, out.end());
    for (size_t i = 0; i < kTensors; ++i) {
      IValue& value = (*arguments)[i];
      const variable_list tensors = i < kLists       ? value.toTensorVector()
                                    : value.isNone() ? variable_list{}
                                                     : variable_list{value.toTensor()};
      saved.insert(saved.end(), tensors.begin(), tensors.end());
      value = static_cast<int64_t>(tensors.size());
    }
    ctx->save_for_backward(saved);
    for (IValue& value : *arguments)  // compiled autograd hashes them, which lists are not made for
      if (value.isIntList()) value = tuple_of(value.toIntVector());
    ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(std::move(*arguments));
    ctx->saved_data["kept"] = static_cast<int64_t>(kept.size());
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Stack arguments = ctx->saved_data["arguments"].toTupleRef().elements().vec();
    for (IValue& value : arguments)
      if (value.isTuple()) value = ints_of(value);
    const std::vector<int64_t> wanted = arguments[kWanted].toIntVector();
    // For each input of forward: the arguments, the scalars, each embedding.
    variable_list gradients(2 + wanted.size());
    if (!upstream[0].defined()) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    auto next = saved.begin();
    const auto some = [&](int64_t count) {
      next += count;
      return variable_list(next - count, next);
    };
    Stack stack{upstream[0]};
    for (const Tensor& t : some(2)) stack.emplace_back(t);
    stack.emplace_back(some(ctx->saved_data["kept"].toInt()));
    for (size_t i = 0; i < kTensors; ++i) {
      const variable_list tensors = some(arguments[i].toInt());
      if (i < kLists) stack.emplace_back(tensors);
      else stack.push_back(tensors.empty() ? IValue() : IValue(tensors[0]));
    }
    stack.insert(stack.end(), arguments.begin() + kTensors, arguments.end());
    variable_list inputs = stack[4].toTensorVector();
    inputs.push_back(upstream[0]);
    if (!stack[4 + kScalars].isNone()) inputs.push_back(stack[4 + kScalars].toTensor());
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      static const auto op = operator_of(MCN_TEXT(MCN_LIBRARY) "::loss_backward");
      op.callBoxed(stack);
    }
    variable_list found = stack[1].toTensorVector();
    if (arguments[kWanted + 1].toBool()) found.push_back(stack[0].toTensor());
    if (at::GradMode::is_enabled())  // create_graph=True
      found = Last::apply(at::TensorList(inputs), at::TensorList(found));
    if (arguments[kWanted + 1].toBool()) gradients[1] = found.back();
    for (size_t i = 0, at = 0; i < wanted.size(); ++i)
      if (wanted[i]) gradients[2 + i] = found[at++];
    return gradients;
  }
};

void loss_autograd(const c10::OperatorHandle&, Stack* stack) {
  Stack arguments = torch::jit::pop(*stack, kArguments);
  const std::optional<Tensor> scalars = arguments[kScalars].toOptional<Tensor>();
  const variable_list embeddings = arguments[0].toTensorVector();
  variable_list out = Loss::apply(&arguments, scalars, at::TensorList(embeddings));
  // The others have no gradients. (Marked so, compiled autograd would refuse them.) Terms are the
  // user's to change: this tensor has a version of its own.
  for (size_t i = 1; i < out.size(); ++i) out[i] = out[i].variable_data();
  const variable_list kept(out.begin() + 3, out.end());
  torch::jit::push(*stack, out[0], out[1], out[2], kept);
}

}  // namespace
}  // namespace mcn

#define MCN_BOXED(function) torch::CppFunction::makeFromBoxedFunction<&mcn::function>()

TORCH_LIBRARY(MCN_LIBRARY, m) {
  m.def("build_info() -> str", &mcn::build_info);
  m.def("loss(" MCN_ARGUMENTS ") -> (Tensor total, Tensor parts, Tensor state, Tensor[] kept)");
  m.def("loss_backward(Tensor upstream, Tensor parts, Tensor state, Tensor[] kept, " MCN_ARGUMENTS
        ") -> (Tensor scalars, Tensor[] gradients)");
}
TORCH_LIBRARY_IMPL(MCN_LIBRARY, CPU, m) {
  m.impl("loss", MCN_BOXED(loss));
  m.impl("loss_backward", MCN_BOXED(loss_backward));
}
#ifdef MCN_WITH_CUDA
TORCH_LIBRARY_IMPL(MCN_LIBRARY, CUDA, m) {
  m.impl("loss", MCN_BOXED(loss));
  m.impl("loss_backward", MCN_BOXED(loss_backward));
}
#endif
TORCH_LIBRARY_IMPL(MCN_LIBRARY, Autograd, m) { m.impl("loss", MCN_BOXED(loss_autograd)); }
