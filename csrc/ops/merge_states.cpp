#include "ops/merge_states.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "ops/attention_shape.h"
#include "ops/state_views.h"

/// docs/math.md, sections 5 and 9, in differentiable operators. Gauges (m, r, c, e) are detached: they are not inputs
/// of the function that a state stands for, and gradients hold at fixed gauge.
namespace elattn {
namespace {

/// `column` (..., D) or (...) times each row of `matrix` (..., D, Dv) or vector (..., D).
at::Tensor scale_rows(const at::Tensor& rows, const at::Tensor& column) { return rows * column.unsqueeze(-1); }

/// The factor exp(-decay): 1-d and 2-d rates get a batch dimension, and a missing channel dimension is 1.
at::Tensor decay_rates(const at::Tensor& decay) { return decay.dim() == 1 ? decay.unsqueeze(-1) : decay; }

struct Gauge {
  at::Tensor high, low;  // the sum of two floats, (B, Hkv, D)
};

Gauge gauge(const at::Tensor& m, const at::Tensor& r, const at::Tensor& z) {
  const double infinity = std::numeric_limits<double>::infinity();
  const at::Tensor seen = z.detach() != 0;  // a channel without mass has no say in the gauge
  return {at::where(seen, m.detach(), -infinity), at::where(seen, r.detach(), 0.0)};
}

/// a + b, exactly, unless it overflows.
Gauge two_sum(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor high = a + b;
  const at::Tensor t = high - a;
  return {high, at::where(at::isfinite(high), (a - (high - t)) + (b - t), 0.0)};
}

Gauge decayed(const Gauge& g, const at::Tensor& rates) { return two_sum(g.high, g.low - rates.detach()); }

/// exp(from - to), 0 where `from` is empty. In one float a difference of 20 would be wrong by up to 1e-6.
at::Tensor rescaling(const Gauge& from, const Gauge& to) {
  const at::Tensor empty = at::isneginf(from.high);
  const Gauge difference = two_sum(from.high, -to.high);
  return at::where(empty, 0.0, at::exp(difference.high) * at::exp(difference.low + (from.low - to.low)));
}

at::Tensor merge_hadamard(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                          const OptionalTensor& decay) {
  const at::Tensor &S_a = a[0], &z_a = a[1], &S_b = b[0], &z_b = b[1];
  Gauge of_a = gauge(a[2], a[3], z_a);
  const Gauge of_b = gauge(b[2], b[3], z_b);
  at::Tensor derivative_of_decay;
  if (decay) {
    const at::Tensor rates = decay_rates(*decay);
    of_a = decayed(of_a, rates);
    derivative_of_decay = at::exp(rates.detach() - rates);  // 1, with derivative -1
  }
  const at::Tensor a_is_higher =
      (of_a.high > of_b.high).logical_or((of_a.high == of_b.high).logical_and(of_a.low >= of_b.low));
  const Gauge merged{at::where(a_is_higher, of_a.high, of_b.high), at::where(a_is_higher, of_a.low, of_b.low)};
  at::Tensor scale_a = rescaling(of_a, merged);
  if (decay) scale_a = scale_a * derivative_of_decay;
  const at::Tensor scale_b = rescaling(of_b, merged);
  const at::Tensor S = scale_rows(S_a, scale_a) + scale_rows(S_b, scale_b);
  const at::Tensor z = z_a * scale_a + z_b * scale_b;
  return at::cat({S.flatten(-2), z, merged.high, merged.low}, -1);
}

at::Tensor merge_sums(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& decay) {
  return (decay ? a * at::exp(-decay_rates(*decay)) : a) + b;
}

/// Moments of keys and values in the gauge (c, e); names as in section 3.2.
struct Moments {
  at::Tensor n, sk, skk, sv, M, T;
};

at::Tensor row_dot(const at::Tensor& x, const at::Tensor& y) { return (x * y).sum(-1); }

at::Tensor outer_product(const at::Tensor& x, const at::Tensor& y) { return x.unsqueeze(-1) * y.unsqueeze(-2); }

/// The same moments in the gauge (c + d, e + h).
Moments shifted(Moments s, const at::Tensor& d, const at::Tensor& h) {
  s.T = s.T - 2 * (s.M * d.unsqueeze(-1)).sum(-2) + scale_rows(s.sv, row_dot(d, d));
  s.M = s.M - outer_product(d, s.sv);
  s.skk = s.skk - 2 * row_dot(d, s.sk) + s.n * row_dot(d, d);
  s.sk = s.sk - scale_rows(d, s.n);
  s.T = s.T - scale_rows(h, s.skk);
  s.M = s.M - outer_product(s.sk, h);
  s.sv = s.sv - scale_rows(h, s.n);
  return s;
}

/// The gauge of the merged state in one of keys and values: the mean, but exactly that of the other side where one is
/// empty. `mean` is the first moment by n, relative to the gauge.
at::Tensor merged_gauge(const at::Tensor& gauge_a, const at::Tensor& mean_a, const at::Tensor& gauge_b,
                        const at::Tensor& mean_b, const at::Tensor& share_b, const at::Tensor& empty_a,
                        const at::Tensor& empty_b) {
  const at::Tensor distance = (gauge_b - gauge_a) + (mean_b - mean_a);
  const at::Tensor mean = gauge_a + (mean_a + scale_rows(distance, share_b));
  return at::where(empty_b, gauge_a, at::where(empty_a, gauge_b, mean));
}

at::Tensor merge_squared(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                         const OptionalTensor& decay) {
  const at::Tensor c_a = a[0].detach(), e_a = a[1].detach(), c_b = b[0].detach(), e_b = b[1].detach();
  Moments of_a{a[2], a[3], a[4], a[5], a[6], a[7]};
  const Moments of_b{b[2], b[3], b[4], b[5], b[6], b[7]};
  if (decay) {
    const at::Tensor factor = at::exp(-decay_rates(*decay));  // (Hkv, 1) or (B, Hkv, 1)
    const at::Tensor scalar = factor.squeeze(-1);
    of_a = {of_a.n * scalar, of_a.sk * factor, of_a.skk * scalar, of_a.sv * factor, of_a.M * factor.unsqueeze(-1),
            of_a.T * factor};
  }

  const at::Tensor n_a = of_a.n.detach(), n_b = of_b.n.detach();
  const at::Tensor empty_a = (n_a == 0).unsqueeze(-1), empty_b = (n_b == 0).unsqueeze(-1);
  const auto mean = [](const at::Tensor& sum, const at::Tensor& n) {
    return sum.detach() / at::where(n == 0, 1.0, n).unsqueeze(-1);
  };
  const at::Tensor total = n_a + n_b;
  const at::Tensor share_b = n_b / at::where(total == 0, 1.0, total);
  const auto merged = [&](const at::Tensor& gauge_a, const at::Tensor& sum_a, const at::Tensor& gauge_b,
                          const at::Tensor& sum_b) {
    return merged_gauge(gauge_a, mean(sum_a, n_a), gauge_b, mean(sum_b, n_b), share_b, empty_a, empty_b);
  };
  const at::Tensor c = merged(c_a, of_a.sk, c_b, of_b.sk);
  const at::Tensor e = merged(e_a, of_a.sv, e_b, of_b.sv);

  // An empty side has no gauge to move away from.
  const Moments x = shifted(of_a, at::where(empty_a, 0.0, c - c_a), at::where(empty_a, 0.0, e - e_a));
  const Moments y = shifted(of_b, at::where(empty_b, 0.0, c - c_b), at::where(empty_b, 0.0, e - e_b));
  return at::cat({c, e, (x.n + y.n).unsqueeze(-1), x.sk + y.sk, (x.skk + y.skk).unsqueeze(-1), x.sv + y.sv,
                  (x.M + y.M).flatten(-2), x.T + y.T},
                 -1);
}

at::Tensor merge_states_symint(const at::Tensor& a, const at::Tensor& b, c10::SymInt head_dim, c10::SymInt value_dim,
                               std::string_view kernel_name, const OptionalTensor& decay) {
  const char* op = "elattn::merge_states";
  const KernelKind kernel = state_kernel(op, kernel_name);
  check_state(op, "a", a, kernel, head_dim, value_dim);
  check_state(op, "b", b, kernel, head_dim, value_dim);
  TORCH_CHECK(a.dim() == 3, op, ": a must have shape (B, Hkv, state_size) but has ", a.sym_sizes());
  TORCH_CHECK(b.dim() == 3, op, ": b must have shape (B, Hkv, state_size) but has ", b.sym_sizes());
  TORCH_SYM_CHECK(a.sym_size(0).sym_eq(b.sym_size(0)) & a.sym_size(1).sym_eq(b.sym_size(1)), op, ": b has shape ",
                  b.sym_sizes(), " but a has ", a.sym_sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": b has dtype ", b.scalar_type(), " but a has ",
              a.scalar_type());
  TORCH_CHECK(a.device() == b.device(), op, ": b is on ", b.device(), " but a is on ", a.device());
  OptionalTensor rates;
  if (decay) {
    check_step_decay(op, kernel, *decay, a.sym_size(0), a.sym_size(1), head_dim);
    TORCH_CHECK(decay->is_floating_point(), op, ": decay must be of a floating-point dtype but has ",
                decay->scalar_type());
    rates = decay->to(a.scalar_type());
  }
  if (kernel == KernelKind::HadamardExp || is_squared(kernel)) {
    const auto of_a = state_views(a, kernel, head_dim, value_dim), of_b = state_views(b, kernel, head_dim, value_dim);
    return kernel == KernelKind::HadamardExp ? merge_hadamard(of_a, of_b, rates) : merge_squared(of_a, of_b, rates);
  }
  return merge_sums(a, b, rates);
}

}  // namespace

at::Tensor merge_states(const at::Tensor& a, const at::Tensor& b, int64_t head_dim, int64_t value_dim,
                        std::string_view kernel, const std::optional<at::Tensor>& decay) {
  return merge_states_symint(a, b, head_dim, value_dim, kernel, decay);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  m.def(
      "merge_states(Tensor a, Tensor b, SymInt head_dim, SymInt value_dim, *, str kernel=\"hadamard_exp\", "
      "Tensor? decay=None) -> Tensor",
      merge_states_symint, {at::Tag::pt2_compliant_tag});
}

}  // namespace elattn
