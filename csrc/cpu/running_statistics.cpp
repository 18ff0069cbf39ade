#include "../formula.h"
#include "../ops.h"

namespace taylorkern::cpu {
namespace {

template <class A>
void run(const RunningStatistics& args) {
  const A momentum = static_cast<A>(args.momentum), correction = static_cast<A>(args.correction);
  const A *mean = static_cast<const A*>(args.mean), *var = static_cast<const A*>(args.var);
  A *running_mean = static_cast<A*>(args.running_mean), *running_var = static_cast<A*>(args.running_var);
  for (int64_t c = 0; c < args.C; ++c) running_mean[c] = moved(running_mean[c], mean[c], momentum);
  for (int64_t c = 0; c < args.C; ++c) running_var[c] = moved(running_var[c], var[c] * correction, momentum);
}

}  // namespace

void follow(const RunningStatistics& args) { args.dtype == Dtype::f64 ? run<double>(args) : run<float>(args); }

}  // namespace taylorkern::cpu
