#include "inputs.h"
#include "reference.h"

namespace elattn::tests {
namespace {

struct Result {
  at::Tensor y, state;
};

Result causal(const std::string& kernel, const Inputs& x, const std::optional<at::Tensor>& state = {}) {
  const auto [y, last] =
      attention_with_state(x.q, x.k, x.v, {.kernel = kernel, .is_causal = true, .enable_gqa = true, .state = state});
  return {y, last};
}

Result step_by_step(const std::string& kernel, const Inputs& x) {
  at::Tensor state = new_state(x.k.size(0), x.k.size(1), x.k.size(3), x.v.size(3), kernel,
                               x.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  std::vector<at::Tensor> steps;
  for (int64_t t = 0; t < x.q.size(2); ++t) {
    steps.push_back(attention_step(x.q.select(2, t), x.k.select(2, t), x.v.select(2, t), state,
                                   {.kernel = kernel, .enable_gqa = true}));
  }
  return {at::stack(steps, 2), state};
}

/// The output for queries that read a state and no keys.
at::Tensor read(const std::string& kernel, const at::Tensor& q, const at::Tensor& state) {
  const at::Tensor k = at::empty({q.size(0), q.size(1), 0, q.size(3)}), v = at::empty({q.size(0), q.size(1), 0, 20});
  return attention(q, k, v, {.kernel = kernel, .state = state});
}

}  // namespace

TEST_CASE("steps equal the causal call bit for bit", "[state]") {
  for (const auto& kernel : kKernels) {
    for (const auto dtype : kDtypes) {
      for (const Sizes& sizes :
           {Sizes{}, Sizes{.heads = 6, .query_len = 33, .key_len = 33, .head_dim = 7, .value_dim = 3},
            Sizes{.query_len = 17, .key_len = 17, .head_dim = 64, .value_dim = 64}}) {
        CAPTURE(kernel, dtype, sizes.head_dim);
        const Inputs x = normal(sizes, dtype);
        const Result whole = causal(kernel, x), steps = step_by_step(kernel, x);
        CHECK(at::equal(steps.y, whole.y));
        CHECK(at::equal(steps.state, whole.state));
      }
    }
  }
}

TEST_CASE("a split at any token changes no bit", "[state]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(40);
    const Result whole = causal(kernel, x);
    for (int64_t cut = 0; cut <= 40; ++cut) {
      CAPTURE(kernel, cut);
      const Result a = causal(kernel, rows(x, 0, cut));
      const at::Tensor before = a.state.clone();
      const Result b = causal(kernel, rows(x, cut, 40), a.state);
      CHECK(at::equal(at::cat({a.y, b.y}, 2), whole.y));
      CHECK(at::equal(b.state, whole.state));
      CHECK(at::equal(a.state, before));
    }
  }
}

TEST_CASE("later tokens change no earlier row", "[state]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(65);
    const Inputs edited = {x.q.clone(), x.k.clone(), x.v.clone()};
    for (const at::Tensor& t : {edited.q, edited.k, edited.v}) t.slice(2, 40).fill_(100);
    CHECK(at::equal(causal(kernel, edited).y.slice(2, 0, 40), causal(kernel, x).y.slice(2, 0, 40)));
  }
}

TEST_CASE("the empty state counts for nothing", "[state]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(33);
    const at::Tensor empty = new_state(2, 2, 16, 20, kernel);
    CHECK(empty.size(2) == state_size(kernel, 16, 20));
    const Result fresh = causal(kernel, x), after_empty = causal(kernel, x, empty);
    CHECK(at::equal(fresh.y, after_empty.y));
    CHECK(at::equal(fresh.state, after_empty.state));
    CHECK(at::equal(causal(kernel, rows(x, 0, 0)).state, empty));
    CHECK(read(kernel, x.q, empty).count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("a state stands for its keys in bidirectional calls", "[state]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(65);
    const auto [part, state] = attention_with_state(x.q, x.k.slice(2, 0, 40), x.v.slice(2, 0, 40), {.kernel = kernel});
    const at::Tensor y = attention(x.q, x.k.slice(2, 40), x.v.slice(2, 40), {.kernel = kernel, .state = state});
    const Property property = is_squared(kernel) ? Property::kSquaredGauge : Property::kForward;
    CHECK(violation(y, reference_attention(x.q, x.k, x.v, {.kernel = kernel}), property) <= 1);
  }
}

TEST_CASE("slots pick rows of a pool and leave the others alone", "[state][slots]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = normal({.batch = 3, .query_len = 1, .key_len = 1});
    const auto token = [](const at::Tensor& t) { return t.select(2, 0); };
    at::Tensor pool = new_state(5, 2, 16, 20, kernel);
    pool.copy_(causal(kernel, normal({.batch = 5, .query_len = 9, .key_len = 9})).state);
    const at::Tensor before = pool.clone();
    at::Tensor expected = before.slice(0, 1, 2).clone();
    const at::Tensor expected_y = attention_step(token(x.q).slice(0, 2), token(x.k).slice(0, 2), token(x.v).slice(0, 2),
                                                 expected, {.kernel = kernel});

    const at::Tensor slots = at::tensor({4, -1, 1}, at::kLong);
    const at::Tensor y = attention_step(token(x.q), token(x.k), token(x.v), pool, {.kernel = kernel, .slots = slots});
    CHECK(at::equal(y.slice(0, 2), expected_y));
    CHECK(y[1].count_nonzero().item<int64_t>() == 0);
    CHECK(at::equal(pool.slice(0, 1, 2), expected));
    CHECK_FALSE(at::equal(pool[4], before[4]));
    for (const int64_t untouched : {0, 2, 3}) CHECK(at::equal(pool[untouched], before[untouched]));
  }
}

TEST_CASE("feature steps equal the causal call bit for bit", "[state][features]") {
  const Inputs x = of_length(33);
  const at::Tensor phi = elu_plus_one(x.q), psi = elu_plus_one(x.k);
  const auto [y, last] = feature_attention_with_state(phi, psi, x.v, {.is_causal = true});
  at::Tensor state = new_state(2, 2, 16, 20, "features");
  for (int64_t t = 0; t < 33; ++t) {
    const at::Tensor row = feature_attention_step(phi.select(2, t), psi.select(2, t), x.v.select(2, t), state);
    CHECK(at::equal(row, y.select(2, t)));
  }
  CHECK(at::equal(state, last));
}

TEST_CASE("merged states answer as the concatenation", "[state][merge]") {
  for (const auto& kernel : kKernels) {
    const Inputs x = of_length(65);
    const auto state_of = [&](int64_t begin, int64_t end) { return causal(kernel, rows(x, begin, end)).state; };
    const auto merge = [&](const at::Tensor& a, const at::Tensor& b) { return merge_states(a, b, 16, 20, kernel); };
    const at::Tensor a = state_of(0, 20), b = state_of(20, 50), c = state_of(50, 65),
                     empty = new_state(2, 2, 16, 20, kernel);

    CAPTURE(kernel);
    const Property property = is_squared(kernel) ? Property::kSquaredGauge : Property::kForward;
    const at::Tensor wanted = reference_attention(x.q, x.k, x.v, {.kernel = kernel});
    CHECK(violation(read(kernel, x.q, merge(merge(a, b), c)), wanted, property) <= 1);
    CHECK(violation(read(kernel, x.q, merge(a, merge(b, c))), wanted, property) <= 1);
    CHECK(at::equal(read(kernel, x.q, merge(a, empty)), read(kernel, x.q, a)));
    CHECK(at::equal(read(kernel, x.q, merge(empty, a)), read(kernel, x.q, a)));
    CHECK(at::equal(merge(empty, empty), empty));
  }
}

TEST_CASE("merge_states with the total decay of the younger part", "[state][merge][decay]") {
  const Inputs x = of_length(65);
  const at::Tensor rates = at::rand({2, 16});
  const auto state_of = [&](const Inputs& part) {
    return std::get<1>(attention_with_state(part.q, part.k, part.v, {.is_causal = true, .decay = rates}));
  };
  const at::Tensor merged =
      merge_states(state_of(rows(x, 0, 50)), state_of(rows(x, 50, 65)), 16, 20, "hadamard_exp", rates * 15);
  const at::Tensor expected = read("hadamard_exp", x.q, state_of(x));
  CHECK(violation(read("hadamard_exp", x.q, merged), expected, Property::kForward) <= 1);
}

TEST_CASE("unpack_state gives views in memory order", "[state]") {
  for (const auto& kernel : kKernels) {
    const at::Tensor state = new_state(2, 3, 4, 5, kernel);
    const auto fields = unpack_state(state, 4, 5, kernel);
    REQUIRE(fields.size() == state_fields(kernel).size());
    int64_t offset = 0;
    for (const auto& name : state_fields(kernel)) {
      const at::Tensor& field = fields.at(name);
      CHECK(field.is_alias_of(state));
      CHECK(field.storage_offset() == offset);
      CHECK((field.size(0) == 2 && field.size(1) == 3));
      offset += field.numel() / 6;
    }
    CHECK(offset == state_size(kernel, 4, 5));
  }
}

}  // namespace elattn::tests
