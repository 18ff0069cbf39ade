// Runs every kernel over odd shapes on buffers of exactly the right size, at addresses that are aligned to no more than their
// element, and compares with plain loops in double. Meant to be compiled with sanitizers; exits with 1 at the first wrong number.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/vector.h"
#include "ops.h"

using namespace taylorkern;

namespace {

std::mt19937 generator(0);

double value_of(double v) { return v; }
double value_of(float v) { return v; }
double value_of(uint8_t v) { return v; }
double value_of(cpu::bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
void assign(double& to, double v) { to = v; }
void assign(float& to, double v) { to = static_cast<float>(v); }
void assign(uint8_t& to, double) { to = 7; }  // neither 0 nor 1
void assign(cpu::bfloat16& to, double v) { cpu::store(cpu::Pack<float, 1>{}, &to, static_cast<float>(v)); }

// `count` elements that end where their allocation ends and start one element behind its start
template <class T>
struct Buffer {
  std::vector<T> memory;
  explicit Buffer(int64_t count) : memory(static_cast<size_t>(count) + 1) {
    std::normal_distribution<double> normal(0.5, 1);
    for (T& element : memory) assign(element, normal(generator));
  }
  T* data() { return memory.data() + 1; }
  double operator[](int64_t i) const { return value_of(memory.at(static_cast<size_t>(i) + 1)); }
};

int64_t offset(const Shape& shape, int64_t n, int64_t c, int64_t s) {
  return shape.layout == Layout::channels_first ? (n * shape.C + c) * shape.S + s : (n * shape.S + s) * shape.C + c;
}

void expect(const char* what, const Shape& shape, double got, double wanted, double size) {
  const double tolerance = shape.dtype == Dtype::f64 ? 1e-12 : shape.dtype == Dtype::f32 ? 1e-5 : 1e-2;
  if (std::abs(got - wanted) <= tolerance * (1 + size)) return;
  std::printf("%s: %g instead of %g at N=%lld C=%lld S=%lld layout=%d dtype=%d\n", what, got, wanted,
              static_cast<long long>(shape.N), static_cast<long long>(shape.C), static_cast<long long>(shape.S),
              static_cast<int>(shape.layout), static_cast<int>(shape.dtype));
  std::exit(1);
}

template <class T>
void check_channel_scores(const Shape& shape, int threads) {
  using A = cpu::Acc<T>;
  const int64_t count = shape.N * shape.C * shape.S;
  Buffer<T> a(count), g(count);
  Buffer<A> s(shape.N * shape.C);
  cpu::channel_scores({shape, a.data(), g.data(), s.data()}, threads);
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t c = 0; c < shape.C; ++c) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < shape.S; ++k) {
        const int64_t i = offset(shape, n, c, k);
        sum += a[i] * g[i];
        size += std::abs(a[i] * g[i]);
      }
      const Shape exact{shape.N, shape.C, shape.S, shape.layout, shape.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32};
      expect("s", exact, s[n * shape.C + c], sum, size);
    }
  }
}

constexpr double kSlope = 0.1;

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

double activated(Activation activation, double z) {
  switch (activation) {
    case Activation::none: return z;
    case Activation::relu: return std::max(z, 0.0);
    case Activation::relu6: return std::min(std::max(z, 0.0), 6.0);
    case Activation::leaky_relu: return z > 0 ? z : kSlope * z;
    case Activation::silu: return z * sigmoid(z);
    case Activation::hardswish: return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
  }
  return z;
}

double slope_at(Activation activation, double z) {
  switch (activation) {
    case Activation::none: return 1;
    case Activation::relu: return z > 0;
    case Activation::relu6: return z > 0 && z < 6;
    case Activation::leaky_relu: return z > 0 ? 1 : kSlope;
    case Activation::silu: return sigmoid(z) * (1 + z * (1 - sigmoid(z)));
    case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
  }
  return 1;
}

// Whether rounding z may move it across a kink
bool near_kink(Activation activation, double z) {
  return std::abs(z) < 1e-4 || (activation == Activation::relu6 && std::abs(z - 6) < 1e-4);
}

template <class T>
void check_batch_norm(const Shape& shape, int threads, bool training, Activation activation, bool with_residual,
                      bool over_dy) {
  using A = cpu::Acc<T>;
  const int64_t N = shape.N, C = shape.C, S = shape.S, count = N * C * S;
  const double eps = 1e-5;
  const bool by_y = with_residual && activation == Activation::relu, masked = with_residual && !by_y;
  Buffer<T> x(count), residual(count), y(count), dy(count), other_dx(count), other_dresidual(count);
  Buffer<uint8_t> mask(masked ? count : 0);
  Buffer<A> weight(C), bias(C), mean(C), var(C), dweight(C), dbias(C), s(N * C);
  for (int64_t c = 0; c < C; ++c) var.data()[c] = static_cast<A>(0.5 + std::abs(var[c]));

  cpu::batch_norm_act({shape, x.data(), with_residual ? residual.data() : nullptr, weight.data(), bias.data(), y.data(),
                       masked ? mask.data() : nullptr, mean.data(), var.data(), eps, training, activation, kSlope},
                      threads);
  Buffer<T> given = dy;  // for the kernel to read, and perhaps to write
  Buffer<T>& dx = over_dy && !by_y ? given : other_dx;
  Buffer<T>& dresidual = over_dy && by_y ? given : other_dresidual;
  cpu::batch_norm_act_backward({shape, given.data(), x.data(), masked ? mask.data() : nullptr, by_y ? y.data() : nullptr,
                                weight.data(), bias.data(), mean.data(), var.data(), dx.data(),
                                with_residual ? dresidual.data() : nullptr, dweight.data(), dbias.data(), s.data(), eps,
                                training, activation, kSlope},
                               threads);

  const double M = static_cast<double>(N * S);
  for (int64_t c = 0; c < C; ++c) {
    if (training && M > 0) {
      double sum = 0, square = 0;
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < S; ++k) sum += x[offset(shape, n, c, k)];
      }
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < S; ++k) square += std::pow(x[offset(shape, n, c, k)] - sum / M, 2);
      }
      expect("mean", shape, mean[c], sum / M, 1);
      expect("var", shape, var[c], square / M, square / M);
    }
    const double invstd = 1 / std::sqrt(var[c] + eps);
    double A_c = 0, B_c = 0;
    const auto z_at = [&](int64_t i) {
      return (x[i] - mean[c]) * invstd * weight[c] + bias[c] + (with_residual ? residual[i] : 0);
    };
    const auto slope_below = activation == Activation::leaky_relu ? kSlope : 0;
    const auto dz_at = [&](int64_t i) {
      if (!with_residual) return dy[i] * slope_at(activation, z_at(i));
      return dy[i] * ((masked ? mask[i] == 1 : y[i] > 0) ? 1 : slope_below);
    };
    for (int64_t n = 0; n < N; ++n) {
      double A_nc = 0, B_nc = 0;
      for (int64_t k = 0; k < S; ++k) {
        const int64_t i = offset(shape, n, c, k);
        expect("y", shape, y[i], activated(activation, z_at(i)), std::abs(z_at(i)) + std::abs(x[i]));
        if (masked && !near_kink(activation, z_at(i))) {
          expect("mask", shape, mask[i], slope_at(activation, z_at(i)) == 1, 0);
        }
        A_nc += (x[i] - mean[c]) * invstd * dz_at(i);
        B_nc += dz_at(i);
      }
      expect("s", shape, s[n * C + c], weight[c] * A_nc + bias[c] * B_nc, static_cast<double>(S));
      A_c += A_nc;
      B_c += B_nc;
    }
    expect("dweight", shape, dweight[c], A_c, M);
    expect("dbias", shape, dbias[c], B_c, M);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < S; ++k) {
        const int64_t i = offset(shape, n, c, k);
        const double share = training ? B_c / M + (x[i] - mean[c]) * invstd * A_c / M : 0;
        const double wanted = weight[c] * invstd * (dz_at(i) - share);
        expect("dx", shape, dx[i], wanted, 4 * std::abs(weight[c] * invstd));
        if (with_residual) expect("dresidual", shape, dresidual[i], dz_at(i), 0);
      }
    }
  }
}

// Two pieces, whose channels belong to units that wander and come back
template <class A>
void check_fold(int64_t N, int64_t U, Dtype dtype) {
  const int64_t first = U / 2 + 1, second = U;
  Buffer<A> left(N * first), right(N * second);
  Buffer<double> sums(U), squares(U);
  const FoldPiece pieces[] = {{left.data(), first}, {right.data(), second}};
  std::vector<FoldRun> runs{{0, 0, U - first + (U == 1), first - (U == 1)}, {1, 0, 0, U}};
  for (int64_t c = 0; c + 1 < first; c += 2) runs.push_back({0, c, c / 2, 1});
  cpu::fold({N, U, static_cast<int64_t>(runs.size()), dtype, pieces, runs.data(), sums.data(), squares.data()},
            3);
  for (int64_t u = 0; u < U; ++u) {
    double sum = 0, square = 0;
    for (int64_t n = 0; n < N; ++n) {
      double t = 0;
      for (const FoldRun& run : runs) {
        if (u < run.unit || u >= run.unit + run.length) continue;
        const int64_t i = n * pieces[run.piece].C + run.channel + u - run.unit;
        t += run.piece == 0 ? left[i] : right[i];
      }
      sum += t;
      square += t * t;
    }
    const Shape shape{N, U, 1, Layout::channels_first, Dtype::f64};
    expect("fold's sum", shape, sums[u], sum, std::abs(sum));
    expect("fold's square", shape, squares[u], square, square);
  }
}

// With a number that is not finite at `wrong` of the second pair, if that is inside, nothing is added.
void check_accumulate(int64_t count, int64_t wrong, double value) {
  Buffer<double> from(count), more(count), to(count), other(count);
  const Buffer<double> before = to, before_other = other;
  const bool spoilt = wrong < count;
  if (spoilt) more.data()[wrong] = value;
  const Addend addends[] = {{from.data(), to.data(), count}, {more.data(), other.data(), count}};
  const Shape shape{1, count, 1, Layout::channels_first, Dtype::f64};
  expect("accumulate", shape, cpu::accumulate(addends, 2), !spoilt, 0);
  for (int64_t i = 0; i < count; ++i) {
    expect("a sum", shape, to[i], before[i] + (spoilt ? 0 : from[i]), 0);
    expect("another sum", shape, other[i], before_other[i] + (spoilt ? 0 : more[i]), 0);
  }
}

template <class T>
void check(const Shape& shape) {
  const int threads = 3;
  check_channel_scores<T>(shape, threads);
  for (int flags = 0; flags < 4; ++flags) {
    const bool with_residual = flags & 2;
    for (int code = 0; code < (with_residual ? 4 : 6); ++code) {
      for (const bool over_dy : {false, true}) {
        if (over_dy && !whole_lines(shape)) continue;
        check_batch_norm<T>(shape, threads, flags & 1, static_cast<Activation>(code), with_residual, over_dy);
      }
    }
  }
}

}  // namespace

int main() {
  const int64_t sizes[][3] = {
      {1, 1, 1},   {2, 3, 5},   {1, 17, 9}, {3, 1, 16}, {5, 33, 1}, {2, 64, 64},   {4, 31, 39},  {1, 2, 9001}, {70, 5, 7},
      {3, 100, 3}, {2, 15, 15}, {0, 3, 4},  {2, 0, 4},  {2, 3, 0},  {1, 500, 50}, {9, 16, 2}, {2, 4, 2049},  {65, 130, 1},
  };
  for (const auto& [N, C, S] : sizes) {
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      check<float>({N, C, S, layout, Dtype::f32});
      check<double>({N, C, S, layout, Dtype::f64});
      check<cpu::bfloat16>({N, C, S, layout, Dtype::bf16});
    }
  }
  for (const int64_t N : {0, 1, 5}) {
    for (const int64_t U : {1, 2, 17, 300, 1100}) {
      check_fold<float>(N, U, Dtype::f32);
      check_fold<double>(N, U, Dtype::f64);
    }
  }
  for (const int64_t count : {0, 1, 9, 100}) {
    for (const double value : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
      for (const int64_t wrong : {int64_t{0}, count / 2, count - 1, count}) check_accumulate(count, std::abs(wrong), value);
    }
  }
  std::puts("every shape is right");
}
