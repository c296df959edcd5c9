#include "inputs.h"
#include "reference.h"

/// Properties of the mathematics that need no reference; the numbers are the rows of docs/math.md, section 7.
namespace elattn::tests {
namespace {

const AttentionOptions kCausal = {.is_causal = true};

struct Run {
  Inputs x;
  at::Tensor y, g;
  Inputs grad;
};

Run run(const Inputs& inputs, const AttentionOptions& options) {
  Run r;
  r.x = leaves(inputs);
  r.y = attention(r.x.q, r.x.k, r.x.v, options);
  r.g = at::randn_like(r.y);
  r.grad = gradients(r.y, r.g, r.x);
  return r;
}

/// Largest entry of x in units of `unit`, as a violation of 0.
double violation_of_zero(const at::Tensor& x, Property property, double unit = 1) {
  return violation(x, at::zeros_like(x), property, unit);
}

}  // namespace

TEST_CASE("7: moving a channel's offset from k to q changes nothing", "[properties]") {
  for (const double std : {0.5, 2.0, 8.0}) {
    const Inputs x = of_length(129, at::kFloat, std);
    const at::Tensor shift = at::randn({1, 2, 1, 16}) * 3;
    CHECK(violation(attention(x.q - shift, x.k + shift, x.v, kCausal), attention(x.q, x.k, x.v, kCausal),
                    Property::kChannelGauge) <= 1);
  }
}

TEST_CASE("8: a constant v gives that constant; the first row gives the first v", "[properties]") {
  for (const auto& kernel : kKernels) {
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    const Inputs x = of_length(129);
    const at::Tensor constant = at::full_like(x.v, 1.5);
    CAPTURE(kernel);
    CHECK(violation(attention(x.q, x.k, constant, options), constant, Property::kConstantValue) <= 1);
    CHECK(violation(attention(x.q, x.k, x.v, options).select(2, 0), x.v.select(2, 0), Property::kHull, 1) <= 1);
  }
}

TEST_CASE("9: y lies within the visible v", "[properties]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(129, at::kFloat, 2);
    const at::Tensor y = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true});
    const at::Tensor low = std::get<0>(x.v.cummin(2)), high = std::get<0>(x.v.cummax(2));
    const Property property = is_squared(kernel) ? Property::kSquared : Property::kConstantValue;
    CAPTURE(kernel);
    CHECK(violation_of_zero((low - y).clamp_min(0), property) <= 1);
    CHECK(violation_of_zero((y - high).clamp_min(0), property) <= 1);
  }
}

TEST_CASE("10: y is affine in v", "[properties]") {
  for (const auto& kernel : kKernels) {
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    const Inputs x = of_length(129);
    const at::Tensor expected = attention(x.q, x.k, x.v, options) * 2 + 5;
    CHECK(violation(attention(x.q, x.k, x.v * 2 + 5, options), expected, Property::kAffine) <= 1);
  }
}

TEST_CASE("11: bidirectional attention knows no order", "[properties]") {
  for (const auto& kernel : kKernels) {
    const AttentionOptions both{.kernel = kernel};
    const Inputs x = of_length(129);
    const at::Tensor y = attention(x.q, x.k, x.v, both);
    const at::Tensor order = at::randperm(129);
    CAPTURE(kernel);
    CHECK(violation(attention(x.q, x.k.index_select(2, order), x.v.index_select(2, order), both), y,
                    Property::kPermutation) <= 1);
    CHECK(violation(attention(x.q, at::cat({x.k, x.k}, 2), at::cat({x.v, x.v}, 2), both), y, Property::kTwice) <= 1);
    const at::Tensor causal = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true});
    CHECK(violation(y.select(2, -1), causal.select(2, -1), Property::kLastRow) <= 1);
  }
}

TEST_CASE("12: a gradient that stops at row t stops at key t", "[properties]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = leaves(of_length(65));
    const at::Tensor y = attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true});
    at::Tensor g = at::randn_like(y);
    g.slice(2, 40).fill_(0);
    const Inputs found = gradients(y, g, x);
    for (const at::Tensor& gradient : {found.q, found.k, found.v}) {
      CHECK(gradient.slice(2, 40).count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("13 and 14: sums of gradients", "[properties]") {
  for (const bool is_causal : {false, true}) {
    for (const double std : {0.5, 2.0, 8.0}) {
      const Run r = run(of_length(129, at::kFloat, std), {.is_causal = is_causal});
      const double absolute = r.grad.q.abs().to(at::kDouble).sum(-1).max().item<double>();
      const at::Tensor sum = r.grad.q.to(at::kDouble).sum(-1);
      CHECK(violation_of_zero(sum.to(at::kFloat), Property::kSumOfGradQ, absolute) <= 1);

      const auto total = [](const at::Tensor& t) { return t.to(at::kDouble).sum(2); };
      const auto scale = [](const at::Tensor& t) { return t.abs().to(at::kDouble).sum(2).max().item<double>(); };
      CHECK(violation_of_zero((total(r.grad.q) - total(r.grad.k)).to(at::kFloat), Property::kGradQK, scale(r.grad.q)) <=
            1);
      CHECK(violation_of_zero((total(r.grad.v) - total(r.g)).to(at::kFloat), Property::kGradV, scale(r.g)) <= 1);
    }
  }
}

TEST_CASE("15: a constant v gives no gradient to q and k", "[properties]") {
  Inputs x = of_length(129);
  x.v = at::full_like(x.v, 1.5);
  for (const auto& kernel : kKernels) {
    const Run r = run(x, {.kernel = kernel, .is_causal = true});
    const double unit = (r.g * 1.5).sum(-1).abs().max().item<double>();
    CAPTURE(kernel);
    if (is_squared(kernel)) {  // the values sit at their gauge, so nothing is left to round
      CHECK(at::equal(r.y, r.x.v));
      CHECK(r.grad.q.count_nonzero().item<int64_t>() == 0);
      CHECK(r.grad.k.count_nonzero().item<int64_t>() == 0);
    } else if (kernel == "hadamard_exp") {
      CHECK(violation_of_zero(r.grad.q, Property::kConstantGradient, unit) <= 1);
      CHECK(violation_of_zero(r.grad.k, Property::kConstantGradient, unit) <= 1);
    }
  }
}

TEST_CASE("19: channels twice; a key at -1e4 is no key", "[properties]") {
  const Inputs x = of_length(65);
  const at::Tensor y = attention(x.q, x.k, x.v, kCausal);
  CHECK(violation(attention(at::cat({x.q, x.q}, -1), at::cat({x.k, x.k}, -1), x.v, kCausal), y,
                  Property::kDuplication) <= 1);

  const auto drop = [](const at::Tensor& t) { return at::cat({t.slice(2, 0, 30), t.slice(2, 31)}, 2); };
  Inputs far = {x.q, x.k.clone(), x.v};
  far.k.select(2, 30).fill_(-1e4);
  const Run r = run(far, kCausal);
  CHECK(violation(drop(r.y), attention(drop(x.q), drop(x.k), drop(x.v), kCausal), Property::kDuplication) <= 1);
  CHECK(r.grad.k.select(2, 30).count_nonzero().item<int64_t>() == 0);
  CHECK(r.grad.v.select(2, 30).count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("S2: squared kernels move with their keys", "[properties]") {
  // On a grid, so that the translation itself rounds nothing.
  Inputs x = of_length(129);
  x.q = (x.q * 256).round() / 256;
  x.k = (x.k * 256).round() / 256;
  const at::Tensor shift = (at::randn({1, 2, 1, 16}) * 200).round();
  for (const auto& [kernel, sign] : {std::pair<std::string, double>{"sum_sq", 1}, {"sub_sq", -1}}) {
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    const at::Tensor y = attention(x.q, x.k, x.v, options);
    CHECK(violation(attention(x.q - shift * sign, x.k + shift, x.v, options), y, Property::kTranslation) <= 1);
  }
}

TEST_CASE("S3: powers of two and signs change no bit", "[properties]") {
  const Inputs x = of_length(129);
  for (const std::string kernel : {"sum_sq", "sub_sq"}) {
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    const at::Tensor y = attention(x.q, x.k, x.v, options);
    CHECK(at::equal(attention(x.q * 128, x.k * 128, x.v, options), y));
  }
  CHECK(at::equal(attention(x.q, x.k, x.v, {.kernel = "sum_sq", .is_causal = true}),
                  attention(-x.q, x.k, x.v, {.kernel = "sub_sq", .is_causal = true})));
}

TEST_CASE("S4: sums of gradients of the squared kernels", "[properties]") {
  for (const auto& [kernel, sign] : {std::pair<std::string, double>{"sum_sq", 1}, {"sub_sq", -1}}) {
    const Run r = run(of_length(129), {.kernel = kernel, .is_causal = true});
    const at::Tensor dq = r.grad.q.to(at::kDouble), dk = r.grad.k.to(at::kDouble);
    const double unit = std::max(dq.abs().sum(2).max().item<double>(), dk.abs().sum(2).max().item<double>());
    CHECK(violation_of_zero((dq.sum(2) - dk.sum(2) * sign).to(at::kFloat), Property::kGradQK, unit) <= 1);
    const double terms = ((dq * r.x.q).abs().sum() + (dk * r.x.k).abs().sum()).item<double>();
    CHECK(violation_of_zero(((dq * r.x.q).sum() + (dk * r.x.k).sum()).to(at::kFloat), Property::kGradV, terms) <= 1);
  }
}

TEST_CASE("E1: directional attention ignores the length of q", "[properties]") {
  const Inputs x = of_length(129);
  const AttentionOptions options{.kernel = "directional", .is_causal = true};
  const at::Tensor y = attention(x.q, x.k, x.v, options);
  CHECK(at::equal(attention(x.q * 8, x.k, x.v, options), y));
}

}  // namespace elattn::tests
