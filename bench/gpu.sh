#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: build, tests, compute-sanitizer, benchmarks. Usage: bench/gpu.sh OUT
# Each step has its own time limit, writes its log to OUT, and its end to OUT/steps.json whatever became of the others.
# Without a GPU the steps that need one are reported as skipped, and why.
set -u
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

steps=()
record() { # name, result, seconds
  steps+=("{\"step\": \"$1\", \"result\": \"$2\", \"seconds\": $3}")
  printf '%-12s %-30s %5ss\n' "$1" "$2" "$3"
  local joined
  joined=$(IFS=,; echo "${steps[*]}")
  printf '{"steps": [%s]}\n' "$joined" >"$out/steps.json.part" && mv "$out/steps.json.part" "$out/steps.json"
}

step() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS result
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  case $status in
    0) result=passed ;;
    124) result="stopped after $limit s" ;;
    *) result="failed with status $status" ;;
  esac
  record "$name" "$result" $((SECONDS - start))
  return $status
}

gpu_step() {
  if [[ -n $no_gpu ]]; then record "$1" "skipped: $no_gpu" 0; else step "$@"; fi
}

sanitize() {
  if [[ -z $no_gpu ]] && ! command -v compute-sanitizer >/dev/null; then
    record "$1" "skipped: no compute-sanitizer" 0
  else
    gpu_step "$1" 40 compute-sanitizer --tool "$1" --error-exitcode 9 "$python" bench/sanitize_cuda.py
  fi
}

no_gpu=$("$python" -c 'import torch; print("" if torch.cuda.is_available() else "torch sees no CUDA device")' 2>&1 | tail -1)
{
  echo "date: $(date -u +%FT%TZ)"
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv
} >"$out/machine.txt"

step build 150 "$python" setup.py -q build_ext --inplace
tests() { gpu_step "tests-$1" "$2" "$python" -m pytest -q -m gpu -k "$3" tests; } # apart: a kernel that hangs takes its own group alone
tests triton 60 "triton"
tests self 35 "not triton and test_self"
tests cross 35 "not triton and test_cross"
tests rest 30 "not triton and not test_self and not test_cross"
gpu_step kernels 40 bash -c "\"$python\" bench/gpu_kernels.py >\"$out/kernels.json\""
for tool in memcheck racecheck initcheck; do sanitize "$tool"; done
gpu_step suite 130 "$python" -m bench gpu --out "$out/suite.json"
[[ -z $no_gpu ]] || step quick 90 "$python" -m bench cpu --quick --out "$out/quick.json"
! grep -q 'failed\|stopped' "$out/steps.json"
