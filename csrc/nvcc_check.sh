#!/bin/bash
# Compiles the shared headers and every CUDA source for all supported architectures, warnings as errors, and prints what
# each kernel takes; a kernel that spills registers fails. Needs no GPU.
# Usage: nvcc_check.sh [sm_NN | file.cu]...   these architectures or sources alone; names in any order
# Exit status: 0 sound, 1 broken, 77 no nvcc. NVCC names another compiler than the one on PATH, JOBS how many run at once.
set -u
here=$(cd "$(dirname "$0")" && pwd)
nvcc=${NVCC:-nvcc}
jobs=${JOBS:-2}

architectures=()
sources=()
for argument in "$@"; do
  case $argument in
    sm_[0-9]*) architectures+=("$argument") ;;
    *.cu) sources+=("$argument") ;;
    *)
      echo "nvcc-check: $argument is neither an architecture (sm_90) nor a source (file.cu)" >&2
      exit 1
      ;;
  esac
done

if ! command -v "$nvcc" >/dev/null 2>&1; then
  echo "nvcc-check: no nvcc on PATH, nothing checked" >&2
  exit 77
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

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
  out[3] = moved(static_cast<V>(all.mean), in[10], in[11]) + static_cast<V>(invstd);
  out[4] = static_cast<V>(biased_variance<V>(all.m2, 12.0));
  out[5] = kinked.passes(z) ? dy : kinked.stopped(dy);
}

template __global__ void every_formula<float>(const float*, float*, double, int);
template __global__ void every_formula<double>(const double*, double*, double, int);
EOF

if [ ${#architectures[@]} -eq 0 ]; then
  architectures=(sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120)
fi
if [ ${#sources[@]} -eq 0 ]; then
  sources=("$work/headers.cu")
  for source in "$here"/cuda/*.cu; do
    if [ -e "$source" ]; then sources+=("$source"); fi
  done
fi

# A log for every architecture, for lines of compilers that share one are mixed. The host's part is the same for all.
compile() {
  local source=$1 architecture=$2 kind=-cubin
  if [ "$architecture" = "${architectures[0]}" ]; then kind=-c; fi
  "$nvcc" -std=c++17 -O2 -I"$here" -arch="$architecture" -Werror all-warnings -Xptxas -v \
    -Xcompiler -Wall,-Wextra,-Werror "$kind" "$source" -o "$work/$architecture.out" >"$work/$architecture.log" 2>&1 ||
    touch "$work/$architecture.failed"
}

status=0
for source in "${sources[@]}"; do
  name=$(basename "$source")
  started=$SECONDS
  rm -f "$work"/*.log "$work"/*.failed
  for architecture in "${architectures[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    compile "$source" "$architecture" &
  done
  wait
  broken=""
  for architecture in "${architectures[@]}"; do
    if [ -e "$work/$architecture.failed" ]; then
      broken="$broken $architecture"
      grep -v "^ptxas info" "$work/$architecture.log" >&2
    fi
  done
  if [ -n "$broken" ]; then
    echo "nvcc-check: $name is broken on$broken" >&2
    status=1
    continue
  fi
  echo "nvcc-check: $name compiles for ${architectures[*]} ($((SECONDS - started)) s)"
  logs=("${architectures[@]/#/$work/}")
  "$here/nvcc_table.sh" "${logs[@]/%/.log}" || status=1
done
exit $status
