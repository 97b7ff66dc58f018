#!/usr/bin/env bash
# Everything on a CUDA machine in one call of at most 8 minutes: builds csrc, runs the kernel tests on the GPU (Triton compiled, not interpreted) and
# those of the step, compute-sanitizer where there is one, the benchmarks of operator, step and loader, and a profile of the step. Continues after a
# stage that fails and ends with a summary.
#   bench/run_gpu.sh             results go to bench/results, or to $OUT
#   PYTHON=.venv/bin/python      which Python (torch, triton, pytest, pytest-benchmark, setuptools)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
mkdir -p "$OUT"
names=() codes=()

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" > >(tee "$OUT/$name.log" | tail -n 60) 2>&1
    codes+=($?)
    names+=("$name")
}

stage machine 15 bash -c "nvidia-smi; '$PYTHON' -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'"
stage build 60 "$PYTHON" setup.py build_ext --inplace
stage tests 130 "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider tests/test_{sync_mask,mine_semi_hard,group_semi_hard}*.py tests/test_no_host_sync.py
if command -v compute-sanitizer >/dev/null; then
    stage sanitizer 40 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -c '
import torch
from syncmask_fast import ops
for shape in ((2, 3, 5, 9, 7), (3, 2, 70, 130, 33)):
    b, h, t, p, d = shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(b, h, n, d, device="cuda").to(dtype) for n in (t, p + 1, p + 1))
        words = torch.rand(b, t, device="cuda") < 0.7
        ops.sync_mask(q, k, words)
        ops.sync_mask(q, k, words, v=v, token_score="output", patch_score="weighted")
        for n, m, d in ((1, 1, 1), (130, 70, 33), (5, 300, 200)):
            anchors, candidates = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (n, m))
            ids, other_ids, positive = torch.arange(n, device="cuda"), torch.arange(m, device="cuda"), torch.rand(n, device="cuda")
            for count, temperature in ((1, None), (16, None), (64, 0.5)):
                ops.mine_semi_hard(anchors, candidates, ids, other_ids, positive, k=count, temperature=temperature)
for n, d in ((1, 4), (300, 9)):
    feats, ids = torch.randn(2, n, d, device="cuda"), torch.arange(n, device="cuda") // 3
    for search_space in (None, 130):
        torch.ops.syncmask.group_semi_hard(feats[0], feats[1], ids, 8, 0.0, 0, search_space, 2)
torch.cuda.synchronize()'
fi
stage operators 110 env SYNCMASK_BENCH_WHOLE=1 "$PYTHON" -m pytest bench/bench_{sync_mask,mine_semi_hard,group_semi_hard}.py --benchmark-only -q -k cuda
stage step 80 "$PYTHON" -m pytest bench/bench_step.py --benchmark-only -q -k cuda
stage profile 25 "$PYTHON" -m bench.profile_step base 128
stage loader 15 "$PYTHON" -m pytest bench/bench_loader.py --benchmark-only -q -k cuda

echo "== summary"
for i in "${!names[@]}"; do
    echo "${names[$i]}: $([ "${codes[$i]}" = 0 ] && echo ok || echo "failed (exit status ${codes[$i]})")"
done | tee "$OUT/summary.txt"
grep -q failed "$OUT/summary.txt" && exit 1
exit 0
