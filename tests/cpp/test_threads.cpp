#include <ATen/Parallel.h>

#include "inputs.h"

namespace elattn::tests {
namespace {

/// Runs `f` with a number of threads and puts the number back.
template <class F>
auto with_threads(int count, const F& f) {
  const int before = at::get_num_threads();
  at::set_num_threads(count);
  auto result = f();
  at::set_num_threads(before);
  return result;
}

}  // namespace

TEST_CASE("the number of threads changes no bit", "[threads]") {
  for (const auto& kernel : kKernels) {
    for (const bool is_causal : {false, true}) {
      // One head with many value columns, few heads, many heads: each is shared out differently.
      for (const Sizes& sizes :
           {Sizes{.batch = 1,
           .heads = 1,
           .kv_heads = 1,
           .query_len = 129,
           .key_len = 129,
           .head_dim = 64,
           .value_dim = 200},
            Sizes{.batch = 1, .heads = 3, .kv_heads = 3}, Sizes{.batch = 3, .heads = 8, .kv_heads = 4}}) {
        CAPTURE(kernel, is_causal, sizes.batch, sizes.heads);
        const Inputs inputs = normal(sizes);
        const auto run = [&] {
          const Inputs x = leaves(inputs);
          const auto [y, state] =
              attention_with_state(x.q, x.k, x.v, {.kernel = kernel, .is_causal = is_causal, .enable_gqa = true});
          const Inputs g = gradients(y, at::ones_like(y), x);
          return std::vector<at::Tensor>{y.detach(), state.detach(), g.q, g.k, g.v};
        };
        const auto one = with_threads(1, run), two = with_threads(2, run), three = with_threads(3, run);
        for (size_t i = 0; i < one.size(); ++i) {
          CAPTURE(i);
          CHECK(at::equal(one[i], two[i]));
          CHECK(at::equal(one[i], three[i]));
        }
      }
    }
  }
}

TEST_CASE("the number of threads changes no bit of a long causal call, whose heads are shared", "[threads]") {
  // Whole blocks of a team and a part of one, groups, columns that are no whole number of cache lines.
  for (const std::string kernel : {"hadamard_exp", "elu"}) {
    for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
      CAPTURE(kernel, dtype);
      const Inputs inputs = normal(
          {.batch = 1, .heads = 2, .kv_heads = 1, .query_len = 2500, .key_len = 2500, .head_dim = 72, .value_dim = 100},
          dtype, 8);
      const auto run = [&] {
        const Inputs x = leaves(inputs);
        const auto [y, state] =
            attention_with_state(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .enable_gqa = true});
        const auto g = torch::autograd::grad({y, state}, {x.q, x.k, x.v}, {at::ones_like(y), at::ones_like(state)});
        return std::vector<at::Tensor>{y.detach(), state.detach(), g[0], g[1], g[2]};
      };
      const auto one = with_threads(1, run);
      for (const int threads : {2, 3, 5}) {
        const auto shared = with_threads(threads, run);
        for (size_t i = 0; i < one.size(); ++i) {
          CAPTURE(threads, i);
          CHECK(at::equal(one[i], shared[i]));
        }
      }
    }
  }
}

TEST_CASE("the number of threads changes no bit of a step", "[threads]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = normal({.batch = 5, .heads = 4, .kv_heads = 2, .query_len = 1, .key_len = 1});
    const auto run = [&] {
      at::Tensor state = new_state(5, 2, 16, 20, kernel);
      std::vector<at::Tensor> results;
      for (int t = 0; t < 3; ++t) {
        results.push_back(attention_step(x.q.select(2, 0) + t, x.k.select(2, 0) * t, x.v.select(2, 0), state,
                                         {.kernel = kernel, .enable_gqa = true}));
      }
      results.push_back(state);
      return results;
    };
    const auto one = with_threads(1, run), two = with_threads(2, run);
    for (size_t i = 0; i < one.size(); ++i) CHECK(at::equal(one[i], two[i]));
  }
}

}  // namespace elattn::tests
