#!/bin/bash
# What the kernels of `ptxas -v` logs take: a row for every kernel, a column for every architecture, in the order they come.
# Usage: nvcc_table.sh log...   Exit status: 1 where registers are spilled, which is named on the error stream, or where
# the logs are not understood.
set -u
demangle=$(command -v c++filt || command -v cu++filt || true)

cat "$@" | if [ -n "$demangle" ]; then "$demangle" -p; else cat; fi | awk '
function shown(name) {
  gsub(/_GLOBAL__N__[0-9A-Za-z_]*::|\(anonymous namespace\)::|taylorkern::(cuda::)?/, "", name)
  sub(/^void /, "", name)
  return name
}
function number(text, unit) {  # the one before the unit
  return match(text, "[0-9]+ " unit) ? substr(text, RSTART, RLENGTH) + 0 : 0
}
/Compiling entry function/ {
  match($0, /sm_[0-9a-z]+/)
  architecture = substr($0, RSTART, RLENGTH)
  ++entries
  if (!(architecture in column)) { column[architecture] = ++columns; heading[columns] = architecture }
}
/Function properties for / {
  sub(/.*Function properties for /, "")
  kernel = shown($0)
  if (!(kernel in row)) { row[kernel] = ++rows; title[rows] = kernel; if (length(kernel) > widest) widest = length(kernel) }
}
/bytes stack frame/ {
  ++frames
  at = row[kernel] SUBSEP column[architecture]
  stack[at] = number($0, "bytes stack frame")
  stores = number($0, "bytes spill stores"); loads = number($0, "bytes spill loads")
  if (stores + loads) {
    spilled[at] = " !" stores "/" loads
    spills = spills "nvcc-check: " kernel " spills on " architecture ": " stores " bytes stored, " loads " loaded\n"
  }
  cells[at] = "-"  # a function that is no kernel
}
/ Used [0-9]+ registers/ {
  ++uses
  at = row[kernel] SUBSEP column[architecture]
  cells[at] = number($0, "registers")
  shared[at] = number($0, "bytes smem")
}
END {
  if (!entries && !frames && !uses) { print "no kernels"; exit 0 }
  if (uses != entries || frames < entries) {
    print "nvcc-check: of " entries + 0 " kernels ptxas told what " uses + 0 " use, and " frames + 0 " frames" > "/dev/stderr"
    exit 1
  }
  for (i = 1; i <= rows; ++i) for (j = 1; j <= columns; ++j) {
    at = i SUBSEP j
    if (shared[at]) cells[at] = cells[at] " +" shared[at]
    if (stack[at]) cells[at] = cells[at] " ~" stack[at]
    cells[at] = cells[at] spilled[at]
    if (length(cells[at]) > wide[j]) wide[j] = length(cells[at])
    if (length(heading[j]) > wide[j]) wide[j] = length(heading[j])
  }
  print "registers, +bytes of shared memory, ~bytes of stack, !bytes of spill stores/loads"
  line = sprintf("%-*s", widest, "")
  for (j = 1; j <= columns; ++j) line = line sprintf("  %*s", wide[j], heading[j])
  print line
  for (i = 1; i <= rows; ++i) {
    line = sprintf("%-*s", widest, title[i])
    for (j = 1; j <= columns; ++j) line = line sprintf("  %*s", wide[j], cells[i, j])
    print line
  }
  printf "%s", spills > "/dev/stderr"
  exit spills != ""
}'
