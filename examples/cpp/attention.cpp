// Attention over a sequence with its gradient, then the same rows one token at a time from a state of constant size.
#include <elattn/elattn.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  const int64_t batch = 1, heads = 2, length = 100, dim = 16;
  const auto options = torch::TensorOptions().requires_grad(true);
  const auto q = torch::randn({batch, heads, length, dim}, options);
  const auto k = torch::randn({batch, heads, length, dim}, options);
  const auto v = torch::randn({batch, heads, length, dim}, options);

  const auto y = elattn::attention(q, k, v, {.is_causal = true});
  y.square().mean().backward();
  std::cout << "y " << y.sizes() << ", |dq| = " << q.grad().norm().item<double>() << '\n';

  const torch::NoGradGuard no_grad;
  auto state = elattn::new_state(batch, heads, dim, dim);
  bool equal = true;
  for (int64_t t = 0; t < length; ++t) {
    const auto row = elattn::attention_step(q.select(2, t), k.select(2, t), v.select(2, t), state);
    equal = equal && torch::equal(row, y.select(2, t));
  }
  std::cout << "step by step: " << (equal ? "equal" : "different") << '\n';
  return equal ? 0 : 1;
}
