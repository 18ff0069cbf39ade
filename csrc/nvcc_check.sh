#!/bin/sh
# Compiles the shared headers and every CUDA source for all supported architectures, warnings as errors. Needs no GPU.
# Exit status: 0 sound, 1 broken, 77 no nvcc. NVCC names another compiler than the one on PATH.
set -u
here=$(cd "$(dirname "$0")" && pwd)
nvcc=${NVCC:-nvcc}
if ! command -v "$nvcc" >/dev/null 2>&1; then
  echo "nvcc-check: no nvcc on PATH, nothing checked" >&2
  exit 77
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

codes=""
for sm in 75 80 86 89 90 100 120; do codes="$codes -gencode arch=compute_$sm,code=sm_$sm"; done

# Every formula, on the device
cat >"$work/headers.cu" <<'EOF'
#include "formula.h"
#include "ops.h"

using namespace taylorkern;

template <class V>
__global__ void every_formula(const V* in, V* out, double eps, int code) {
  const V x = in[0], mean = in[1], weight = in[2], bias = in[3], dy = in[4], var = in[5];
  const double invstd = inverse_std(var, eps);
  const V scale = weight * running_inverse_std(var, eps);
  const V z = normalise(x, scale, normalise(-mean, scale, bias));
  const AnyKinked<V> kinked{static_cast<Activation>(code), in[9]};
  const AnySmooth<V> smooth{static_cast<Activation>(code)};
  out[0] = kinked.apply(z) + smooth.apply(z);
  out[1] = input_gradient(kinked.gradient(z, dy) + smooth.gradient(z, dy), x, mean, scale, in[6], in[7]);
  out[2] = gate_gradient(weight, bias, in[8], in[9]);
  const Moments<double> all = joined(moments_about<double>(x, mean, var, 4.0), 4.0, Moments<double>{x, dy}, 8.0);
  out[3] = moved(static_cast<V>(all.mean), in[10], in[11]);
  out[4] = static_cast<V>(biased_variance<V>(all.m2, 12.0));
  out[5] = kinked.passes(z) ? dy : kinked.stopped(dy);
}

template __global__ void every_formula<float>(const float*, float*, double, int);
template __global__ void every_formula<double>(const double*, double*, double, int);
EOF

status=0
for source in "$work/headers.cu" "$here"/cuda/*.cu; do
  [ -e "$source" ] || continue
  # shellcheck disable=SC2086  # codes holds several arguments
  if "$nvcc" -std=c++17 -O2 -I"$here" $codes -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
    -c "$source" -o "$work/object.o"; then
    echo "nvcc-check: $(basename "$source") compiles for every architecture"
  else
    echo "nvcc-check: $(basename "$source") is broken" >&2
    status=1
  fi
done
exit $status
