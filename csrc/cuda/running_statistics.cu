#include "../formula.h"
#include "launch.h"

namespace taylorkern::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocks) follow_batch(int64_t C, const float* mean, const float* var,
                                                         float* running_mean, float* running_var, float momentum,
                                                         float correction) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= C) return;
  running_mean[c] = moved(running_mean[c], mean[c], momentum);
  running_var[c] = moved(running_var[c], var[c] * correction, momentum);
}

}  // namespace

void follow(const RunningStatistics& args, const Launch& launch) {
  start(launch, ceil_div(args.C, kThreads), 0, follow_batch, args.C, static_cast<const float*>(args.mean),
        static_cast<const float*>(args.var), static_cast<float*>(args.running_mean),
        static_cast<float*>(args.running_var), static_cast<float>(args.momentum), static_cast<float>(args.correction));
}

}  // namespace taylorkern::cuda
