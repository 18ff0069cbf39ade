// What a call's passes leave for one another: up to three numbers for each slot and channel.
#pragma once

#include "tiling.h"

namespace taylorkern::cuda {

struct Workspace {
  float* sums[3];  // [slots, C] each

  Workspace(void* memory, const Tiling& tiling) {
    for (int k = 0; k < 3; ++k) sums[k] = static_cast<float*>(memory) + k * tiling.slots * tiling.C;
  }

  static int64_t bytes(const Tiling& tiling) { return 3 * tiling.slots * tiling.C * static_cast<int64_t>(sizeof(float)); }
};

}  // namespace taylorkern::cuda
