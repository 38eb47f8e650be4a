#!/usr/bin/env bash
# Does everything run on this machine's GPU, and how near does it come to the card's own limit?
#
#     tests/gpu.sh                   # on a GPU; made to end within nine minutes
#     tests/gpu.sh --device cpu      # the same parts at a toy size, in about two minutes
#
# Takes the python of the active environment, which has the packages of requirements.txt and
# pytest, and no network. Writes into a temporary folder alone.
#
#     1. the tests that need CUDA
#     2. the three commands on the drawn scenes
#     3. `benchmarks.py gpu`: steps and passes of the paper's protocol, eager and compiled; its
#        table comes last
#
# Ends with 0, or with 1 and one line that says what fell short.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda
if [ "${1:-}" = --device ]; then
    device=${2:-}
elif [ $# -gt 0 ]; then
    device=
fi
case $device in
cpu)
    train=(--members 2 --epochs 1 --image-size 48 72 --parallel 1)
    distill=(--epochs 1)
    evaluate=(--panels 1)
    ;;
cuda)
    train=(--members 3)
    distill=()
    evaluate=()
    ;;
*)
    echo "error: $* is not known; use --device cuda or --device cpu" >&2
    exit 2
    ;;
esac
if ! python -c "import torch; torch.zeros(1, device='$device')" 2>/dev/null; then
    echo "error: python has no torch that can use --device $device; activate another environment" >&2
    exit 2
fi

work=$(mktemp -d)
export PYTHONDONTWRITEBYTECODE=1
trap 'rm -rf "$work"' EXIT
failed=()

# part NAME COMMAND...: one line if it succeeds, else the end of its output too
part() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "ok      $name  ($((SECONDS - start)) s)"
    else
        echo "failed  $name  ($((SECONDS - start)) s); its output ends with"
        tail -n 30 "$work/log"
        failed+=("$name")
    fi
}

part "CUDA tests" python -m pytest -p no:cacheprovider -k cuda
part "train_ensemble.py" python train_ensemble.py --device "$device" --out "$work/ckpts" "${train[@]}"
part "distill.py" python distill.py --device "$device" --teacher "$work/ckpts" "${distill[@]}"
part "evaluate.py" python evaluate.py --device "$device" --student "$work/ckpts/student.pt" \
    --teacher "$work/ckpts" --ood --out "$work/results" "${evaluate[@]}"

# The benchmark says in one line what fell short; a longer message is a fault of its own.
if ! python tests/benchmarks.py gpu --device "$device" 2>"$work/log"; then
    if ! grep -q "^fell short: " "$work/log"; then
        cat "$work/log" >&2
    fi
    last_line=$(tail -n 1 "$work/log")
    failed+=("${last_line#fell short: }")
fi

echo
echo "$SECONDS s in all"
if [ ${#failed[@]} -gt 0 ]; then
    printf -v line "%s; " "${failed[@]}"
    echo "fell short: ${line%; }" >&2
    exit 1
fi
