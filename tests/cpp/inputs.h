#pragma once

#include <array>
#include <string>

#include "catch.h"
#include "elattn.h"
#include "tolerances.h"

/// Inputs of the tests, and attention with any kernel, "features" included.
namespace elattn::tests {

inline const std::array<std::string, 5> kKernels = {"hadamard_exp", "sum_sq", "sub_sq", "directional", "elu"};
inline const std::array<int64_t, 6> kLengths = {0, 1, 63, 64, 65, 129};
inline const std::array<at::ScalarType, 4> kDtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

struct Inputs {
  at::Tensor q, k, v;
};

struct Sizes {
  int64_t batch = 2, heads = 2, kv_heads = 2, query_len = 65, key_len = 65, head_dim = 16, value_dim = 20;
};

/// q and k ~ N(0, std^2), v ~ N(0, 1), the same for every call with the same arguments.
inline Inputs normal(const Sizes& s, at::ScalarType dtype = at::kFloat, double std = 1) {
  at::manual_seed(0);
  const auto randn = [&](at::IntArrayRef sizes, double scale) {
    return (at::randn(sizes, at::kDouble) * scale).to(dtype);
  };
  return {randn({s.batch, s.heads, s.query_len, s.head_dim}, std),
          randn({s.batch, s.kv_heads, s.key_len, s.head_dim}, std),
          randn({s.batch, s.kv_heads, s.key_len, s.value_dim}, 1)};
}

inline Inputs of_length(int64_t length, at::ScalarType dtype = at::kFloat, double std = 1) {
  return normal({.query_len = length, .key_len = length}, dtype, std);
}

inline Inputs rows(const Inputs& x, int64_t begin, int64_t end) {
  return {x.q.slice(2, begin, end), x.k.slice(2, begin, end), x.v.slice(2, begin, end)};
}

inline bool is_squared(const std::string& kernel) {
  return kernel == "sum_sq" || kernel == "sub_sq" || kernel == "directional";
}

inline Property forward_property(const std::string& kernel) {
  return is_squared(kernel) ? Property::kSquared : Property::kForward;
}

/// Leaves of a graph of their own.
inline Inputs leaves(const Inputs& x) {
  const auto leaf = [](const at::Tensor& t) { return t.detach().clone().requires_grad_(); };
  return {leaf(x.q), leaf(x.k), leaf(x.v)};
}

/// Gradients of <g, y> for q, k and v.
inline Inputs gradients(const at::Tensor& y, const at::Tensor& g, const Inputs& x) {
  auto found = torch::autograd::grad({y}, {x.q, x.k, x.v}, {g});
  return {found[0], found[1], found[2]};
}

/// Gradients of q, k and v against those of the reference: the largest error by row 2, and for the squared kernels the
/// root mean square by row S1 as well, unless the stored type rounds more than that.
inline void check_gradients(const Inputs& actual, const Inputs& expected, const std::string& kernel) {
  const auto check = [&](const at::Tensor& found, const at::Tensor& wanted) {
    CHECK(violation(found, wanted, Property::kBackward, largest(wanted)) <= 1);
    const bool wide = found.scalar_type() == at::kFloat || found.scalar_type() == at::kDouble;
    if (wide && is_squared(kernel)) CHECK(rms_violation(found, wanted, Property::kSquaredBackward) <= 1);
  };
  check(actual.q, expected.q);
  check(actual.k, expected.k);
  check(actual.v, expected.v);
}

}  // namespace elattn::tests
