// From an activation's code to its type. What networks are made of has code of its own; the rest is decided as it goes.
#pragma once

#include "../formula.h"

namespace taylorkern::cuda {

// run(act)
template <class Run>
void with_activation(Activation kind, double slope, const Run& run) {
  if (kind == Activation::relu) return run(Relu<float>{});
  if (maskable(kind)) return run(AnyKinked<float>{kind, static_cast<float>(slope)});
  run(AnySmooth<float>{kind});
}

}  // namespace taylorkern::cuda
