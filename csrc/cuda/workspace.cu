#include "workspace.h"

namespace taylorkern::cuda {

int64_t workspace_bytes(const Shape& shape) {
  const int whole = static_cast<int>(16 / bytes_of(shape.dtype));
  return std::max(Workspace::bytes(Tiling::of(shape, 1)), Workspace::bytes(Tiling::of(shape, whole)));
}

}  // namespace taylorkern::cuda
