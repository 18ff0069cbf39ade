// Runs every CUDA kernel, emulated, over odd shapes on buffers of exactly the right size, in changing orders of threads and
// blocks, and demands that all of every output is written. Meant to be compiled with sanitizers, or with the watch for
// races; exits with 1 at the first fault. Whether the numbers are right is tests/test_cuda_emulated.py's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

#include "emulator.h"
#include "ops.h"

using namespace taylorkern;

namespace {

std::mt19937 generator(0);

void assign(float& to, float v) { to = v; }
void assign(__half& to, float v) { to = __float2half_rn(v); }
void assign(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

bool is_number(float v) { return !std::isnan(v); }
bool is_number(__half v) { return !std::isnan(__half2float(v)); }
bool is_number(__nv_bfloat16 v) { return !std::isnan(__bfloat162float(v)); }
bool is_number(uint8_t v) { return v <= 1; }

// Where arrays begin: at what 16 bytes are aligned to, or one element behind that
enum class Begin { aligned, behind };

// `count` elements that end where their allocation ends
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, Begin begin) : memory_(static_cast<size_t>(count) + skipped(begin)), skipped_(skipped(begin)) {
    if (!memory_.empty()) std::memset(static_cast<void*>(memory_.data()), 0xff, memory_.size() * sizeof(T));
  }
  Buffer& random() {
    std::normal_distribution<float> normal(0.5f, 1);
    for (T& element : memory_) assign(element, normal(generator));
    return *this;
  }
  T* data() { return memory_.data() + skipped_; }
  int64_t size() const { return static_cast<int64_t>(memory_.size() - skipped_); }
  bool written() const {
    for (size_t i = skipped_; i < memory_.size(); ++i) {
      if (!is_number(memory_[i])) return false;
    }
    return true;
  }

 private:
  std::vector<T> memory_;
  size_t skipped_;
  static size_t skipped(Begin begin) { return begin == Begin::aligned ? 0 : 1; }
};

struct Way {
  uint64_t order;
  int64_t parts;  // of a tensor, three of which are resident; 0: nothing is
};

struct Form {
  bool training, residual;
  Activation activation;
};

class Memory {
 public:
  explicit Memory(const Shape& shape) : bytes_(cuda::workspace_bytes(shape)) {
    memory_ = std::aligned_alloc(16, static_cast<size_t>((bytes_ + 15) / 16 * 16));
    std::memset(memory_, 0xff, static_cast<size_t>(bytes_));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(memory_); }
  cuda::Launch launch(const Shape& shape, const Way& way) const {
    const int64_t total = shape.N * shape.C * shape.S * bytes_of(shape.dtype);
    return {nullptr, memory_, way.parts ? 3 * total / way.parts : 0};
  }

 private:
  int64_t bytes_;
  void* memory_;
};

[[noreturn]] void fault(const char* what, const Shape& shape) {
  std::printf("%s at N=%lld C=%lld S=%lld layout=%d dtype=%d\n", what, static_cast<long long>(shape.N),
              static_cast<long long>(shape.C), static_cast<long long>(shape.S), static_cast<int>(shape.layout),
              static_cast<int>(shape.dtype));
  std::exit(1);
}

template <class... Buffers>
void expect_written(const Shape& shape, const Buffers&... outputs) {
  if (!(outputs.written() && ...)) fault("an output is not written, or NaN", shape);
}

template <class T>
void check_scores(const Shape& shape, Begin begin, const Way& way) {
  const int64_t count = shape.N * shape.C * shape.S;
  Buffer<T> a(count, begin), g(count, begin);
  Buffer<float> s(shape.N * shape.C, Begin::behind);
  const Memory memory(shape);
  cuda::channel_scores({shape, a.random().data(), g.random().data(), s.data()}, memory.launch(shape, way));
  expect_written(shape, s);
}

template <class T>
void check_batch_norm(const Shape& shape, Begin begin, const Way& way, const Form& form) {
  const int64_t C = shape.C, count = shape.N * C * shape.S;
  const double eps = 1e-5, slope = 0.1;
  const bool by_y = form.residual && form.activation == Activation::relu, masked = form.residual && !by_y;
  Buffer<T> x(count, begin), residual(count, begin), y(count, begin), dy(count, begin), dx(count, begin);
  Buffer<T> dresidual(form.residual ? count : 0, begin);
  Buffer<uint8_t> mask(masked ? count : 0, begin);
  Buffer<float> weight(C, Begin::behind), bias(C, Begin::behind), mean(C, Begin::behind), var(C, Begin::behind);
  Buffer<float> dweight(C, Begin::behind), dbias(C, Begin::behind), s(shape.N * C, Begin::behind);
  x.random(), residual.random(), dy.random(), weight.random(), bias.random();
  if (!form.training) {
    mean.random(), var.random();
    for (int64_t c = 0; c < C; ++c) var.data()[c] = 0.5f + std::abs(var.data()[c]);
  }
  {
    const Memory memory(shape);
    cuda::batch_norm_act({shape, x.data(), form.residual ? residual.data() : nullptr, weight.data(), bias.data(),
                          y.data(), masked ? mask.data() : nullptr, mean.data(), var.data(), eps, form.training,
                          form.activation, slope},
                         memory.launch(shape, way));
    expect_written(shape, y, mask, mean, var);
  }
  const Memory memory(shape);
  cuda::batch_norm_act_backward({shape, dy.data(), x.data(), masked ? mask.data() : nullptr, by_y ? y.data() : nullptr,
                                 weight.data(), bias.data(), mean.data(), var.data(), dx.data(),
                                 form.residual ? dresidual.data() : nullptr, dweight.data(), dbias.data(), s.data(), eps,
                                 form.training, form.activation, slope},
                                memory.launch(shape, way));
  expect_written(shape, dx, dresidual, dweight, dbias, s);
}

// Another one for every call
Way next_way() {
  static const Way ways[] = {{0, 0}, {1, 5}, {2, 2}};
  static size_t calls = 0;
  const Way& way = ways[calls++ % 3];
  emulator::set_order(way.order);
  return way;
}

template <class T>
void check(const Shape& shape) {
  for (const Begin begin : {Begin::aligned, Begin::behind}) {
    check_scores<T>(shape, begin, next_way());
    for (int flags = 0; flags < 4; ++flags) {
      const bool residual = flags & 2;
      for (int code = 0; code < (residual ? 4 : 6); ++code) {
        check_batch_norm<T>(shape, begin, next_way(), {(flags & 1) != 0, residual, static_cast<Activation>(code)});
      }
    }
  }
}

void check_follow(int64_t C) {
  Buffer<float> mean(C, Begin::behind), var(C, Begin::behind), running_mean(C, Begin::behind), running_var(C, Begin::behind);
  mean.random(), var.random(), running_mean.random(), running_var.random();
  cuda::follow({C, Dtype::f32, mean.data(), var.data(), running_mean.data(), running_var.data(), 0.1, 1.01}, {});
}

void check_all() {
  const int64_t sizes[][3] = {
      {1, 1, 1},   {2, 3, 5},   {3, 1, 16}, {5, 33, 1}, {2, 64, 64}, {4, 31, 39}, {1, 2, 2049}, {70, 5, 7},
      {3, 104, 3}, {0, 3, 4},   {2, 0, 4},  {2, 3, 0},  {9, 16, 2},  {65, 130, 1}, {1, 300, 25},
  };
  for (const auto& [N, C, S] : sizes) {
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      check<float>({N, C, S, layout, Dtype::f32});
      check<__nv_bfloat16>({N, C, S, layout, Dtype::bf16});
      check<__half>({N, C, S, layout, Dtype::f16});
    }
  }
  for (const int64_t C : {0, 1, 300}) check_follow(C);
}

}  // namespace

int main() {
  try {
    check_all();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("every shape is clean");
}
