#!/usr/bin/env bash
# Build, test, check and measure on a machine with a GPU and without a network, in under 9 minutes.
#
#   benchmarks/gpu_check.sh [FOLDER]
#
# There must be python3 with torch, pybind11, scikit-build-core, cmake, ninja, pytest, rich and
# matplotlib, and CUDA's nvcc and compute-sanitizer. PYTHON=... takes another interpreter.
# FOLDER (else $OUT, else benchmarks/gpu) gets gpu.json, gpu.md (the table), gpu.png and the log.
#
# A part that fails does not keep the later ones from running; the summary has the exit status of
# each, and the script's own is 1 if any failed. To exit with 0 is not enough: what a part must
# have printed has to be there too, or tests that were all skipped would pass.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
total=${TOTAL_SECONDS:-520}
for_benchmark=180 # seconds that the parts before it must leave
out=${1:-${OUT:-benchmarks/gpu}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/gpu_check.log
: >"$log" || exit 2
if nvcc=$(command -v nvcc); then # compute-sanitizer may lie beside it, where PATH does not reach
  PATH=$PATH:$(dirname "$(readlink -f "$nvcc")")
fi
export FASTLSTM_CUDA_KERNELS=${FASTLSTM_CUDA_KERNELS:-1} # 0: cuDNN's own times, without ours
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

summary=()
failed=0
shown=25 # lines of the output of a part that fails

# part NAME LIMIT PATTERNS COMMAND...: run it for LIMIT seconds at most; succeeds if the command does
# and its output has a match for each line of PATTERNS. The first one's is shown in the summary.
part() {
  local name=$1 limit=$2 patterns=$3 begin=$SECONDS offset status pattern line
  local reason='' verdict
  shift 3
  printf '== %s\n' "$name" | tee -a "$log"
  offset=$(wc -c <"$log")
  if ((limit < 1)); then
    status=124
    reason='no time left'
  else
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
    status=$?
  fi
  while IFS= read -r pattern; do
    # Not grep -q, which ends before it has read all and so fails the pipe.
    output_from "$offset" | grep -E "$pattern" >/dev/null ||
      reason=${reason:-"not in its output: $pattern"}
  done <<<"$patterns"
  ((status == 0)) || reason="exit status $status${reason:+, $reason}"
  line=$(output_from "$offset" | grep -E "${patterns%%$'\n'*}" | tail -n 1)
  if [[ $reason ]]; then
    failed=1
    printf '%s FAILED (%s); the end of its output:\n' "$name" "$reason"
    output_from "$offset" | tail -n "$shown"
  fi
  verdict=${reason:+FAILED}
  summary+=("$(printf '%-10s %-6s %4d s  %s' "$name" "${verdict:-ok}" $((SECONDS - begin)) \
    "${reason:+$reason; }$line")")
  [[ ! $reason ]]
}

output_from() {
  tail -c +$(($1 + 1)) "$log"
}

# The limit of a part before the benchmark.
at_most() {
  local left=$((total - SECONDS - for_benchmark))
  echo $(($1 < left ? $1 : left))
}

part device "$(at_most 60)" '^torch .* on ' "$python" -c '
import torch
print("torch", torch.__version__, "on", torch.cuda.get_device_name())'

peers=()
if part build "$(at_most 300)" '^Successfully installed .*fastlstm' "$python" -m pip install \
  --no-build-isolation --no-index -Ccmake.define.FASTLSTM_CUDA=on \
  -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native .; then
  workers=()
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8 -p no:benchmark); fi
  part tests "$(at_most 180)" '[0-9]+ passed' env OMP_NUM_THREADS=2 "$python" -m pytest -q -rs \
    -p no:cacheprovider ${workers[@]+"${workers[@]}"} tests/test_cuda.py
  # Without torch's cache of memory, so that every tensor has bounds that memcheck knows; without
  # reports of API calls, of which CUDA's own libraries make some that fail when they start.
  for tool in memcheck racecheck; do
    part "$tool" "$(at_most 90)" $'SUMMARY: 0 (errors|hazards)\n^all right$' \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 86 \
      --report-api-errors no "$python" benchmarks/gpu_short.py
  done
else
  for name in tests memcheck racecheck; do
    summary+=("$(printf '%-10s FAILED         not run, as there is no build' "$name")")
  done
  peers=(--peers torch flashrnn haste scan) # an older fastlstm may be installed
fi

shown=250
before=$(wc -c <"$log")
left=$((total - SECONDS))
if part benchmark "$left" '^wrote .*gpu.md' "$python" benchmarks/compare.py --device cuda \
  --within $((left - 20)) --json "$out/gpu.json" --plot "$out/gpu.png" --results "$out/gpu.md" \
  ${peers[@]+"${peers[@]}"}; then
  output_from "$before"
fi

printf '\n== summary, %d s\n' "$SECONDS" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit "$failed"
