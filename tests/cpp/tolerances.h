#pragma once

#include "catch.h"

/// Every tolerance of the C++ tests. docs/tolerances.md derives them.
///
/// A number is the largest violation of a property that was measured with float32 sums (docs/math.md, section 7); a
/// test allows four times as much. Rounding errors grow with the unit roundoff, so for float64 the number shrinks by
/// 2^-29, but never below the error of the reference, which rounds exponents of up to 64 once. Where results are stored
/// in a narrower type than they are computed in, half a unit in their last place comes on top.
namespace elattn::tests {

enum class Property {
  kForward,           // 1: y = the quadratic reference
  kBackward,          // 2: gradients = those of the reference, relative to the largest
  kChannelGauge,      // 7: q - a, k + a
  kConstantValue,     // 8: constant v gives that constant
  kHull,              // 9: y within the visible v
  kAffine,            // 10: y(2v + 5) = 2y + 5
  kPermutation,       // 11: bidirectional, keys in another order
  kTwice,             // 11: bidirectional, every key twice
  kLastRow,           // 11: bidirectional = last causal row
  kSumOfGradQ,        // 13: sum over d of dq = 0, relative to the absolute sum
  kGradQK,            // 14: sum of dq = sum of dk, relative
  kGradV,             // 14: sum of dv = sum of g, relative
  kConstantGradient,  // 15: constant v: dq = dk = 0, relative to g v
  kDuplication,       // 19: channels twice
  kMerge,             // 21: order of merges
  kFuzz,              // 22: any magnitude, relative to the largest v
  kSquared,           // S1: y = the reference
  kSquaredBackward,   // S1: gradients, root mean square relative to that of the reference
  kTranslation,       // S2: q - s t, k + t
  kSquaredGauge,      // S6: split, decode, gauge of the state
};

inline double measured(Property property) {
  switch (property) {
    case Property::kForward: return 1.6e-6;
    case Property::kBackward: return 1.6e-6;
    case Property::kChannelGauge: return 3.4e-6;
    case Property::kConstantValue: return 2.4e-6;
    case Property::kHull: return 1.2e-7;
    case Property::kAffine: return 4.8e-6;
    case Property::kPermutation: return 1.7e-6;
    case Property::kTwice: return 5e-6;
    case Property::kLastRow: return 4e-7;
    case Property::kSumOfGradQ: return 3.7e-7;
    case Property::kGradQK: return 2.2e-7;
    case Property::kGradV: return 1.2e-7;
    case Property::kConstantGradient: return 3.3e-7;
    case Property::kDuplication: return 1.4e-6;
    case Property::kMerge: return 3e-7;
    case Property::kFuzz: return 1e-5;
    case Property::kSquared: return 1.0e-6;
    case Property::kSquaredBackward: return 6.4e-7;
    case Property::kTranslation: return 1.8e-6;
    case Property::kSquaredGauge: return 3.8e-6;
  }
  return 0;
}

inline double limit(Property property, at::ScalarType dtype) {
  const double roundoff = dtype == at::kDouble ? std::ldexp(1.0, -29) : 1.0;
  return 4 * measured(property) * roundoff + 64 * std::ldexp(1.0, -53);
}

/// Largest |actual - expected| in units of what is allowed; a test requires <= 1. `unit` is what the property is
/// measured in: 1 for outputs with v ~ N(0, 1), the largest entry for relative properties.
inline double violation(const at::Tensor& actual, const at::Tensor& expected, Property property, double unit = 1) {
  TORCH_CHECK(actual.sizes() == expected.sizes(), "sizes ", actual.sizes(), " and ", expected.sizes());
  if (actual.numel() == 0) return 0;
  const auto dtype = actual.scalar_type();
  const double half_ulp = dtype == at::kBFloat16 ? std::ldexp(1.0, -8) : dtype == at::kHalf ? std::ldexp(1.0, -11) : 0;
  const double underflow = dtype == at::kHalf ? std::ldexp(1.0, -25) : 0;
  const at::Tensor wanted = expected.detach().to(at::kDouble);
  const at::Tensor allowed = wanted.abs() * half_ulp + (limit(property, dtype) * unit + underflow);
  const at::Tensor excess = (actual.detach().to(at::kDouble) - wanted).abs() / allowed;
  return excess.isfinite().all().item<bool>() ? excess.max().item<double>() : std::numeric_limits<double>::infinity();
}

/// The unit of a relative tolerance; 1, the size of the operands, where all of it cancels.
inline double or_operands(double size) { return size > 1e-3 ? size : 1; }

inline double largest(const at::Tensor& x) {
  return or_operands(x.numel() == 0 ? 0 : x.detach().abs().max().item<double>());
}

/// The same for a property of the root mean square, relative to that of `expected`.
inline double rms_violation(const at::Tensor& actual, const at::Tensor& expected, Property property) {
  if (actual.numel() == 0) return 0;
  const auto rms = [](const at::Tensor& t) { return t.square().mean().sqrt().item<double>(); };
  const at::Tensor wanted = expected.detach().to(at::kDouble);
  const double error = rms(actual.detach().to(at::kDouble) - wanted);
  return error / (limit(property, actual.scalar_type()) * or_operands(rms(wanted)));
}

}  // namespace elattn::tests
