#!/usr/bin/env bash
# What only a GPU can show, in one call with a time limit: for a machine that is lent for minutes.
#
#     tests/on_gpu.sh OUT SECONDS [PART ...]
#
# Parts: step, learn (VICReg and xID on the clips in data/grid-s1, and the tests beside them), inference, training, bank;
# without a name all of them, in this order, the most wanted first. What times a step has the GPU to itself. A part that
# fails or runs out of time takes nothing from the others; a training that runs out of time saves first. All that was
# printed is in OUT/log.txt, the end of each part here; tables, pictures and GRID's learning curves are beside it.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1" && out=$(realpath "$1") && end=$((SECONDS + $2)) || exit 2
shift 2
export AVSSRL_NEEDS_GPU=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
logs=$(mktemp -d)

part() {  # NAME SECONDS COMMAND...: run a command of ours for so long at most; SIGTERM, and SIGKILL 20 s later
    local name=$1 limit=$2 left=$((end - SECONDS - 20)) start=$SECONDS status=0
    shift 2
    ((limit > left)) && limit=$left
    if ((limit < 5)); then
        echo "==== $name: no time left" | tee -a "$out/log.txt"
        return
    fi
    timeout --kill-after=20 "$limit" "$python" "$@" >"$logs/$name" 2>&1 || status=$?
    { echo "==== $name: status $status after $((SECONDS - start)) s: python3 $*"; cat "$logs/$name"; } >>"$out/log.txt"
    echo "==== $name: status $status after $((SECONDS - start)) s"
    tail -n 30 "$logs/$name" | cut -c1-200
}

step() {
    part step 150 -m utils.benchmark step configs/VGGSound-N1024.yaml --top-kernels 15 \
        --json "$out/step.json" --png "$out/step.png"
}

learn() {
    local limit=$((end - SECONDS - 60))  # leaves the curves their time
    ((limit > 400)) && limit=400
    part vicreg $limit main-vicreg.py configs/grid/vicreg.yaml --set num_workers=7 &
    part xid $limit main-ssl.py configs/grid/xid.yaml --set num_workers=7 &
    part tests 240 -m pytest -q -n 3 --durations=5 tests/test_gpu.py &
    wait
    part curves 30 -m utils.report curves configs/grid/vicreg.yaml configs/grid/xid.yaml --out "$out/curves.png"
    for run in vicreg xid; do cp "checkpoints/grid/$run/metrics.jsonl" "$out/$run-metrics.jsonl"; done
}

inference() {
    part inference 90 -m utils.benchmark inference configs/ucf/8at16-linear.yaml --json "$out/inference.json"
}

training() {
    part training 90 -m utils.benchmark training configs/grid/vicreg.yaml --png "$out/training.png"
}

bank() {
    part bank 60 -m utils.benchmark bank --steps 20
}

nvidia-smi | tee -a "$out/log.txt" | head -n 12
[ $# -gt 0 ] || set -- step learn inference training bank
for name in "$@"; do
    "$name"
done
