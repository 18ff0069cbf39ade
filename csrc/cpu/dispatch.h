// From the runtime dtype and layout to template arguments.
#pragma once

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
  }
}

}  // namespace taylorkern::cpu
