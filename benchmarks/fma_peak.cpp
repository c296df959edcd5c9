// The rate of fused multiply-adds that touch registers only: the most this core could do.
#include <chrono>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Vec [[gnu::vector_size(kBytes)]] = float;
constexpr int kChains = 12;  // covers the latency of two FMA pipes and leaves registers for a and b
constexpr int kLanes = kBytes / 4;

// Flop per second over about `seconds`; the compiler contracts x * a + b to one FMA where the machine has it.
extern "C" double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  Vec x[kChains] = {};
  Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  constexpr int kSteps = 20000;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
    const Vec factor = a, addend = b;
    const auto begin = Clock::now();
    for (int step = 0; step < kSteps; ++step)
      for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + addend;
    for (int i = 0; i < kChains; ++i) asm volatile("" : "+m"(x[i]));
    const double rate = 2.0 * kChains * kLanes * kSteps / std::chrono::duration<double>(Clock::now() - begin).count();
    if (rate > best) best = rate;
  }
  return best;
}
