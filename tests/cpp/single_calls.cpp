// Calls every kernel once for each case, on one thread, through measure(): what runs between its start and its end can be
// counted by a tool that knows function names (callgrind's --toggle-collect=measure --dump-after=measure). Each case prints a
// line "name elements", in the order of the calls; an argument leaves out the cases whose names don't start with it.
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/vector.h"
#include "ops.h"

using namespace taylorkern;

extern "C" __attribute__((noinline)) void measure(const std::function<void()>& call) { call(); }

namespace {

// Through a pointer that the compiler can't see through, so that it makes no clone of measure() under another name
void (*volatile measured)(const std::function<void()>&) = measure;

constexpr int kThreads = 1;

// A tensor's memory: numbers around 0 that are the same everywhere, made without a library's generator
template <class T>
struct Buffer {
  std::vector<T> memory;
  explicit Buffer(int64_t count) : memory(static_cast<size_t>(count)) {
    uint32_t state = 1;
    for (T& element : memory) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
      cpu::store(cpu::Pack<float, 1>{}, &element, value);
    }
  }
  void* data() { return memory.data(); }
};

// What follows the batch normalisation; nothing for channel_scores
struct Behind {
  const char* name;
  Activation activation;
  bool residual;
  bool over_dy;  // the backward alone
};
constexpr Behind kNothing{"", Activation::none, false, false};
constexpr Behind kBehind[] = {
    {" alone", Activation::none, false, false},
    {" relu", Activation::relu, false, false},
    {" relu over dy", Activation::relu, false, true},
    {" residual+relu", Activation::relu, true, false},
    {" residual+relu over dy", Activation::relu, true, true},
    {" residual+relu6", Activation::relu6, true, false},
    {" silu", Activation::silu, false, false},
};

struct Case {
  const char* kernel;
  Behind behind;
  Shape shape;

  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s%s %s %s %lldx%lldx%lld", kernel, behind.name,
                  shape.layout == Layout::channels_first ? "channels_first" : "channels_last",
                  shape.dtype == Dtype::f32 ? "float32" : "bfloat16", static_cast<long long>(shape.N),
                  static_cast<long long>(shape.C), static_cast<long long>(shape.S));
    return text;
  }
  // relu's y tells the backward what the others' mask does.
  bool masked() const { return behind.residual && behind.activation != Activation::relu; }
  int64_t elements() const { return shape.N * shape.C * shape.S; }
};

// Everything that any kernel reads or writes; big enough for the largest case and filled once
template <class T>
struct Tensors {
  Buffer<T> x, residual, y, dy, dx, dresidual;
  Buffer<float> weight, bias, mean, var, dweight, dbias, s;
  std::vector<uint8_t> mask;

  Tensors(int64_t elements, int64_t channels, int64_t scores)
      : x(elements), residual(elements), y(elements), dy(elements), dx(elements), dresidual(elements), weight(channels),
        bias(channels), mean(channels), var(channels), dweight(channels), dbias(channels), s(scores), mask(static_cast<size_t>(elements)) {}

  std::function<void()> channel_scores(const Case& of) {
    ChannelScores args{};
    args.shape = of.shape;
    args.a = x.data();
    args.g = dy.data();
    args.s = s.data();
    return [args] { cpu::channel_scores(args, kThreads); };
  }

  std::function<void()> forward(const Case& of) {
    BatchNormAct args{};
    args.shape = of.shape;
    args.x = x.data();
    args.residual = of.behind.residual ? residual.data() : nullptr;
    args.weight = weight.data();
    args.bias = bias.data();
    args.y = y.data();
    args.mask = of.masked() ? mask.data() : nullptr;
    args.mean = mean.data();
    args.var = var.data();
    args.eps = 1e-5;
    args.training = true;
    args.activation = of.behind.activation;
    return [args] { cpu::batch_norm_act(args, kThreads); };
  }

  // Reads y or the mask, mean and var of the forward before it.
  std::function<void()> backward(const Case& of) {
    BatchNormActBackward args{};
    args.shape = of.shape;
    args.dy = dy.data();
    args.x = x.data();
    args.mask = of.masked() ? mask.data() : nullptr;
    args.y = of.behind.residual && !of.masked() ? y.data() : nullptr;
    args.weight = weight.data();
    args.bias = bias.data();
    args.mean = mean.data();
    args.var = var.data();
    args.dx = of.behind.over_dy && !of.behind.residual ? dy.data() : dx.data();
    args.dresidual = !of.behind.residual ? nullptr : of.behind.over_dy ? dy.data() : dresidual.data();
    args.dweight = dweight.data();
    args.dbias = dbias.data();
    args.s = s.data();
    args.eps = 1e-5;
    args.training = true;
    args.activation = of.behind.activation;
    return [args] { cpu::batch_norm_act_backward(args, kThreads); };
  }
};

// The first call warms up what is set up once; the second one is measured.
void run(const std::string& name, int64_t elements, const std::function<void()>& call, const char* wanted) {
  call();
  if (name.compare(0, std::strlen(wanted), wanted) != 0) return;
  std::printf("%s %lld\n", name.c_str(), static_cast<long long>(elements));
  measured(call);
}

void run(const Case& of, const std::function<void()>& call, const char* wanted) {
  run(of.name(), of.elements(), call, wanted);
}

template <class T>
void run_all(Tensors<T>& tensors, const Shape& shape, const char* wanted) {
  const Case scores{"channel_scores", kNothing, shape};
  run(scores, tensors.channel_scores(scores), wanted);
  for (const Behind& behind : kBehind) {
    const Case forward{"batch_norm_act", behind, shape}, backward{"batch_norm_act_backward", behind, shape};
    if (behind.over_dy && !whole_lines(shape)) continue;
    if (!behind.over_dy) run(forward, tensors.forward(forward), wanted);
    run(backward, tensors.backward(backward), wanted);
  }
}

// What a step does once: every sample's s of two layers, 512 channels each, to as many units that they share
void run_fold(const char* wanted) {
  constexpr int64_t N = 8, C = 512;
  Buffer<float> first(N * C), second(N * C);
  std::vector<double> sums(C), squares(C);
  const FoldPiece pieces[] = {{first.data(), C}, {second.data(), C}};
  const FoldRun runs[] = {{0, 0, 0, C}, {1, 0, 0, C}};
  const Fold args{N, C, 2, Dtype::f32, pieces, runs, sums.data(), squares.data()};
  run("fold float32 8x512", 2 * N * C, [&] { cpu::fold(args, kThreads); }, wanted);
}

void run_accumulate(const char* wanted) {
  constexpr int64_t U = 1024;
  std::vector<double> sums(U), more(U, 1.0);
  const Addend addends[] = {{more.data(), sums.data(), U}};
  run("accumulate float64 1024", U, [&] { cpu::accumulate(addends, 1); }, wanted);
}

void run_follow(const char* wanted) {
  constexpr int64_t C = 512;
  Buffer<float> mean(C), var(C), running_mean(C), running_var(C);
  const RunningStatistics args{C,  Dtype::f32, mean.data(), var.data(), running_mean.data(), running_var.data(),
                               0.1, 1.01};
  run("follow float32 512", C, [&] { cpu::follow(args); }, wanted);
}

}  // namespace

int main(int count, char** arguments) {
  const char* wanted = count > 1 ? arguments[1] : "";
  const int64_t sizes[][3] = {{2, 64, 3136}, {3, 37, 49}};
  Tensors<float> narrow(2 * 64 * 3136, 64, 3 * 64);
  Tensors<cpu::bfloat16> half(2 * 64 * 3136, 64, 3 * 64);
  for (const auto& [N, C, S] : sizes) {
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      run_all(narrow, {N, C, S, layout, Dtype::f32}, wanted);
      run_all(half, {N, C, S, layout, Dtype::bf16}, wanted);
    }
  }
  run_fold(wanted);
  run_accumulate(wanted);
  run_follow(wanted);
}
