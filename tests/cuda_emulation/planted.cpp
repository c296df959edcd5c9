// planted NAME [LENGTH]: runs the example kernel with one planted mistake, prints what is found, and exits with 1 if
// anything is. CMakeLists.txt lists what each build of the emulation must find.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>
#include <vector>

#include "tests/cuda_emulation/chunk_forward.h"
#include "tests/cuda_emulation/device_array.h"

namespace elattn::cuda::example {
namespace {

using bf16 = __nv_bfloat16;

struct Inputs {
  int heads;
  int length;
  std::vector<bf16> q, k, v;

  Inputs(int heads, int length) : heads(heads), length(length), q(size()), k(size()), v(size()) {
    std::mt19937 generator(static_cast<unsigned>(length));
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v}) {
      for (bf16& e : *x) e = normal(generator);
    }
  }
  size_t size() const { return static_cast<size_t>(heads) * static_cast<size_t>(length) * kDim; }
};

/// The largest error of the outputs and of the state, relative to their largest element.
double error_of(const Inputs& in, float scale, const std::vector<bf16>& o, const std::vector<float>& state) {
  double errors[2] = {}, largest[2] = {};
  const auto compare = [&](int what, double expected, float actual) {
    const double error = std::isfinite(actual) ? std::abs(expected - actual) : HUGE_VAL;
    errors[what] = std::max(errors[what], error);
    largest[what] = std::max(largest[what], std::abs(expected));
  };
  const auto number = [](bf16 x) { return static_cast<double>(static_cast<float>(x)); };
  for (int h = 0; h < in.heads; ++h) {
    std::vector<double> sums(kDim * kDim);
    for (int t = 0; t < in.length; ++t) {
      const size_t row = (static_cast<size_t>(h) * static_cast<size_t>(in.length) + static_cast<size_t>(t)) * kDim;
      for (size_t i = 0; i < kDim; ++i) {
        for (size_t j = 0; j < kDim; ++j) sums[kDim * i + j] += number(in.k[row + i]) * number(in.v[row + j]);
      }
      for (size_t j = 0; j < kDim; ++j) {
        double expected = 0;
        for (size_t i = 0; i < kDim; ++i) expected += number(in.q[row + i]) * sums[kDim * i + j];
        compare(0, scale * expected, static_cast<float>(o[row + j]));
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) compare(1, sums[i], state[static_cast<size_t>(h) * sums.size() + i]);
  }
  return std::max(errors[0] / largest[0], errors[1] / largest[1]);
}

bool right(Planted planted, int heads, int length) {
  constexpr float kScale = 0.125f;
  // Twice the rounding of an output to bfloat16, and room for the roundings of the scores.
  constexpr double kTolerance = 2e-2;
  const Inputs in(heads, length);
  DeviceArray<bf16> q(in.q, "q", false), k(in.k, "k", false), v(in.v, "v", false), o(std::vector<bf16>(in.size()), "o");
  DeviceArray<float> state(std::vector<float>(static_cast<size_t>(heads) * kDim * kDim), "final_state");
  const auto start = std::chrono::steady_clock::now();
  const cudaError_t status =
      chunk_forward({q.data(), k.data(), v.data(), o.data(), state.data(), heads, length, kScale}, planted);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  for (const std::string& finding : emulation::findings()) std::printf("  finding: %s\n", finding.c_str());
  const double error = error_of(in, kScale, o.values(), state.values());
  std::printf("length %d: status %d, error %.1e, %.1f ms%s\n", length, static_cast<int>(status), error, time.count(),
              error < kTolerance ? "" : ": wrong values");
  std::fflush(stdout);
  return status == cudaSuccess && error < kTolerance;
}

int main(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "nothing";
  const auto* planted = std::find(std::begin(kPlantedNames), std::end(kPlantedNames), name);
  if (planted == std::end(kPlantedNames)) {
    std::fprintf(stderr, "unknown: %s\n", argv[1]);
    return 2;
  }
  const auto which = static_cast<Planted>(planted - std::begin(kPlantedNames));
  if (argc > 2) return !right(which, 4, std::stoi(argv[2]));
  bool all = true;
  for (const int length : {1, 63, 64, 65, 127, 200}) all &= right(which, 2, length);
  return !all;
}

}  // namespace
}  // namespace elattn::cuda::example

int main(int argc, char** argv) { return elattn::cuda::example::main(argc, argv); }
