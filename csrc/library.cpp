#include "library.h"

#include <torch/library.h>

namespace elattn {

std::string version() { return ELATTN_VERSION; }

namespace {

bool has_cuda() {
#ifdef ELATTN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  m.def("_version() -> str", version);
  m.def("_has_cuda() -> bool", has_cuda);
}

#ifndef ELATTN_WITH_CUDA
namespace {

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": this build of elattn has no CUDA kernels; move the tensors to the CPU with .cpu()");
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, CUDA, m) {
  for (const char* op : {"attention", "attention_with_state", "_attention_backward", "attention_step",
                         "feature_attention", "feature_attention_with_state", "_feature_attention_backward",
                         "feature_attention_step", "grouped_linear", "_grouped_outer"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif

}  // namespace elattn
