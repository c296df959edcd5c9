#include "inputs.h"
#include "reference.h"

namespace elattn::tests {
namespace {

constexpr int64_t kLength = 200;

/// Rows of docs/math.md, section 1.4: keys and queries that no fixed reference exponent survives.
std::vector<std::pair<std::string, Inputs>> extreme_inputs() {
  const Inputs x = normal({.query_len = kLength, .key_len = kLength});
  const at::Tensor position = at::arange(kLength, at::kFloat).view({1, 1, kLength, 1});
  const auto with_keys = [&](const at::Tensor& k) { return Inputs{x.q, k, x.v}; };
  const auto one_key = [&](int64_t t, int64_t channels) {
    at::Tensor k = x.k.clone();
    k.select(2, t).slice(-1, 0, channels).fill_(9000);
    return k;
  };
  const auto constant = [&](double value) { return Inputs{at::full_like(x.q, value), at::full_like(x.k, value), x.v}; };
  at::manual_seed(2);
  const auto uniform = [](const at::Tensor& like) { return (at::rand_like(like) - 0.5) * 2e4; };
  return {{"N(0, 10^2)", {x.q * 10, x.k * 10, x.v}},
          {"N(0, 100^2)", {x.q * 100, x.k * 100, x.v}},
          {"keys +50 per token", with_keys(x.k + position * 50)},
          {"keys +0.5 per token", with_keys(x.k + position * 0.5)},
          {"keys -50 per token", with_keys(x.k - position * 50)},
          {"one key 9000, late", with_keys(one_key(kLength - 10, 16))},
          {"one key 9000, early", with_keys(one_key(3, 16))},
          {"one key 9000, late, one channel", with_keys(one_key(kLength - 10, 1))},
          {"all 1", constant(1)},
          {"all -1e4", constant(-1e4)},
          {"-1e4 + N(0, 1)", {x.q - 1e4, x.k - 1e4, x.v}},
          {"+1e4 + N(0, 1)", {x.q + 1e4, x.k + 1e4, x.v}},
          {"U(-1e4, 1e4)", {uniform(x.q), uniform(x.k), x.v}}};
}

}  // namespace

TEST_CASE("hadamard_exp is exact at any magnitude", "[magnitudes]") {
  for (const auto& [name, inputs] : extreme_inputs()) {
    for (const bool is_causal : {false, true}) {
      CAPTURE(name, is_causal);
      const AttentionOptions options{.is_causal = is_causal};
      const Inputs x = leaves(inputs);
      const at::Tensor y = attention(x.q, x.k, x.v, options);
      CHECK(violation(y, reference_attention(inputs.q, inputs.k, inputs.v, options), Property::kForward) <= 1);

      const at::Tensor g = at::randn_like(y);
      const Inputs actual = gradients(y, g, x);
      const Inputs wide = leaves({inputs.q.to(at::kDouble), inputs.k.to(at::kDouble), inputs.v.to(at::kDouble)});
      const Inputs expected = gradients(reference_attention(wide.q, wide.k, wide.v, options), g.to(at::kDouble), wide);
      CHECK(violation(actual.v, expected.v, Property::kBackward, largest(expected.v)) <= 1);
      // Where one key dominates, gradients of q and k cancel to nothing but the rounding of g . (v - y): row 15. A
      // dominating key collects it from every row, with random signs.
      const double product = g.matmul(inputs.v.transpose(-1, -2)).abs().max().item<double>();
      const auto check_cancelling = [](const at::Tensor& found, const at::Tensor& wanted, double left_over) {
        const double relative = violation(found, wanted, Property::kBackward, largest(wanted));
        CHECK(std::min(relative, violation(found, wanted, Property::kConstantGradient, left_over)) <= 1);
      };
      check_cancelling(actual.q, expected.q, product);
      check_cancelling(actual.k, expected.k, product * std::sqrt(kLength));
    }
  }
}

TEST_CASE("squared kernels are exact far from the origin", "[magnitudes]") {
  // The table of docs/math.md, section 3.1. Offsets cancel in the difference that each kernel squares.
  const Inputs x = normal({.query_len = kLength, .key_len = kLength});
  for (const auto& [kernel, sign] : {std::pair<std::string, double>{"sum_sq", -1}, {"sub_sq", 1}}) {
    for (const double offset : {10.0, 100.0, 1e3, 1e4}) {
      for (const bool is_causal : {false, true}) {
        CAPTURE(kernel, offset, is_causal);
        const at::Tensor q = x.q + sign * offset, k = x.k + offset;
        const AttentionOptions options{.kernel = kernel, .is_causal = is_causal};
        const at::Tensor y = attention(q, k, x.v, options);
        CHECK(violation(y, reference_attention(q, k, x.v, options), Property::kTranslation) <= 1);
      }
    }
  }
}

TEST_CASE("finite inputs of any size give finite results", "[magnitudes][fuzz]") {
  const std::vector<float> magnitudes = {0, 1e-30F, -1e-30F, 1, -1, 88, -88, 104, -104, 1e4F, -1e4F, 6.5e4F, -6.5e4F};
  const at::Tensor table = at::tensor(magnitudes);
  at::manual_seed(3);
  for (int round = 0; round < 40; ++round) {
    const int64_t length = 1 + round, dim = 1 + round % 9;
    const auto pick = [&](int64_t size) {
      return table.index_select(0, at::randint(table.size(0), {2 * length * size}, at::kLong))
          .view({1, 2, length, size});
    };
    const Inputs inputs = {pick(dim), pick(dim), pick(5)};
    for (const auto& kernel : kKernels) {
      for (const bool is_causal : {false, true}) {
        CAPTURE(kernel, is_causal, length, dim);
        const Inputs x = leaves(inputs);
        const at::Tensor y = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = is_causal});
        CHECK(y.isfinite().all().item<bool>());
        const Inputs g = gradients(y, at::ones_like(y), x);
        CHECK((g.q.isfinite().all() & g.k.isfinite().all() & g.v.isfinite().all()).item<bool>());
        if (kernel == "hadamard_exp") {
          const at::Tensor wanted = reference_attention(inputs.q, inputs.k, inputs.v, {.is_causal = is_causal});
          CHECK(violation(y, wanted, Property::kFuzz, inputs.v.abs().max().item<double>()) <= 1);
        }
      }
    }
  }
}

TEST_CASE("rows whose weights are all zero give zero and zero gradients", "[magnitudes]") {
  // sub_sq: every key equals the query. sum_sq: every key is its opposite. directional: every key points away.
  for (const auto& [kernel, sign] :
       {std::pair<std::string, double>{"sub_sq", 1}, {"sum_sq", -1}, {"directional", -1}}) {
    at::Tensor q = at::zeros({1, 1, 9, 4});
    q.select(-1, 0).fill_(2);
    const Inputs x = leaves({q, q * sign, at::randn({1, 1, 9, 3})});
    const at::Tensor y = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true});
    CHECK(y.count_nonzero().item<int64_t>() == 0);
    const Inputs g = gradients(y, at::ones_like(y), x);
    for (const at::Tensor& gradient : {g.q, g.k, g.v}) CHECK(gradient.count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("NaN stays with the rows that see it", "[magnitudes]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(33);
    const at::Tensor clean = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true});
    const at::Tensor k = x.k.clone();
    k[0][0][20].fill_(std::numeric_limits<float>::quiet_NaN());
    const at::Tensor y = attention(x.q, k, x.v, {.kernel = kernel, .is_causal = true});
    CAPTURE(kernel);
    CHECK(y[0][0].slice(0, 20).isnan().all().item<bool>());
    CHECK(at::equal(y[0][0].slice(0, 0, 20), clean[0][0].slice(0, 0, 20)));
    CHECK(at::equal(y[0][1], clean[0][1]));
    CHECK(at::equal(y[1], clean[1]));
  }
}

}  // namespace elattn::tests
