#include <algorithm>
#include <memory>

#include "../ops.h"

namespace taylorkern::cpu {
namespace {

template <class A>
void run(const Fold& args) {
  const std::unique_ptr<double[]> sample(new double[args.U]);
  std::fill_n(args.sums, args.U, 0.0);
  std::fill_n(args.squares, args.U, 0.0);
  for (int64_t n = 0; n < args.N; ++n) {
    std::fill_n(sample.get(), args.U, 0.0);
    for (const FoldRun* of = args.runs; of != args.runs + args.count; ++of) {
      const A* from = static_cast<const A*>(args.pieces[of->piece].s) + n * args.pieces[of->piece].C + of->channel;
      double* to = sample.get() + of->unit;
      for (int64_t i = 0; i < of->length; ++i) to[i] += static_cast<double>(from[i]);
    }
    for (int64_t u = 0; u < args.U; ++u) {
      args.sums[u] += sample[u];
      args.squares[u] += sample[u] * sample[u];
    }
  }
}

}  // namespace

void fold(const Fold& args) { args.dtype == Dtype::f64 ? run<double>(args) : run<float>(args); }

}  // namespace taylorkern::cpu
