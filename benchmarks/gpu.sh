#!/usr/bin/env bash
# The first minutes on a GPU: is it right, how fast is it, what comes next.
#
#   bash benchmarks/gpu.sh main       # at most 540 s: build, values, tests, targets, step, both stages, experiments
#   bash benchmarks/gpu.sh profile    # at most 280 s: kernels by torch's profiler and by ncu
#   DEVICE=cpu QUICK=1 bash benchmarks/gpu.sh main    # tiny sizes, 3 minutes on 2 cores: that the script itself runs
#
# Needs python3 (or PYTHON) with a CUDA build of torch, numpy, h5py, tqdm and pytest. No data, network, git or gensim.
# What it finds is under OUT (default runs/gpu), eight files at most, each written as it comes: MODE.log,
# sanitizer.txt, machine-cuda.json, loss-cuda.json, step-paper-cuda.json, runs.txt, experiments-cuda.json. Each step has a
# limit of its own and the common end; after a failure the next one runs, and the script ends with 1.
set -uo pipefail
MODE=${1:-main}
case $MODE in main) TOTAL=540 ;; profile) TOTAL=280 ;; *) echo "gpu.sh: main or profile, not $MODE"; exit 2 ;; esac
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} OUT=${OUT:-$ROOT/runs/gpu}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
exec > >(tee "$OUT/$MODE.log") 2>&1
cd "$WORK" || exit 1
PY=${PYTHON:-python3}
PATH=$(dirname "$("$PY" -c 'import sys; print(sys.executable)')"):$PATH  # ninja lies beside python
export PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=$ROOT TORCHINDUCTOR_CACHE_DIR=$WORK/inductor

# step NAME LIMIT COMMAND...: at most LIMIT s, less if the common end is nearer.
step() {
  local name=$1 limit=$2 left=$((TOTAL - SECONDS)) begin=$SECONDS rc=0
  shift 2
  if [ "$left" -lt 12 ]; then echo "$name: left out, $left s left" | tee -a "$WORK/steps"; return; fi
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n### %s (at %s s, at most %s s)\n' "$name" "$SECONDS" "$limit"
  timeout --kill-after=5 "$limit" "$@" || rc=$?
  echo "$name: rc $rc, $((SECONDS - begin)) s" | tee -a "$WORK/steps"
  return $rc
}

# Compute-sanitizer reads every access of our kernels; without the caching allocator, or else an access past a
# tensor's end stays in the pool and passes.
sanitize() {
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 75 compute-sanitizer --tool "$tool" --kernel-name kns=3mcn4cuda \
      --print-limit 5 --error-exitcode 9 "$PY" "$ROOT/benchmarks/gpu_check.py" --tiny
    echo "$tool: rc $?"
  done > "$OUT/sanitizer.txt" 2>&1
}

# Both stages and the evaluation as a user runs them; $1 begins the run folders' names, then stage 1's flags, --, stage 2's.
stages() {
  local name=$1 pair=(--pair AV --device "$DEVICE") run=(--device "$DEVICE")
  shift
  while [ "$1" != -- ]; do pair+=("$1"); shift; done
  shift
  step "$name: stage 1" 70 "$PY" "$ROOT/train_stage1.py" "${pair[@]}" --out "runs/$name-1"
  local store=$WORK/paper.h5
  [ "$name" = demo ] && store=$WORK/data/demo/train.h5
  step "$name: words" 20 "$PY" "$ROOT/benchmarks/made_up.py" words "$store" "$name.npz"
  step "$name: stage 2" 70 "$PY" "$ROOT/train_stage2.py" --add T --init "runs/$name-1" --out "runs/$name-2" \
    --word2vec "$name.npz" "$@" "${run[@]}"
  local data=()
  [ "$name" = paper ] && data=("$WORK/paper-eval.h5")
  step "$name: evaluate" 40 "$PY" "$ROOT/evaluate.py" --youcook2 "${data[@]}" --run "runs/$name-2" "${run[@]}"
}

echo "commit $(git -C "$ROOT" describe --always --dirty 2>/dev/null || echo unknown), device $DEVICE, $("$PY" --version), $(nproc) cores, $(date -u +%FT%TZ)"
[ "$DEVICE" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv
df -h /dev/shm "$WORK"; free -g | head -n 2
if ! "$PY" -c 'import sys; from mcn_ext import ops; sys.exit(not (ops.has_cuda() or (sys.argv[1] == "cpu" and "error" not in ops.build_info())))' \
    "$DEVICE" 2> /dev/null; then  # with MCN_CUDA=1 a missing toolkit is an error, not a build for CPUs
  step build 150 env -C "$ROOT" MCN_CUDA=$([ "$DEVICE" = cuda ] && echo 1) "$PY" setup.py --quiet build_ext --inplace
fi
step built 30 "$PY" -m mcn_ext
step data 60 "$PY" "$ROOT/benchmarks/made_up.py" stores "$WORK"
SIZES=() STAGE1=() STAGE=(--max_steps 12 --queue_size 8) DEMO=()
if [ -n "$QUICK" ]; then
  SIZES=(--batch_size 2 --n_pair 4 --audio_width 0.0625 --embd_dim 32 --cluster_size 4 --audio_frames 200)
  STAGE1=(--audio_width 0.0625 --embd_dim 32 --recon_dim 8)  # stage 2 inherits them
  STAGE=(--batch_size 4 --n_pair 4 --cluster_size 4 --audio_frames 200 --min_time 1 --max_steps 2 --queue_size 2)
  DEMO=(--max_steps 2)
fi

if [ "$MODE" = main ]; then
  step check 90 "$PY" "$ROOT/benchmarks/gpu_check.py"
  [ "$DEVICE" = cuda ] && command -v compute-sanitizer > /dev/null && { sanitize & SANITIZER=$!; }
  step tests 130 env -C "$ROOT" "$PY" -m pytest -q -m cuda -p no:cacheprovider $("$PY" -c 'import xdist; print("-n 6")' 2> /dev/null) \
    tests/test_cuda.py tests/test_loss.py tests/test_loss_torch.py
  [ -n "${SANITIZER:-}" ] && { wait "$SANITIZER"; grep -E "rc |ERROR SUMMARY|RACECHECK SUMMARY" "$OUT/sanitizer.txt" | tee -a "$WORK/steps"; }
  step machine 40 "$PY" "$ROOT/benchmarks/gpu_experiments.py" machine
  step loss 150 "$PY" "$ROOT/benchmarks/loss.py"
  step step 110 "$PY" "$ROOT/benchmarks/step.py" --preset paper --data "$WORK/paper.h5" "${SIZES[@]}"
  # A worker keeps three batches of 0.33 GB each in shared memory.
  WORKERS=$(df --output=avail -BM /dev/shm | awk 'NR == 2 { n = int($1 / 1300); print (n > 6 ? 6 : n) }')
  PAPER=(--preset paper --data "$WORK/paper.h5" --epochs 30 --log_every 2 "${STAGE[@]}")
  stages paper --workers "$WORKERS" "${PAPER[@]}" "${STAGE1[@]}" -- --workers "$WORKERS" "${PAPER[@]:4}"
  stages demo --data demo --workers 2 "${DEMO[@]}" -- --workers 2 "${DEMO[@]}"
  for file in runs/*/log.jsonl runs/*/metrics.json; do
    if [ -f "$file" ]; then echo "## $file"; tail -n 40 "$file"; fi
  done > "$OUT/runs.txt"
  step experiments 70 "$PY" "$ROOT/benchmarks/gpu_experiments.py" nccl k_means convolutions
else
  step profiler 110 "$PY" "$ROOT/benchmarks/gpu_profile.py" steps --preset paper --data "$WORK/paper.h5" "${SIZES[@]}"
  for size in "4096 512" "4096 6144" "32768 1024"; do  # ncu replays each of our kernels once a counter
    [ "$DEVICE" = cuda ] && step "ncu $size" 55 ncu --clock-control none --target-processes all --kernel-name-base function \
      --kernel-name 'regex:tile_|merge|finish|measure|copy_rows|add_gradients|conclude' --launch-count 24 \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats --section LaunchStats \
      --csv --page details "$PY" "$ROOT/benchmarks/gpu_profile.py" once $size
  done
fi
printf '\n=== %s s\n' "$SECONDS"
cat "$WORK/steps"; ls -l "$OUT"
! grep -qE "rc [1-9]|left out" "$WORK/steps"
