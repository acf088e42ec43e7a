#!/usr/bin/env bash
# Two GPUs: prefill on one, decode on the other, keys and values by CUDA IPC over NVLink and by NCCL, beside two workers that do both.
#
#   transfers   GB/s of each way beside a plain peer copy, and decode steps beside them
#   farm        100 clients, 1,024 tokens in and 128 out: PD mapped, PD by NCCL, 2 x both; what the second token costs
#   kills       SIGKILL of either side under load: every answer has to come whole
#
# STEPS="transfers farm kills" chooses (kills go with farm), WAYS="mapped collective pair" chooses the farms: all of it takes about 12
# minutes, transfers alone 2, each farm 2 and its kills as much again. MODEL_DIR reuses a checkpoint (one is drawn if it is empty).
source "$(dirname "$0")/common.sh"
need_gpus 2
STEPS=${STEPS:-transfers farm kills}
WAYS=${WAYS:-mapped collective pair}
KILL=()
[[ $STEPS == *kills* ]] && KILL=(prefill decode)
MODEL=${MODEL_DIR:-$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)/tokenmill-v2-lite}
FARM=(--devices cuda:0 cuda:1 --requests "${REQUESTS:-400}")
PAIR=(--pair two)
if [ -n "$DRY_RUN" ]; then
    MODEL=$(mktemp -d)/model
    "$PYTHON" -m tokenmill model random --like deepseek-v2 --dest "$MODEL" >/dev/null || exit 1
    FARM=(--devices cpu cpu --requests 8 --num_clients 4 --input_len 40 --output_len 8 --handover_lens 16 64 --pool_tokens 8192
          --load_workers 1 --kill_after_s 0.3 --serve_flags "--num_threads 1 --page_size 16")
    PAIR=(--pair cpu --tokens 256)
fi
[[ $STEPS == *transfers* ]] && step "transfers" "$PYTHON" -m bench.kv_transfer "${PAIR[@]}" --out "$OUT"
farm() { # WAY MODE FLAGS…
    local way=$1 mode=$2
    shift 2
    [[ $STEPS == *farm* && $WAYS == *$way* ]] || return 0
    step "farm: $way" "$PYTHON" -m bench.gpu_farm "${FARM[@]}" --model_dir "$MODEL" --modes "$mode" --label ": $way" \
        --serve_flags "$(serve "$@")" --out "$OUT/pd_2_$way" --kill "${KILL[@]}"
}
farm mapped pd
farm collective pd --kv_transfer collective
farm pair pair
finish
