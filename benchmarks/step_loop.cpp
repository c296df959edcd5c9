// elattn::attention_step called in a loop from C++, and an operator that does nothing, to tell what a call costs.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

namespace {

using Step = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, std::string_view,
                        double, double, bool, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);

// One pass over tokens of (B, H, D), `repeats` times; the last output.
at::Tensor step_loop(const std::vector<at::Tensor>& q, const std::vector<at::Tensor>& k,
                     const std::vector<at::Tensor>& v, const at::Tensor& state, int64_t repeats) {
  static const auto step = c10::Dispatcher::singleton().findSchemaOrThrow("elattn::attention_step", "").typed<Step>();
  at::Tensor out;
  for (int64_t r = 0; r < repeats; ++r)
    for (size_t t = 0; t < q.size(); ++t)
      out = step.call(q[t], k[t], v[t], state, "hadamard_exp", 1.0, 0.0, false, std::nullopt, std::nullopt);
  return out;
}

void no_op(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY(elattn_bench, m) {
  m.def("step_loop(Tensor[] q, Tensor[] k, Tensor[] v, Tensor(a!) state, int repeats) -> Tensor");
  m.def("no_op(Tensor q, Tensor k, Tensor v, Tensor(a!) state) -> ()");
}

TORCH_LIBRARY_IMPL(elattn_bench, CPU, m) {
  m.impl("step_loop", step_loop);
  m.impl("no_op", no_op);
}
