# Shared by the scripts of this folder; not run by itself.
#
#   PYTHON=python3     the interpreter that has torch (a clone need not be installed)
#   OUT=DIR            where results go (default: bench/results/multi_gpu)
#   DRY_RUN=1          the same steps with tiny models on the CPU and gloo: proves the script, not the speed
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/multi_gpu}
DRY_RUN=${DRY_RUN:-}
# NVLink multicast can put GPUs that others share out of service: off, here and in every process that is started from here.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
FAILED=()
mkdir -p "$OUT"

# need_gpus N: ends the script with a message unless the machine has as many.
need_gpus() {
    if [ -n "$DRY_RUN" ]; then
        export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        return
    fi
    local count
    count=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)
    if [ "$count" -lt "$1" ]; then
        echo "$(basename "$0") needs $1 GPUs, nvidia-smi shows $count. DRY_RUN=1 goes through the steps on a CPU." >&2
        exit 2
    fi
    nvidia-smi topo -m 2>/dev/null | sed -n '1,/^$/p'
}

# has_gpus N: whether the machine has as many; a dry run has any number.
has_gpus() {
    [ -n "$DRY_RUN" ] || [ "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)" -ge "$1" ]
}

# serve FLAGS…: the flags that every process of a farm gets, beside those of a dry run, in one string.
serve() {
    echo "${DRY_RUN:+--num_threads 1} $*"
}

# step NAME COMMAND…: a step that fails is told about at the end and does not keep the others from being taken.
step() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    if "$@"; then
        echo "== $name: $((SECONDS - began)) s"
    else
        echo "== $name FAILED (status $?) after $((SECONDS - began)) s"
        FAILED+=("$name")
    fi
}

# finish: every table that was written, and the exit status.
finish() {
    echo
    find "$OUT" -name '*.md' -newer "$STARTED" -print0 | sort -z | xargs -0 -r cat
    rm -f "$STARTED"
    if [ ${#FAILED[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${FAILED[@]}"
        exit 1
    fi
}
STARTED=$(mktemp)
