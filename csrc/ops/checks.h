#pragma once

#include <ATen/core/Tensor.h>

/// Rules that the arguments of every operator keep. A message has the operator, the rule and the value met.
namespace elattn {

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, ": ", name,
              " must have dtype Float, Double, BFloat16 or Half but has ", type);
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                             const at::Tensor& other) {
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(), " but ",
              other_name, " has ", other.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                         const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": ", name, " is on ", tensor.device(), " but ", other_name,
              " is on ", other.device());
}

}  // namespace elattn
