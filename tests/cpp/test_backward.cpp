#include "inputs.h"
#include "reference.h"

namespace elattn::tests {
namespace {

void check(const Inputs& inputs, const AttentionOptions& options) {
  CAPTURE(options.kernel, options.is_causal, options.scale, options.eps, inputs.q.sizes(), inputs.k.sizes(),
          inputs.q.scalar_type());
  const Inputs x = leaves(inputs);
  const at::Tensor y = attention(x.q, x.k, x.v, options);
  const at::Tensor g = at::randn(y.sizes(), at::kDouble).to(y.scalar_type());
  const Inputs actual = gradients(y, g, x);

  const Inputs wide = leaves({inputs.q.to(at::kDouble), inputs.k.to(at::kDouble), inputs.v.to(at::kDouble)});
  const at::Tensor wanted_y = reference_attention(wide.q, wide.k, wide.v, options);
  const Inputs expected = gradients(wanted_y, g.to(at::kDouble), wide);

  check_gradients(actual, expected, options.kernel);
}

}  // namespace

TEST_CASE("gradients equal those of the quadratic form", "[backward]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      for (const auto dtype : kDtypes) {
        for (const int64_t length : kLengths) {
          check(normal({.batch = 1, .query_len = length, .key_len = length}, dtype),
                {.kernel = kernel, .is_causal = is_causal});
        }
      }
    }
  }
}

TEST_CASE("gradients with shared heads, scale, eps and other lengths", "[backward]") {
  for (const auto& kernel : kKernels) {
    const double eps = kernel == "sum_sq" || kernel == "sub_sq" ? 0.5 : 0;
    for (const bool is_causal : {false, true}) {
      check(normal({.heads = 4, .kv_heads = 2}),
            {.kernel = kernel, .is_causal = is_causal, .scale = 0.5, .eps = eps, .enable_gqa = true});
    }
    check(normal({.query_len = 3, .key_len = 129}), {.kernel = kernel});
    check(normal({.query_len = 129, .key_len = 3}), {.kernel = kernel});
    check(normal({.query_len = 5, .key_len = 0}), {.kernel = kernel});
    check(normal({.query_len = 65, .key_len = 65, .head_dim = 64, .value_dim = 33}),
          {.kernel = kernel, .is_causal = true});
  }
}

TEST_CASE("padded keys get zero gradients", "[backward][padding]") {
  for (const auto& kernel : kKernels) {
    at::Tensor padding = at::zeros({2, 65}, at::kBool);
    padding[0].slice(0, 0, 3).fill_(true);
    padding[1].slice(0, 40).fill_(true);
    for (const bool is_causal : {false, true}) {
      const AttentionOptions options{.kernel = kernel, .is_causal = is_causal, .key_padding_mask = padding};
      check(of_length(65), options);

      const Inputs x = leaves(of_length(65));
      const Inputs found = gradients(attention(x.q, x.k, x.v, options), at::ones({2, 2, 65, 20}), x);
      const at::Tensor hole = padding.view({2, 1, 65, 1});
      CHECK(found.k.masked_select(hole).count_nonzero().item<int64_t>() == 0);
      CHECK(found.v.masked_select(hole).count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("gradients of feature_attention", "[backward][features]") {
  const Inputs inputs = of_length(65);
  const at::Tensor g = at::randn({2, 2, 65, 20});
  for (const bool is_causal : {false, true}) {
    const Inputs x = leaves(inputs);
    const at::Tensor y = feature_attention(elu_plus_one(x.q), elu_plus_one(x.k), x.v, {.is_causal = is_causal});
    const Inputs actual = gradients(y, g, x);
    const Inputs wide = leaves({inputs.q.to(at::kDouble), inputs.k.to(at::kDouble), inputs.v.to(at::kDouble)});
    const AttentionOptions options{.kernel = "elu", .is_causal = is_causal};
    const Inputs expected = gradients(reference_attention(wide.q, wide.k, wide.v, options), g.to(at::kDouble), wide);
    check_gradients(actual, expected, "features");
  }
}

TEST_CASE("gradients chained through a state equal those of one call", "[backward][state]") {
  for (const auto& kernel : kKernels) {
    for (const int64_t cut : {1, 64, 100}) {
      CAPTURE(kernel, cut);
      const Inputs inputs = of_length(129);
      const at::Tensor g = at::randn({2, 2, 129, 20});
      const Inputs whole = leaves(inputs);
      const Inputs expected =
          gradients(attention(whole.q, whole.k, whole.v, {.kernel = kernel, .is_causal = true}), g, whole);

      const Inputs x = leaves(inputs);
      const Inputs a = rows(x, 0, cut), b = rows(x, cut, 129);
      const auto [y_a, state] = attention_with_state(a.q, a.k, a.v, {.kernel = kernel, .is_causal = true});
      const at::Tensor y_b = attention(b.q, b.k, b.v, {.kernel = kernel, .is_causal = true, .state = state});
      const Inputs actual = gradients(at::cat({y_a, y_b}, 2), g, x);
      check_gradients(actual, expected, kernel);
    }
  }
}

TEST_CASE("gradients of packed sequences equal those of separate calls", "[backward][packing]") {
  for (const auto& kernel : kKernels) {
    const std::vector<int64_t> ends = {0, 1, 1, 64, 129};
    const Inputs inputs = normal({.batch = 1, .query_len = 129, .key_len = 129});
    const at::Tensor g = at::randn({1, 2, 129, 20});
    const Inputs x = leaves(inputs);
    const Inputs packed = gradients(
        attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .cu_seqlens = at::tensor(ends, at::kLong)}), g,
        x);
    for (size_t n = 0; n + 1 < ends.size(); ++n) {
      const Inputs part = leaves(rows(inputs, ends[n], ends[n + 1]));
      const Inputs expected = gradients(attention(part.q, part.k, part.v, {.kernel = kernel, .is_causal = true}),
                                        g.slice(2, ends[n], ends[n + 1]), part);
      const Inputs actual = rows(packed, ends[n], ends[n + 1]);
      CHECK(at::equal(actual.q, expected.q));
      CHECK(at::equal(actual.k, expected.k));
      CHECK(at::equal(actual.v, expected.v));
    }
  }
}

TEST_CASE("equal calls give equal gradients", "[backward]") {
  for (const auto& kernel : kKernels) {
    const Inputs inputs = normal({.heads = 4, .kv_heads = 2, .query_len = 129, .key_len = 129});
    const at::Tensor g = at::randn({2, 4, 129, 20});
    const auto run = [&] {
      const Inputs x = leaves(inputs);
      return gradients(attention(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .enable_gqa = true}), g, x);
    };
    const Inputs a = run(), b = run();
    CHECK(at::equal(a.q, b.q));
    CHECK(at::equal(a.k, b.k));
    CHECK(at::equal(a.v, b.v));
  }
}

}  // namespace elattn::tests
