#include "ops/state.h"

#include <ATen/ops/narrow.h>
#include <ATen/ops/zeros.h>
#include <c10/core/SymBool.h>
#include <torch/library.h>

#include <limits>

#include "ops/arguments.h"
#include "ops/state_views.h"

namespace elattn {
namespace {

c10::SymInt checked_state_size(const char* op, KernelKind kernel, const c10::SymInt& head_dim,
                               const c10::SymInt& value_dim) {
  TORCH_SYM_CHECK(head_dim.sym_ge(1), op, ": the head dimension must be at least 1 but is ", head_dim);
  TORCH_SYM_CHECK(value_dim.sym_ge(1), op, ": the value dimension must be at least 1 but is ", value_dim);
  return state_layout(kernel).size<c10::SymInt>(head_dim, value_dim);
}

c10::SymInt state_size_symint(std::string_view kernel, c10::SymInt head_dim, c10::SymInt value_dim) {
  const char* op = "elattn::state_size";
  return checked_state_size(op, state_kernel(op, kernel), head_dim, value_dim);
}

at::Tensor new_state_symint(c10::SymInt batch, c10::SymInt heads, c10::SymInt head_dim, c10::SymInt value_dim,
                            std::string_view kernel_name, std::optional<at::ScalarType> dtype,
                            std::optional<at::Device> device) {
  const char* op = "elattn::new_state";
  const KernelKind kernel = state_kernel(op, kernel_name);
  const at::ScalarType type = dtype.value_or(at::kFloat);
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, op, ": dtype must be Float or Double but is ", type);
  TORCH_SYM_CHECK(batch.sym_ge(0), op, ": batch must not be negative but is ", batch);
  TORCH_SYM_CHECK(heads.sym_ge(0), op, ": heads must not be negative but is ", heads);
  const c10::SymInt size = checked_state_size(op, kernel, head_dim, value_dim);
  at::Tensor state = at::zeros_symint({batch, heads, size}, at::TensorOptions().dtype(type).device(device));
  if (kernel == KernelKind::HadamardExp) {
    state_views(state, kernel, head_dim, value_dim)[2].fill_(-std::numeric_limits<double>::infinity());  // m
  }
  return state;
}

std::vector<at::Tensor> unpack_state_symint(const at::Tensor& state, c10::SymInt head_dim, c10::SymInt value_dim,
                                            std::string_view kernel_name) {
  const char* op = "elattn::unpack_state";
  const KernelKind kernel = state_kernel(op, kernel_name);
  check_state(op, "state", state, kernel, head_dim, value_dim);
  return state_views(state, kernel, head_dim, value_dim);
}

}  // namespace

void check_state(const char* op, const char* name, const at::Tensor& state, KernelKind kernel,
                 const c10::SymInt& head_dim, const c10::SymInt& value_dim) {
  const c10::SymInt size = checked_state_size(op, kernel, head_dim, value_dim);
  TORCH_CHECK(state.scalar_type() == at::kFloat || state.scalar_type() == at::kDouble, op, ": ", name,
              " must have dtype Float or Double but has ", state.scalar_type());
  TORCH_CHECK(state.dim() >= 1, op, ": ", name, " must have at least one dimension");
  TORCH_SYM_CHECK(state.sym_size(-1).sym_eq(size), op, ": the last dimension of ", name, " must be ", size,
                  " for kernel ", kernel_name(kernel), " but is ", state.sym_size(-1));
}

std::vector<at::Tensor> state_views(const at::Tensor& state, KernelKind kernel, const c10::SymInt& head_dim,
                                    const c10::SymInt& value_dim) {
  std::vector<at::Tensor> views;
  c10::SymInt offset = 0;
  for (const StateField& field : state_layout(kernel)) {
    const c10::SymInt size = field.size<c10::SymInt>(head_dim, value_dim);
    at::Tensor view = state.narrow_symint(-1, offset, size);
    if (field.shape == StateField::Shape::Scalar) view = view.squeeze(-1);
    if (field.shape == StateField::Shape::KeyByValue) view = view.unflatten_symint(-1, {head_dim, value_dim});
    views.push_back(view);
    offset += size;
  }
  return views;
}

std::vector<std::string> kernels() { return {kKernelNames.begin(), kKernelNames.end()}; }

int64_t state_size(std::string_view kernel, int64_t head_dim, int64_t value_dim) {
  return state_size_symint(kernel, head_dim, value_dim).expect_int();
}

std::vector<std::string> state_fields(std::string_view kernel) {
  std::vector<std::string> names;
  for (const StateField& field : state_layout(state_kernel("elattn::state_fields", kernel))) {
    names.emplace_back(field.name);
  }
  return names;
}

at::Tensor new_state(int64_t batch, int64_t heads, int64_t head_dim, int64_t value_dim, std::string_view kernel,
                     const at::TensorOptions& options) {
  const auto dtype = options.has_dtype() ? std::optional(c10::typeMetaToScalarType(options.dtype())) : std::nullopt;
  return new_state_symint(batch, heads, head_dim, value_dim, kernel, dtype, options.device_opt());
}

std::map<std::string, at::Tensor> unpack_state(const at::Tensor& state, int64_t head_dim, int64_t value_dim,
                                               std::string_view kernel) {
  const std::vector<at::Tensor> views = unpack_state_symint(state, head_dim, value_dim, kernel);
  const std::vector<std::string> names = state_fields(kernel);
  std::map<std::string, at::Tensor> result;
  for (size_t i = 0; i < views.size(); ++i) result.emplace(names[i], views[i]);
  return result;
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("kernels() -> str[]", kernels, tags);
  m.def("state_size(str kernel, SymInt head_dim, SymInt value_dim) -> SymInt", state_size_symint, tags);
  m.def("state_fields(str kernel) -> str[]", state_fields, tags);
  m.def(
      "new_state(SymInt batch, SymInt heads, SymInt head_dim, SymInt value_dim, *, str kernel=\"hadamard_exp\", "
      "ScalarType? dtype=None, Device? device=None) -> Tensor",
      new_state_symint, tags);
  m.def(
      "unpack_state(Tensor(a) state, SymInt head_dim, SymInt value_dim, *, str kernel=\"hadamard_exp\") "
      "-> Tensor(a)[]",
      unpack_state_symint, tags);
}

}  // namespace elattn
