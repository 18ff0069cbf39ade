// From runtime codes to template arguments.
#pragma once

#include <type_traits>

#include "layout.h"

namespace taylorkern::cpu {

template <class T, class Run>
void with_layout(const Partition& part, Layout layout, const Run& run) {
  if (layout == Layout::channels_first) {
    run(T{}, ChannelsFirst{part});
  } else {
    run(T{}, ChannelsLast{part});
  }
}

// run(element, layout), with an element of the tensors' type
template <class Run>
void dispatch(const Shape& shape, const Partition& part, const Run& run) {
  switch (shape.dtype) {
    case Dtype::f32: return with_layout<float>(part, shape.layout, run);
    case Dtype::f64: return with_layout<double>(part, shape.layout, run);
    case Dtype::bf16: return with_layout<bfloat16>(part, shape.layout, run);
    case Dtype::f16: return;  // refused by the binding
  }
}

// What an operation does for a residual: nothing, everything, or a part that is decided at run time
struct WithoutResidual : std::false_type {};
struct WithResidual : std::true_type {};
struct MaybeResidual {};

// run(act, joined), with the activation over registers of A. What networks are made of has code of its own; the rest is
// decided register by register.
template <class A, class Run>
void with_activation(Activation activation, double slope, bool alone, bool joined, const Run& run) {
  if constexpr (std::is_same_v<A, float>) {
    if (activation == Activation::none && alone) return run(NoActivation<A>{}, WithoutResidual{});
    if (activation == Activation::relu && alone) return run(Relu<A>{}, WithoutResidual{});
    if (activation == Activation::relu && joined) return run(Relu<A>{}, WithResidual{});
  }
  if (maskable(activation)) return run(AnyKinked<A>{activation, static_cast<A>(slope)}, MaybeResidual{});
  run(AnySmooth<A>{activation}, MaybeResidual{});
}

// Whether a pointer is there: known in advance, or looked at
template <class Residual>
TAYLORKERN_INLINE bool given(const void* pointer) {
  if constexpr (std::is_same_v<Residual, MaybeResidual>) {
    return pointer != nullptr;
  } else {
    return Residual::value;
  }
}

}  // namespace taylorkern::cpu
