#!/usr/bin/env bash
# What only a GPU can show, in calls with a time limit: for a machine that is lent for minutes.
#
#     tests/on_gpu.sh OUT SECONDS [PART ...]
#
# Parts, the most wanted first, which is the order without a name (`leads` needs its name):
#     smoke      the quick GPU tests, among them CUDA graphs, SyncBN and staging
#     step       the training step's table
#     learn      VICReg and xID on the clips in data/grid-s1, 40 epochs side by side; a second call goes on with them
#     leads      xID there in three other forms, likewise: what was not yet tried at that size
#     training   loader and step together, on the same clips, decoded once and as they come
#     inference  the evaluation's table
#     tests      all GPU tests
#     bank       the memory bank's
# What times a step has the GPU to itself. A part that fails or runs out of time takes nothing from the others; a training
# that runs out of time saves first. All that was printed is in OUT/log.txt, the end of each part here; tables, pictures
# and learning curves are beside it, no more than eight files. What can be known of compilation without a GPU says
# tests/for_a_gpu.py.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1" && out=$(realpath "$1") && end=$((SECONDS + $2)) || exit 2
shift 2
export AVSSRL_NEEDS_GPU=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
logs=$(mktemp -d)
gpu_tests="tests/test_gpu.py tests/models/test_stem_kernels.py tests/datasets/test_staging.py tests/utils/test_compiling.py\
    tests/utils/test_prefetch.py tests/utils/test_benchmark_step.py"

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
    return $status
}

smoke() {
    part smoke 300 -m pytest -v -n 4 $gpu_tests \
        -k "graphs or None or waits or guard or fp32 or pass or synchronised or staging or prefetch"
}

step() {
    part step 340 -m utils.benchmark step configs/VGGSound-N1024.yaml --rounds 3 --top-kernels 15 \
        --json "$out/step.json" --png "$out/step.png"
}

learn() {
    local limit=$((end - SECONDS - 60))
    train vicreg main-vicreg.py vicreg &
    train xid main-ssl.py xid &
    wait
    part curves 30 -m utils.report curves configs/grid/vicreg.yaml configs/grid/xid.yaml --out "$out/curves.png"
    for run in vicreg xid; do cp "checkpoints/grid/$run/metrics.jsonl" "$out/$run-metrics.jsonl"; done
}

leads() {
    local limit=$((end - SECONDS - 30)) plain="--set dataset.train.plain_epochs=10"
    train xid-seed1 main-ssl.py xid --seed 1 &
    train xid-depth10 main-ssl.py xid $plain --set model.args.video_backbone_args.depth=10 &
    train xid-bank main-ssl.py xid $plain --set model.args.proj_norm=bn --set loss.args.live_targets=false \
        --set loss.args.num_negatives=1024 &
    wait
    for run in xid-seed1 xid-depth10 xid-bank; do cp "checkpoints/grid/$run/metrics.jsonl" "$out/$run-metrics.jsonl"; done
}

train() {  # NAME SCRIPT CFG [OPTION ...]: a run on GRID; once more, not compiled, should it fail: minutes are few
    local name=$1 run="$2 configs/grid/$3.yaml --set model.name=$1 --set num_workers=8 --set test_freq=20"
    shift 3  # test_freq=20: saving takes seconds
    part "$name" $limit $run "$@"
    [ $? = 1 ] && part "$name" $limit $run "$@" --set compile=false
}

training() {
    part training 90 -m utils.benchmark training configs/grid/vicreg.yaml --png "$out/training.png"
    part raw 90 -m utils.benchmark training configs/grid/vicreg.yaml --set dataset.decode_once=false
}

inference() {
    part inference 120 -m utils.benchmark inference configs/ucf/8at16-linear.yaml --json "$out/inference.json"
}

tests() {
    part tests 300 -m pytest -v -n 3 --durations=5 $gpu_tests
}

bank() {
    part bank 120 -m utils.benchmark bank --steps 20 --instances 50000 1000000
}

nvidia-smi | tee -a "$out/log.txt" | head -n 12
[ $# -gt 0 ] || set -- smoke step learn training inference tests bank
for name in "$@"; do
    "$name"
done
