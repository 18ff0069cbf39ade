#include <vector>

#include "threads.h"

namespace taylorkern::cpu {
namespace {

constexpr int64_t kUnits = 512;  // whose sums stay in the first-level cache from sample to sample
constexpr int64_t kAhead = 4;  // samples: what is read of one is too short for a processor to foresee the next

template <class A>
void prefetch(const A* from, int64_t length) {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(A));
  for (int64_t i = 0; i < length; i += line) __builtin_prefetch(from + i);
}

// The runs of each block of units, cut where blocks end, in the order they had
std::vector<std::vector<FoldRun>> by_block(const Fold& args) {
  std::vector<std::vector<FoldRun>> blocks(static_cast<size_t>(ceil_div(args.U, kUnits)));
  for (const FoldRun* of = args.runs; of != args.runs + args.count; ++of) {
    for (int64_t begin = of->unit, end = of->unit + of->length, next; begin < end; begin = next) {
      next = std::min(end, (begin / kUnits + 1) * kUnits);
      const FoldRun part{of->piece, of->channel + begin - of->unit, begin, next - begin};
      blocks[static_cast<size_t>(begin / kUnits)].push_back(part);
    }
  }
  return blocks;
}

// Sums of units [begin, begin + units), to which the runs belong
template <class A>
void fold_block(const Fold& args, const std::vector<FoldRun>& runs, int64_t begin, int64_t units) {
  double sample[kUnits], sums[kUnits] = {}, squares[kUnits] = {};
  for (int64_t n = 0; n < args.N; ++n) {
    std::fill_n(sample, units, 0.0);
    for (const FoldRun& of : runs) {
      const A* from = static_cast<const A*>(args.pieces[of.piece].s) + n * args.pieces[of.piece].C + of.channel;
      double* to = sample + of.unit - begin;
      if (n + kAhead < args.N) prefetch(from + kAhead * args.pieces[of.piece].C, of.length);
      for (int64_t i = 0; i < of.length; ++i) to[i] += static_cast<double>(from[i]);
    }
    for (int64_t u = 0; u < units; ++u) {
      sums[u] += sample[u];
      squares[u] += sample[u] * sample[u];
    }
  }
  std::copy_n(sums, units, args.sums + begin);
  std::copy_n(squares, units, args.squares + begin);
}

}  // namespace

void fold(const Fold& args, int threads) {
  const auto blocks = by_block(args);
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t block, int) {
    const int64_t begin = block * kUnits, units = std::min(kUnits, args.U - begin);
    const auto& runs = blocks[static_cast<size_t>(block)];
    args.dtype == Dtype::f64 ? fold_block<double>(args, runs, begin, units) : fold_block<float>(args, runs, begin, units);
  });
}

}  // namespace taylorkern::cpu
