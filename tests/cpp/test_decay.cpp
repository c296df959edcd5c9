#include "inputs.h"
#include "reference.h"

namespace elattn::tests {
namespace {

/// Rates in every shape that decay may have, for 2 sequences, 2 heads, `length` tokens, 16 channels.
std::vector<at::Tensor> all_shapes(int64_t length) {
  at::manual_seed(1);
  return {at::rand({2}), at::rand({2, 16}), at::rand({2, 2, length}), at::rand({2, 2, length, 16})};
}

/// The rates of token t, in the shape that a step takes.
at::Tensor at_token(const at::Tensor& decay, int64_t t) {
  if (decay.dim() < 3) return decay;
  return decay.dim() == 3 ? decay.slice(2, t, t + 1) : decay.select(2, t);
}

}  // namespace

TEST_CASE("decay equals the quadratic form", "[decay]") {
  for (const auto& kernel : kKernels) {
    for (const int64_t length : {1, 64, 129}) {
      for (const at::Tensor& decay : all_shapes(length)) {
        if (kernel != "hadamard_exp" && (decay.dim() == 2 || decay.dim() == 4)) continue;  // no rates per channel there
        CAPTURE(kernel, length, decay.sizes());
        const Inputs x = of_length(length);
        const AttentionOptions options{.kernel = kernel, .is_causal = true, .decay = decay};
        const at::Tensor y = attention(x.q, x.k, x.v, options);
        CHECK(violation(y, reference_attention(x.q, x.k, x.v, options), forward_property(kernel)) <= 1);
      }
    }
  }
}

TEST_CASE("gradients with decay, of the rates too", "[decay][backward]") {
  for (const auto& kernel : kKernels) {
    for (const at::Tensor& rates : all_shapes(65)) {
      if (kernel != "hadamard_exp" && (rates.dim() == 2 || rates.dim() == 4)) continue;
      CAPTURE(kernel, rates.sizes());
      const Inputs inputs = of_length(65);
      const at::Tensor g = at::randn({2, 2, 65, 20});
      const auto run = [&](const auto& function, at::ScalarType dtype) {
        const Inputs x = leaves({inputs.q.to(dtype), inputs.k.to(dtype), inputs.v.to(dtype)});
        const at::Tensor decay = rates.to(dtype).requires_grad_();
        const at::Tensor y =
            function(x.q, x.k, x.v, AttentionOptions{.kernel = kernel, .is_causal = true, .decay = decay});
        return torch::autograd::grad({y}, {x.q, x.k, x.v, decay}, {g.to(dtype)});
      };
      const auto actual = run(attention, at::kFloat), expected = run(reference_attention, at::kDouble);
      for (size_t i = 0; i < actual.size(); ++i) {
        CAPTURE(i);
        CHECK(violation(actual[i], expected[i], backward_property(kernel), largest(expected[i])) <= 1);
      }
    }
  }
}

TEST_CASE("with decay, steps and splits equal one call bit for bit", "[decay][state]") {
  for (const auto& kernel : kKernels) {
    for (const at::Tensor& decay : all_shapes(65)) {
      if (kernel != "hadamard_exp" && (decay.dim() == 2 || decay.dim() == 4)) continue;
      CAPTURE(kernel, decay.sizes());
      const Inputs x = of_length(65);
      const auto [y, last] = attention_with_state(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .decay = decay});

      at::Tensor state = new_state(2, 2, 16, 20, kernel);
      std::vector<at::Tensor> steps;
      for (int64_t t = 0; t < 65; ++t) {
        steps.push_back(attention_step(x.q.select(2, t), x.k.select(2, t), x.v.select(2, t), state,
                                       {.kernel = kernel, .decay = at_token(decay, t)}));
      }
      CHECK(at::equal(at::stack(steps, 2), y));
      CHECK(at::equal(state, last));

      const auto part = [&](int64_t begin, int64_t end) {
        return decay.dim() < 3 ? decay : decay.slice(2, begin, end);
      };
      const Inputs a = rows(x, 0, 40), b = rows(x, 40, 65);
      const auto [y_a, middle] =
          attention_with_state(a.q, a.k, a.v, {.kernel = kernel, .is_causal = true, .decay = part(0, 40)});
      const auto [y_b, end] = attention_with_state(
          b.q, b.k, b.v, {.kernel = kernel, .is_causal = true, .decay = part(40, 65), .state = middle});
      CHECK(at::equal(at::cat({y_a, y_b}, 2), y));
      CHECK(at::equal(end, last));
    }
  }
}

TEST_CASE("small rates on large keys are not lost", "[decay]") {
  // One float for the gauge would lose 1e-7 beside 1e4 (docs/math.md, section 9).
  const Inputs x = of_length(129);
  for (const double rate : {1e-7, 1e-3}) {
    for (const double offset : {100.0, 1e4}) {
      CAPTURE(rate, offset);
      // Offsets on a grid, so that k + offset loses nothing.
      const at::Tensor k = (x.k * 256).round() / 256 + offset;
      const AttentionOptions options{.is_causal = true, .decay = at::full({2}, rate, at::kFloat)};
      CHECK(violation(attention(x.q, k, x.v, options), reference_attention(x.q, k, x.v, options), Property::kForward) <=
            1);
    }
  }
}

}  // namespace elattn::tests
