#pragma once

#include <cmath>
#include <limits>

namespace elattn::cuda::emulation {

/// Rounded to nearest, where a GPU makes an error of up to 2^-22.
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.f : y;
}

}  // namespace elattn::cuda::emulation
