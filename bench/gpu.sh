#!/usr/bin/env bash
# Everything that needs a GPU, each call in under ten minutes:
#   bench/gpu.sh OUT                  what matters most: the kernels' times and tests, the headline of the suite, compute-sanitizer
#   bench/gpu.sh OUT tests            all tests that run on a GPU, those of the losses inside PyTorch too
#   bench/gpu.sh OUT suite [OPTIONS]  the whole suite, or a piece of it by options of python -m bench: --loss psc, --rows 1024 8192, ...
#
# Every step has a time limit and costs no other step its result. OUT gets at most seven files: log.txt, all that the steps printed;
# steps.json, how each ended; kernels.json; suite.json with its table and plots. Without a GPU the steps that need one are skipped and say so.
#
# Needs torch and pytest; to build, CMake, ninja, pybind11, setuptools and nvcc; for the suite, tyro and rich, and matplotlib for its plots.
set -u
mode=${2:-most}
if [[ -z ${1:-} || ! $mode =~ ^(most|tests|suite)$ ]]; then
  echo "usage: bench/gpu.sh OUT [tests | suite [options of python -m bench]]" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:/usr/local/cuda/bin"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} # shared by the steps: each kernel is compiled once
export NVCC_APPEND_FLAGS="--threads 0"                       # the architectures of one source side by side

record() ( # name, result, seconds; one at a time, as the sanitizers end side by side
  exec 9>"$scratch/lock" && flock 9
  printf '%-12s %s (%s s)\n' "$@"
  printf '%s\t%s\t%s\n' "$@" >>"$scratch/steps"
  "$python" - "$scratch/steps" >"$scratch/steps.json" <<'PYTHON' && mv "$scratch/steps.json" "$out/steps.json"
import json, sys
lines = [line.rstrip("\n").split("\t") for line in open(sys.argv[1])]
print(json.dumps({"steps": [{"step": step, "result": result, "seconds": int(seconds)} for step, result, seconds in lines]}, indent=1))
PYTHON
)

verdict() { # status of timeout, limit in seconds
  case $1 in
    0) echo passed ;;
    124 | 137) echo "stopped after $2 s" ;;
    *) echo "failed with status $1" ;;
  esac
}

keep() { (cd "$scratch" && tail -vn +1 "$1" >>"$out/log.txt"); }

limited() { timeout -s INT -k 5 "$@"; } # an interrupted Python still reports

step() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS result
  shift 2
  limited "$limit" "$@" >"$scratch/$name.log" 2>&1
  result=$(verdict $? "$limit")
  record "$name" "$result" $((SECONDS - start))
  [[ $result == passed ]] || tail -n 20 "$scratch/$name.log" | sed 's/^/    /'
  keep "$name.log"
}

tests() { # name, limit in seconds, files...: spread over processes, so that a kernel that hangs or crashes takes one process's tests alone
  local name=$1 limit=$2 start=$SECONDS cores shards status worst=0 counts i pids=()
  cores=$(nproc) shards=$((cores < 12 ? cores : 12))
  shift 2
  for ((i = 0; i < shards; i++)); do
    limited --foreground "$limit" "$python" -m pytest -v --tb=short -p no:cacheprovider -o faulthandler_timeout=45 --shard "$i/$shards" \
      "$@" >"$scratch/$name.$i" 2>&1 & # --foreground: one interrupt, not a second one that cuts the report of the first
    pids+=($!)
  done
  for i in "${pids[@]}"; do
    wait "$i"
    status=$?
    ((status == 5 || status <= worst)) || worst=$status # 5: no test in this shard
  done
  counts=$(sed -nE 's/^tests\/.* (PASSED|FAILED|SKIPPED|ERROR)( .*)?$/\1/p' "$scratch/$name".* | sort | uniq -c | xargs)
  record "$name" "$(verdict "$worst" "$limit"): ${counts:-none ended}, in $shards processes" $((SECONDS - start))
  grep -hE '^(FAILED|ERROR) ' "$scratch/$name".* | cut -c -200 | head -n 20
  for ((i = 0; i < shards; i++)); do keep "$name.$i"; done
}

suite() { # name, limit in seconds, arguments of python -m bench...
  local name=$1 limit=$2 json=$out/$1.json lacking
  shift 2
  lacking=$("$python" -c 'import importlib.util as u; print(*(name for name in ("tyro", "rich") if u.find_spec(name) is None))')
  if [[ -n $lacking ]]; then
    record "$name" "failed: not installed: $lacking" 0
    return
  fi
  step "$name" "$limit" "$python" -m bench "$@" --out "$json"
  [[ ! -f $json ]] || step report 15 "$python" -m bench.report "$json" # also of the cases before a limit
}

sanitizers() { # limit in seconds; torch's cache of memory would hide what lies beside a tensor
  local tool
  for tool in memcheck racecheck initcheck; do
    step "$tool" "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/sanitize_cuda.py &
  done
  wait
}

without() { # reason why the steps named cannot run
  local name
  for name in "${@:2}"; do record "$name" "skipped: $1" 0; done
}

no_gpu=$("$python" -c 'import torch; print("" if torch.cuda.is_available() else "torch sees no CUDA device")' 2>/dev/null) ||
  no_gpu="torch cannot be imported"
{
  echo "date: $(date -u +%FT%TZ)"
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv 2>&1
} >"$out/log.txt"

# the limits of a call come to 560 s at most: the rest of ten minutes is for the ends of what is stopped
step build 110 "$python" setup.py -q build_ext --inplace
step usable 20 "$python" -m fastsupcon
sed 's/^/    /' "$scratch/usable.log"
if [[ -n $no_gpu ]]; then
  without "$no_gpu" kernels tests suite memcheck racecheck initcheck
  suite quick 120 cpu --quick
elif [[ $mode == tests ]]; then
  tests tests 420 tests/test_gpu.py tests/test_contract.py tests/test_losses.py tests/test_operators.py
elif [[ $mode == suite ]]; then
  suite suite 410 gpu "${@:3}"
else
  step kernels 45 "$python" -m bench.gpu_kernels "$out/kernels.json"
  tests tests 100 -m gpu tests/test_gpu.py
  suite suite 195 gpu --quick
  if command -v compute-sanitizer >/dev/null; then sanitizers 75; else without "no compute-sanitizer" memcheck racecheck initcheck; fi
fi
! grep -qP '\t(failed|stopped)' "$scratch/steps"
