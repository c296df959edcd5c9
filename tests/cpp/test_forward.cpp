#include "inputs.h"
#include "reference.h"

namespace elattn::tests {
namespace {

void check(const Inputs& x, const AttentionOptions& options) {
  CAPTURE(options.kernel, options.is_causal, options.scale, options.eps, x.q.sizes(), x.k.sizes(), x.q.scalar_type());
  const at::Tensor y = attention(x.q, x.k, x.v, options);
  CHECK(y.scalar_type() == x.q.scalar_type());
  CHECK(violation(y, reference_attention(x.q, x.k, x.v, options), forward_property(options.kernel)) <= 1);
}

}  // namespace

TEST_CASE("attention equals the quadratic form", "[forward]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      for (const auto dtype : kDtypes) {
        for (const int64_t length : kLengths) {
          check(of_length(length, dtype), {.kernel = kernel, .is_causal = is_causal});
        }
      }
    }
  }
}

TEST_CASE("attention equals the quadratic form for small and large keys", "[forward]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      for (const double std : {0.5, 2.0, 8.0}) {
        check(of_length(129, at::kFloat, std), {.kernel = kernel, .is_causal = is_causal});
      }
    }
  }
}

TEST_CASE("scale and eps enter the kernel", "[forward]") {
  for (const auto& kernel : kKernels) {
    check(of_length(65), {.kernel = kernel, .is_causal = true, .scale = 0.25});
  }
  for (const std::string kernel : {"sum_sq", "sub_sq"}) {
    check(of_length(65), {.kernel = kernel, .is_causal = true, .eps = 0.5});
    check(of_length(65), {.kernel = kernel, .scale = 2.0, .eps = 0.5});
  }
}

TEST_CASE("head dimensions and value dimensions from 1 to 256", "[forward]") {
  for (const auto& kernel : kKernels) {
    for (const auto& [head_dim, value_dim] : {std::pair{1, 1}, {1, 33}, {3, 5}, {64, 64}, {129, 17}, {17, 256}}) {
      const Sizes sizes{.batch = 1, .query_len = 33, .key_len = 33, .head_dim = head_dim, .value_dim = value_dim};
      check(normal(sizes), {.kernel = kernel, .is_causal = true});
      check(normal(sizes), {.kernel = kernel});
    }
  }
}

TEST_CASE("bidirectional queries and keys of different lengths", "[forward]") {
  for (const auto& kernel : kKernels) {
    for (const auto& [query_len, key_len] : {std::pair{1, 129}, {129, 1}, {64, 65}, {5, 0}, {0, 5}}) {
      check(normal({.query_len = query_len, .key_len = key_len}), {.kernel = kernel});
    }
  }
}

TEST_CASE("heads share keys, values and sums", "[forward][gqa]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      check(normal({.heads = 6, .kv_heads = 2}), {.kernel = kernel, .is_causal = is_causal, .enable_gqa = true});
      check(normal({.heads = 3, .kv_heads = 1}), {.kernel = kernel, .is_causal = is_causal, .enable_gqa = true});
    }
  }
}

TEST_CASE("empty batches and no heads", "[forward]") {
  for (const auto& kernel : kKernels) {
    check(normal({.batch = 0}), {.kernel = kernel, .is_causal = true});
    check(normal({.heads = 0, .kv_heads = 0}), {.kernel = kernel});
  }
}

TEST_CASE("padded keys are ignored and never read", "[forward][padding]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      const Inputs x = of_length(65);
      at::Tensor padding = at::zeros({2, 65}, at::kBool);
      padding[0].slice(0, 0, 3).fill_(true);  // the first rows see no key
      padding[1].slice(0, 40).fill_(true);
      padding[1][7].fill_(true);
      const at::Tensor hole = padding.view({2, 1, 65, 1});
      x.k.masked_fill_(hole, std::numeric_limits<float>::quiet_NaN());
      x.v.masked_fill_(hole, std::numeric_limits<float>::quiet_NaN());
      check(x, {.kernel = kernel, .is_causal = is_causal, .key_padding_mask = padding});
    }
  }
}

TEST_CASE("strided inputs are read in place", "[forward][strides]") {
  for (const auto& kernel : kKernels) {
    at::manual_seed(0);
    const at::Tensor qkv = at::randn({2, 65, 3, 4, 16});  // one projection, (B, L, 3, H, D)
    const Inputs x = {qkv.select(2, 0).transpose(1, 2), qkv.select(2, 1).transpose(1, 2),
                      qkv.select(2, 2).transpose(1, 2)};
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    check(x, options);
    CHECK(at::equal(attention(x.q, x.k, x.v, options),
                    attention(x.q.contiguous(), x.k.contiguous(), x.v.contiguous(), options)));

    const auto last_dim_strided = [](const at::Tensor& t) { return t.transpose(2, 3).contiguous().transpose(2, 3); };
    CHECK(at::equal(attention(x.q, x.k, x.v, options),
                    attention(last_dim_strided(x.q), last_dim_strided(x.k), last_dim_strided(x.v), options)));

    const at::Tensor shared = x.k.slice(0, 0, 1).expand_as(x.k);
    CHECK(at::equal(attention(x.q, shared, x.v, options), attention(x.q, shared.contiguous(), x.v, options)));
  }
}

TEST_CASE("packed sequences equal separate calls bit for bit", "[forward][packing]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      for (const auto type : {at::kInt, at::kLong}) {
        const Inputs x = normal({.batch = 1, .query_len = 129, .key_len = 129});
        const std::vector<int64_t> ends = {0, 0, 1, 64, 64, 129};
        AttentionOptions options{.kernel = kernel, .is_causal = is_causal};
        options.cu_seqlens = at::tensor(ends, at::kLong).to(type);
        const auto [y, state] = attention_with_state(x.q, x.k, x.v, options);
        REQUIRE(state.size(0) == 5);
        options.cu_seqlens = {};
        for (size_t n = 0; n + 1 < ends.size(); ++n) {
          CAPTURE(kernel, is_causal, n);
          const Inputs part = rows(x, ends[n], ends[n + 1]);
          const auto [expected, expected_state] = attention_with_state(part.q, part.k, part.v, options);
          CHECK(at::equal(y.slice(2, ends[n], ends[n + 1]), expected));
          CHECK(at::equal(state.slice(0, n, n + 1), expected_state));
        }
      }
    }
  }
}

TEST_CASE("the other members of a batch change no bit", "[forward]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = normal({.batch = 3, .query_len = 64, .key_len = 64});
    const AttentionOptions options{.kernel = kernel, .is_causal = true};
    const at::Tensor y = attention(x.q, x.k, x.v, options);
    for (int64_t b = 0; b < 3; ++b) {
      CHECK(at::equal(y.slice(0, b, b + 1),
                      attention(x.q.slice(0, b, b + 1), x.k.slice(0, b, b + 1), x.v.slice(0, b, b + 1), options)));
    }
  }
}

TEST_CASE("feature_attention equals elu attention of its features", "[forward][features]") {
  const Inputs x = normal({.heads = 4, .kv_heads = 2});
  for (const bool is_causal : {false, true}) {
    const at::Tensor y =
        feature_attention(elu_plus_one(x.q), elu_plus_one(x.k), x.v, {.is_causal = is_causal, .enable_gqa = true});
    const AttentionOptions options{.kernel = "elu", .is_causal = is_causal, .enable_gqa = true};
    CHECK(violation(y, reference_attention(x.q, x.k, x.v, options), Property::kForward) <= 1);
  }
}

}  // namespace elattn::tests
