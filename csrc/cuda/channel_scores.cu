#include "launch.h"
#include "workspace.h"

namespace taylorkern::cuda {
namespace {

// s of whole samples, or `parts` [slots, C] of samples that several tiles share
template <class T, class Tile, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scores(const T* a, const T* g, float* s, float* parts, Tiling tiling) {
  struct Pair {
    Pack<T, V> a, g;
  };
  const Tile tile(tiling, blockIdx.x);
  const auto stage = [&](const Slice& slice) { return Pair{load<T, V>(a, slice), load<T, V>(g, slice)}; };
  const auto add = [&](const Slice&, const Pair& pair, auto& sums) {
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0][j % Tile::kWidth] += widen(pair.a.at(j)) * widen(pair.g.at(j));
  };
  const auto of_sample = [&](int64_t n, int64_t c, const float (&sum)[1]) {
    if (tiling.chunks == 1) s[n * tiling.C + c] = sum[0];
  };
  const auto of_tile = [&](int64_t c, const float (&sum)[1]) {
    if (tiling.chunks > 1) parts[tile.slot * tiling.C + c] = sum[0];
  };
  tile.template reduce<1>(stage, add, of_sample, of_tile);
}

__global__ void __launch_bounds__(kThreads, kBlocks) join(const float* parts, float* s, Tiling tiling) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= tiling.N * tiling.C) return;
  const int64_t n = i / tiling.C, c = i % tiling.C;
  float sum = 0;
  for (int64_t k = 0; k < tiling.chunks; ++k) sum += parts[(n * tiling.chunks + k) * tiling.C + c];
  s[i] = sum;
}

}  // namespace

void channel_scores(const ChannelScores& args, const Launch& launch) {
  dispatch(args.shape, aligned({args.a, args.g}), [&](auto access, auto width) {
    using T = typename decltype(access)::element;
    using Tile = typename decltype(access)::tile;
    constexpr int V = decltype(width)::value;
    const Tiling tiling = Tiling::of(args.shape, V);
    const Workspace workspace(launch.workspace, tiling);
    float* const s = static_cast<float*>(args.s);
    start(launch, tiling.blocks(), Tile::template shared_bytes<float>(1), scores<T, Tile, V>,
          static_cast<const T*>(args.a), static_cast<const T*>(args.g), s, workspace.sums[0], tiling);
    if (tiling.whole_samples()) return;
    start(launch, ceil_div(tiling.N * tiling.C, kThreads), 0, join, workspace.sums[0], s, tiling);
  });
}

}  // namespace taylorkern::cuda
