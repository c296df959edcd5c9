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

TEST_CASE("gradients with decay and of the rates", "[decay][backward]") {
  for (const auto& kernel : kKernels) {
    for (const at::Tensor& rates : all_shapes(65)) {
      if (kernel != "hadamard_exp" && (rates.dim() == 2 || rates.dim() == 4)) continue;
      CAPTURE(kernel, rates.sizes());
      const Inputs inputs = of_length(65);
      const at::Tensor g = at::randn({2, 2, 65, 20});
      const Inputs x = leaves(inputs);
      const at::Tensor decay = rates.clone().requires_grad_();
      const at::Tensor y = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .decay = decay});
      const auto actual = torch::autograd::grad({y}, {x.q, x.k, x.v, decay}, {g});

      // The reference takes a rate for each token, so that the terms of a broadcast rate's gradient can be seen.
      const Inputs wide = leaves({inputs.q.to(at::kDouble), inputs.k.to(at::kDouble), inputs.v.to(at::kDouble)});
      at::Tensor each = rates.to(at::kDouble);
      if (rates.dim() == 1) each = each.view({1, 2, 1}).expand({2, 2, 65});
      if (rates.dim() == 2) each = each.view({1, 2, 1, 16}).expand({2, 2, 65, 16});
      each = each.clone().requires_grad_();
      const at::Tensor wanted =
          reference_attention(wide.q, wide.k, wide.v, {.kernel = kernel, .is_causal = true, .decay = each});
      auto expected = torch::autograd::grad({wanted}, {wide.q, wide.k, wide.v, each}, {g.to(at::kDouble)});
      const auto collect = [&](const at::Tensor& t) { return rates.dim() < 3 ? t.sum(at::IntArrayRef{0, 2}) : t; };
      const double terms = largest(collect(expected[3].abs()));
      expected[3] = collect(expected[3]);
      check_gradients({actual[0], actual[1], actual[2]}, {expected[0], expected[1], expected[2]}, kernel);
      CHECK(violation(actual[3], expected[3], Property::kBackward, terms) <= 1);
    }
  }
}

TEST_CASE("with decay steps and splits equal one call bit for bit", "[decay][state]") {
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
