// What the kernels are made of, on small integers that every format holds exactly. The same file is compiled for a GPU
// (gpu/), and there says whether the emulation does what the hardware does, bit for bit.

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "tests/catch2/catch.h"
#include "tests/cuda_emulation/device_array.h"
#include "tests/cuda_emulation/primitives.h"

namespace elattn::cuda {
namespace {

using primitives::Shuffle;

// Where the value v of lane t lies, as the strides that CUTLASS publishes (mma_traits_sm80.hpp): a as m + 16 k, b as
// n + 8 k, c as m + 16 n. Not the formulas of the emulation.
int a_16bit(int t, int v) { return t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128; }
int b_16bit(int t, int v) { return t % 4 * 16 + t / 4 + v % 2 * 8 + v / 2 * 64; }
int a_tf32(int t, int v) { return t % 4 * 16 + t / 4 + v % 2 * 8 + v / 2 * 64; }
int b_tf32(int t, int v) { return t % 4 * 8 + t / 4 + v * 32; }
int accumulator(int t, int v) { return t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8; }

std::vector<int> small_integers(int count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<int> result(static_cast<size_t>(count));
  for (int& x : result) x = static_cast<int>(generator() % 17) - 8;
  return result;
}

int product(const std::vector<int>& a, const std::vector<int>& b, int depth, int index) {
  int sum = 0;
  for (int k = 0; k < depth; ++k) {
    sum += a[static_cast<size_t>(index % 16 + 16 * k)] * b[static_cast<size_t>(index / 16 + 8 * k)];
  }
  return sum;
}

void check_product(const std::vector<int>& a, const std::vector<int>& b, int depth, const std::vector<float>& before,
                   const std::vector<float>& after) {
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 4; ++v) {
      const auto i = static_cast<size_t>(4 * t + v);
      CAPTURE(t, v);
      CHECK(after[i] == before[i] + static_cast<float>(product(a, b, depth, accumulator(t, v))));
    }
  }
}

std::vector<float> counting(int count) {
  std::vector<float> result(static_cast<size_t>(count));
  std::iota(result.begin(), result.end(), 1.0f);
  return result;
}

template <class T>
uint32_t pair(int low, int high) {
  const auto bits = [](int x) { return uint32_t{std::bit_cast<uint16_t>(T(static_cast<float>(x)))}; };
  return bits(low) | bits(high) << 16;
}

template <class T>
void check_mma_16bit(unsigned seed) {
  const std::vector<int> a = small_integers(256, seed), b = small_integers(128, seed + 1);
  std::vector<uint32_t> a_registers, b_registers;
  const auto at = [](const std::vector<int>& m, int i) { return m[static_cast<size_t>(i)]; };
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 8; v += 2) a_registers.push_back(pair<T>(at(a, a_16bit(t, v)), at(a, a_16bit(t, v + 1))));
    for (int v = 0; v < 4; v += 2) b_registers.push_back(pair<T>(at(b, b_16bit(t, v)), at(b, b_16bit(t, v + 1))));
  }
  const std::vector<float> before = counting(128);
  DeviceArray left(a_registers), right(b_registers);
  DeviceArray c(before);
  REQUIRE(primitives::mma_16bit<T>(left.data(), right.data(), c.data()) == cudaSuccess);
  check_product(a, b, 16, before, c.values());
}

TEST_CASE("mma m16n8k16 multiplies bfloat16 and half matrices") {
  check_mma_16bit<__nv_bfloat16>(1);
  check_mma_16bit<__half>(2);
}

TEST_CASE("mma m16n8k8 multiplies tf32 matrices and ignores the low bits") {
  const std::vector<int> a = small_integers(128, 3), b = small_integers(64, 4);
  std::vector<uint32_t> a_registers, b_registers;
  const auto bits = [](const std::vector<int>& m, int i) {
    return std::bit_cast<uint32_t>(static_cast<float>(m[static_cast<size_t>(i)])) | 0x1fff;
  };
  for (int t = 0; t < 32; ++t) {
    for (int v = 0; v < 4; ++v) a_registers.push_back(bits(a, a_tf32(t, v)));
    for (int v = 0; v < 2; ++v) b_registers.push_back(bits(b, b_tf32(t, v)));
  }
  const std::vector<float> before = counting(128);
  DeviceArray left(a_registers), right(b_registers);
  DeviceArray c(before);
  REQUIRE(primitives::mma_tf32(left.data(), right.data(), c.data()) == cudaSuccess);
  check_product(a, b, 8, before, c.values());
}

TEST_CASE("to_tf32 rounds to nearest, ties away from zero") {
  const std::vector<float> x = {1.0f,
                                -1.0f,
                                1.0f + 0x1p-11f,
                                -1.0f - 0x1p-11f,
                                1.0f + 0x1p-12f,
                                1.0f + 3 * 0x1p-11f,
                                0x1p-126f,
                                0x1.fffffep127f,
                                INFINITY,
                                0.0f,
                                -0.0f,
                                0x1p-149f};
  const std::vector<float> expected = {
      1.0f,  -1.0f, 1.0f + 0x1p-10f, -1.0f - 0x1p-10f, 1.0f, 1.0f + 2 * 0x1p-10f, 0x1p-126f, INFINITY, INFINITY, 0.0f,
      -0.0f, 0.0f};
  DeviceArray in(x);
  DeviceArray out(std::vector<uint32_t>(x.size()));
  REQUIRE(primitives::round_to_tf32(in.data(), out.data(), static_cast<int>(x.size())) == cudaSuccess);
  for (size_t i = 0; i < x.size(); ++i) {
    CAPTURE(x[i]);
    CHECK(out.values()[i] == std::bit_cast<uint32_t>(expected[i]));
  }
}

TEST_CASE("ldmatrix gives every lane two neighbours of each matrix, or of its transpose") {
  std::vector<uint16_t> matrices(4 * 64);
  std::iota(matrices.begin(), matrices.end(), uint16_t{1000});
  DeviceArray in(matrices);
  for (const int ld : {8, 24, 72}) {
    for (const bool transposed : {false, true}) {
      DeviceArray out(std::vector<uint32_t>(128));
      REQUIRE(primitives::load_matrices(in.data(), ld, transposed, out.data()) == cudaSuccess);
      const std::vector<uint32_t> r = out.values();
      for (int t = 0; t < 32; ++t) {
        for (int m = 0; m < 4; ++m) {
          CAPTURE(ld, transposed, t, m);
          const int first = 1000 + 64 * m + (transposed ? t % 4 * 16 + t / 4 : 2 * t);
          const int second = first + (transposed ? 8 : 1);
          CHECK(r[static_cast<size_t>(4 * t + m)] == static_cast<uint32_t>(first | second << 16));
        }
      }
    }
  }
}

TEST_CASE("cp.async copies groups and fills with zero") {
  constexpr int kRows = 96;
  std::vector<uint32_t> rows(4 * kRows);
  std::iota(rows.begin(), rows.end(), 0x01020304u);
  DeviceArray in(rows);
  const auto check = [&](int bytes, int valid) {
    CAPTURE(bytes, valid);
    DeviceArray out(std::vector<uint32_t>(rows.size()));
    REQUIRE(primitives::copy_rows(in.data(), out.data(), kRows, bytes, valid) == cudaSuccess);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int kept = std::clamp(valid - static_cast<int>(4 * i % static_cast<size_t>(bytes)), 0, 4);
      const uint32_t mask = kept == 4 ? ~0u : (1u << 8 * kept) - 1;
      CHECK(out.values()[i] == (rows[i] & mask));
    }
  };
  for (const int bytes : {4, 8, 16}) {
    for (const int valid : {0, 2, 4, 6, 8, 10, 16}) {
      if (valid <= bytes) check(bytes, valid);
    }
  }
}

template <class T>
void check_shuffles() {
  std::vector<T> in(32);
  std::iota(in.begin(), in.end(), T{100});
  DeviceArray source(in);
  for (const int width : {32, 16, 8, 4, 2, 1}) {
    for (const int argument : {0, 1, 2, 3, 5, 8, 15, 16, 31}) {
      for (const Shuffle kind : {Shuffle::kIndex, Shuffle::kUp, Shuffle::kDown, Shuffle::kXor}) {
        DeviceArray out(std::vector<T>(32));
        REQUIRE(primitives::shuffle<T>(kind, source.data(), out.data(), argument, width) == cudaSuccess);
        const std::vector<T> result = out.values();
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / width * width;
          int from = lane;
          if (kind == Shuffle::kIndex) from = group + argument % width;
          if (kind == Shuffle::kUp && lane - argument >= group) from = lane - argument;
          if (kind == Shuffle::kDown && lane + argument < group + width) from = lane + argument;
          if (kind == Shuffle::kXor && (lane ^ argument) < group + width) from = lane ^ argument;
          CAPTURE(width, argument, static_cast<int>(kind), lane);
          CHECK(result[static_cast<size_t>(lane)] == in[static_cast<size_t>(from)]);
        }
      }
    }
  }
}

TEST_CASE("Shuffles read other lanes within their width") {
  check_shuffles<int>();
  check_shuffles<float>();
  check_shuffles<double>();
}

TEST_CASE("Parts of a warp shuffle on their own") {
  DeviceArray out(std::vector<int>(32));
  REQUIRE(primitives::shuffle_halves(out.data()) == cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(out.values()[static_cast<size_t>(lane)] == (lane < 16 ? lane ^ 1 : lane ^ 3));
  }
}

TEST_CASE("Votes and reductions of a warp") {
  const std::vector<int> in = small_integers(32, 5);
  unsigned ballot = 0, least = ~0u, conjunction = ~0u, disjunction = 0, parity = 0;
  int sum = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const auto bits = static_cast<unsigned>(in[i]);
    ballot |= unsigned{in[i] > 0} << i;
    least = std::min(least, bits);
    conjunction &= bits;
    disjunction |= bits;
    parity ^= bits;
    sum += in[i];
  }
  DeviceArray source(in), out(std::vector<int>(10));
  REQUIRE(primitives::votes(source.data(), out.data()) == cudaSuccess);
  const auto number = [](unsigned bits) { return static_cast<int>(bits); };
  CHECK(out.values() == std::vector<int>{number(ballot), 0, 1, sum, *std::min_element(in.begin(), in.end()),
                                         *std::max_element(in.begin(), in.end()), number(least), number(conjunction),
                                         number(disjunction), number(parity)});
}

TEST_CASE("Votes of a block reach all its threads") {
  for (const int threads : {32, 96, 1024}) {
    for (const int holding : {0, 1, 31, threads}) {
      std::vector<int> in(static_cast<size_t>(threads), 0);
      std::fill_n(in.begin(), holding, -3);
      DeviceArray source(in), out(std::vector<int>(static_cast<size_t>(3 * threads)));
      REQUIRE(primitives::block_votes(source.data(), out.data(), threads) == cudaSuccess);
      const std::vector<int> result = out.values();
      for (size_t i = 0; i < result.size(); i += 3) {
        CHECK(result[i] == holding);
        CHECK(result[i + 1] == (holding > 0));
        CHECK(result[i + 2] == (holding == threads));
      }
    }
  }
}

TEST_CASE("Atomics of many blocks") {
  constexpr unsigned kBlocks = 9, kThreads = 64, kCount = kBlocks * kThreads, kSum = kCount * (kCount - 1) / 2;
  DeviceArray words(std::vector<unsigned>{3, 1000, 0, 0xfff, 0, 0, 0});
  REQUIRE(primitives::atomics(words.data(), kBlocks, kThreads) == cudaSuccess);
  CHECK(words.values() == std::vector<unsigned>{3 + kSum, 5, kCount - 1, 0xf00, ~0u, 77, kSum});
}

TEST_CASE("A sum over blocks, warps and lanes") {
  const std::vector<int> x = small_integers(1000, 6);
  DeviceArray in(x), total(std::vector<int>{0});
  REQUIRE(primitives::sum(in.data(), static_cast<int>(x.size()), total.data()) == cudaSuccess);
  CHECK(total.values()[0] == std::accumulate(x.begin(), x.end(), 0));
}

TEST_CASE("Every thread of a grid knows its place") {
  const dim3 grid(3, 2, 2), block(4, 8, 2);
  DeviceArray out(std::vector<int>(6 * 12 * 64, -1));
  REQUIRE(primitives::indices(out.data(), grid, block) == cudaSuccess);
  const std::vector<int> result = out.values();
  size_t i = 0;
  for (int place = 0; place < 12 * 64; ++place) {
    const int t = place % 64, b = place / 64;
    for (const int expected : {t % 4, t / 4 % 8, t / 32, b % 3, b / 3 % 2, b / 6}) CHECK(result[i++] == expected);
  }
}

}  // namespace
}  // namespace elattn::cuda
