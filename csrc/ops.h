// The contract between bindings and kernels. Free of torch and of Python; every backend compiles it.
//
// A tensor [N, C, S] has N samples, C channels and S positions (all spatial dimensions flattened). It is dense, in one
// of two layouts:
//   channels_first  element (n, c, s) at (n*C + c)*S + s
//   channels_last   element (n, c, s) at (n*S + s)*C + c
// All [N, C, S] tensors of one call share the layout and the dtype. [C] and [N, C] tensors are contiguous and hold the
// accumulation type `acc`: double for f64, float otherwise. Nothing needs more alignment than its element type.
//
// No output may overlap an input or another output, but where an operation says so. Any of N, C, S may be 0; a pointer to
// no elements may be null. Sums are taken in an order that depends on the shape alone: the same inputs give the same bits
// with any number of threads.
#pragma once

#include <cstdint>

namespace taylorkern {

enum class Layout : int32_t { channels_first = 0, channels_last = 1 };
enum class Dtype : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };  // the CPU has no f16, CUDA no f64
enum class Activation : int32_t { none = 0, relu = 1, relu6 = 2, leaky_relu = 3, silu = 4, hardswish = 5 };

struct Shape {
  int64_t N, C, S;
  Layout layout;
  Dtype dtype;
};

constexpr int64_t kCacheLine = 64;

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Whether every row, of channels or of positions, is made of whole cache lines, and so of whole registers
inline bool whole_lines(const Shape& shape) {
  return (shape.layout == Layout::channels_last ? shape.C : shape.S) * bytes_of(shape.dtype) % kCacheLine == 0;
}

// s[n,c] = sum_S a * g
struct ChannelScores {
  Shape shape;
  const void* a;  // [N, C, S]
  const void* g;  // [N, C, S]
  void* s;        // [N, C] acc, written
};

// y = act(x * scale + shift [+ residual]), scale = weight / sqrt(var + eps), shift = bias - mean * scale, each rounded
// as torch's own batch normalisation rounds it
// The activations are those of formula.h; slope is leaky_relu's for z below 0. silu and hardswish have no mask.
struct BatchNormAct {
  Shape shape;
  const void* x;         // [N, C, S]
  const void* residual;  // [N, C, S] or null: no residual
  const void* weight;    // [C] acc or null: ones
  const void* bias;      // [C] acc or null: zeros
  void* y;               // [N, C, S], written
  void* mask;            // [N, C, S] bytes or null: not wanted; written with 1 where formula.h's passes(z), else with 0
  void* mean;            // [C] acc; training: written, the batch's (0 if the batch is empty); otherwise read
  void* var;             // [C] acc; training: written, the batch's biased variance (0 if empty); otherwise read
  double eps;
  bool training;
  Activation activation;
  double slope;
};

// dz = dy * act'(z). Where the forward's mask is given it says where act' is 1, and where relu's y is given it does, being
// positive there; else z is computed from x by the forward's own expression (right only if there was no residual).
// xhat = (x - mean) / sqrt(var + eps), A[n,c] = sum_S xhat * dz, B[n,c] = sum_S dz, M = N * S:
//   s = weight * A + bias * B,  dweight = sum_N A,  dbias = sum_N B
//   training: dx = scale * (dz - dbias / M - xhat * dweight / M);  otherwise: dx = scale * dz
// On the CPU, where rows are whole cache lines, dx may be written over dy, or dresidual may if y is given.
struct BatchNormActBackward {
  Shape shape;
  const void* dy;      // [N, C, S]
  const void* x;       // [N, C, S]
  const void* mask;    // [N, C, S] bytes or null
  const void* y;       // [N, C, S] or null: the forward's, of relu, in the place of a mask
  const void* weight;  // [C] acc or null: ones
  const void* bias;    // [C] acc or null: zeros
  const void* mean;    // [C] acc, as the forward used it
  const void* var;     // [C] acc, as the forward used it
  void* dx;            // [N, C, S], written
  void* dresidual;     // [N, C, S] or null: not wanted; written with dz
  void* dweight;       // [C] acc, written
  void* dbias;         // [C] acc, written
  void* s;             // [N, C] acc, written
  double eps;
  bool training;
  Activation activation;
  double slope;
};

// running = running + momentum * (batch's - running), for the mean and for the variance made unbiased: var * correction
struct RunningStatistics {
  int64_t C;
  Dtype dtype;        // f32 or f64: acc
  const void* mean;   // [C] acc
  const void* var;    // [C] acc
  void* running_mean; // [C] acc, read and written
  void* running_var;  // [C] acc, read and written
  double momentum, correction;
};

// Channels [channel, channel + length) of a piece, which belong to the units from `unit` on, one each
struct FoldRun {
  int64_t piece, channel, unit, length;
};

struct FoldPiece {
  const void* s;  // [N, C] acc
  int64_t C;
};

// With t[n,u] the sum of s[n] over the channels of unit u in all pieces, in the order of the runs:
//   sums[u] = sum_N t[n,u],  squares[u] = sum_N t[n,u]^2
struct Fold {
  int64_t N, U, count;      // count: of runs
  Dtype dtype;              // f32 or f64: acc
  const FoldPiece* pieces;
  const FoldRun* runs;      // [count]
  double* sums;             // [U], written
  double* squares;          // [U], written
};

// to[i] += from[i] for all `count` numbers
struct Addend {
  const double* from;
  double* to;
  int64_t count;
};

namespace cpu {

// threads: how many may work; it never changes a bit of the result.
void channel_scores(const ChannelScores& args, int threads);
void batch_norm_act(const BatchNormAct& args, int threads);
void batch_norm_act_backward(const BatchNormActBackward& args, int threads);
void follow(const RunningStatistics& args);
void fold(const Fold& args, int threads);
// Adds everything, or nothing where one number to be added is not finite; says which.
bool accumulate(const Addend* addends, int64_t count);

}  // namespace cpu

namespace cuda {

// Where and how a call runs. All pointers of its arguments and of `workspace` are of the current device's memory; nothing
// is waited for. What is put on one stream runs in order, so that a workspace may be freed there after the call.
struct Launch {
  void* stream;           // a cudaStream_t
  void* workspace;        // workspace_bytes(shape), of any content, aligned to 16 bytes
  int64_t resident_bytes; // of the second-level cache: channels are taken in waves that stay there between passes; 0: not
};

// Of any operation on tensors of this shape, and the same whatever is resident
int64_t workspace_bytes(const Shape& shape);

// They throw std::runtime_error where a kernel can't be launched. resident_bytes never changes a bit of the result.
void channel_scores(const ChannelScores& args, const Launch& launch);
void batch_norm_act(const BatchNormAct& args, const Launch& launch);
void batch_norm_act_backward(const BatchNormActBackward& args, const Launch& launch);
void follow(const RunningStatistics& args, const Launch& launch);

}  // namespace cuda
}  // namespace taylorkern
