#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

/// The kernels kappa(q, k): name, number and state layout. The one place that knows them all.
namespace elattn {

enum class KernelKind : int8_t { HadamardExp, SumSq, SubSq, Directional, Elu, Features };

/// Names of the kernels that `attention(kernel=...)` accepts, in the order of KernelKind.
inline constexpr std::array<std::string_view, 5> kKernelNames = {"hadamard_exp", "sum_sq", "sub_sq", "directional",
                                                                 "elu"};

/// Name of the states of `feature_attention`, whose kernel the caller supplies.
inline constexpr std::string_view kFeaturesName = "features";

/// The kind of a name, "features" included; nothing for an unknown name.
constexpr std::optional<KernelKind> kernel_kind(std::string_view name) {
  for (size_t i = 0; i < kKernelNames.size(); ++i) {
    if (kKernelNames[i] == name) return static_cast<KernelKind>(i);
  }
  if (name == kFeaturesName) return KernelKind::Features;
  return std::nullopt;
}

constexpr std::string_view kernel_name(KernelKind kind) {
  return kind == KernelKind::Features ? kFeaturesName : kKernelNames[static_cast<size_t>(kind)];
}

/// kappa is a squared distance, computed in a movable gauge (docs/math.md, section 3).
constexpr bool is_squared(KernelKind kind) {
  return kind == KernelKind::SumSq || kind == KernelKind::SubSq || kind == KernelKind::Directional;
}

/// One named part of a state: elements [offset, offset + size()) of the flat last dimension.
struct StateField {
  enum class Shape : int8_t { Scalar, Key, Value, KeyByValue };  // (), (D,), (Dv,), (D, Dv)
  const char* name;
  Shape shape;

  /// Int is int64_t, or an integer type with symbolic values.
  template <class Int = int64_t>
  constexpr Int size(const std::type_identity_t<Int>& head_dim, const std::type_identity_t<Int>& value_dim) const {
    switch (shape) {
      case Shape::Scalar: return 1;
      case Shape::Key: return head_dim;
      case Shape::Value: return value_dim;
      case Shape::KeyByValue: return head_dim * value_dim;
    }
    return 0;
  }
};

/// A view of the fields of a state, in memory order.
struct StateLayout {
  const StateField* first;
  const StateField* last;
  constexpr const StateField* begin() const { return first; }
  constexpr const StateField* end() const { return last; }

  template <class Int = int64_t>
  constexpr Int size(const std::type_identity_t<Int>& head_dim, const std::type_identity_t<Int>& value_dim) const {
    Int total = 0;
    for (const StateField& field : *this) total += field.size<Int>(head_dim, value_dim);
    return total;
  }

  /// Offset of the field called `name`; the name must exist.
  constexpr int64_t offset(std::string_view name, int64_t head_dim, int64_t value_dim) const {
    int64_t total = 0;
    for (const StateField& field : *this) {
      if (name == field.name) break;
      total += field.size(head_dim, value_dim);
    }
    return total;
  }
};

namespace detail {
using Shape = StateField::Shape;
// Sums over the keys seen, in the gauge m + r: S = sum e^(k - m - r) v^T, z = sum e^(k - m - r).
inline constexpr StateField kHadamardFields[] = {
    {"S", Shape::KeyByValue}, {"z", Shape::Key}, {"m", Shape::Key}, {"r", Shape::Key}};
// Moments of k' = k - c and v' = v - e (docs/math.md, 3.2). sv | M | T are D + 2 adjacent rows of length Dv.
inline constexpr StateField kSquaredFields[] = {{"c", Shape::Key},        {"e", Shape::Value},    {"n", Shape::Scalar},
                                                {"sk", Shape::Key},       {"skk", Shape::Scalar}, {"sv", Shape::Value},
                                                {"M", Shape::KeyByValue}, {"T", Shape::Value}};
inline constexpr StateField kFeatureFields[] = {{"S", Shape::KeyByValue}, {"z", Shape::Key}};
}  // namespace detail

constexpr StateLayout state_layout(KernelKind kind) {
  if (kind == KernelKind::HadamardExp) return {std::begin(detail::kHadamardFields), std::end(detail::kHadamardFields)};
  if (is_squared(kind)) return {std::begin(detail::kSquaredFields), std::end(detail::kSquaredFields)};
  return {std::begin(detail::kFeatureFields), std::end(detail::kFeatureFields)};
}

}  // namespace elattn
