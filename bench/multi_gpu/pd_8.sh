#!/usr/bin/env bash
# 8 GPUs: two prefill and two decode workers of two ranks each behind two masters, by each way of transfer, then chaos for 5 minutes.
#
# WAYS="auto collective" chooses, CHAOS_S=300; about 4 minutes for each way and the chaos.
source "$(dirname "$0")/common.sh"
need_gpus 8
WAYS=${WAYS:-auto collective}
FARM=(--requests "${REQUESTS:-800}" --num_clients 200)
WORKERS=(prefill=0,1 prefill=2,3 decode=4,5 decode=6,7)
CHAOS_S=${CHAOS_S:-300}
MODEL=${MODEL_DIR:-$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)/tokenmill-v2-lite}
if [ -n "$DRY_RUN" ]; then
    MODEL=$(mktemp -d)/model WORKERS=(prefill=0 decode=0,1) CHAOS_S=30
    "$PYTHON" -m tokenmill model random --like deepseek-v2 --dest "$MODEL" >/dev/null || exit 1
    FARM=(--device cpu --requests 8 --num_clients 4 --input_len 40 --output_len 8 --handover_lens 16 64 --pool_tokens 8192 --load_workers 1
          --kill_after_s 0.3)
fi
for way in $WAYS; do
    chaos=0
    [ "$way" = "${WAYS##* }" ] && chaos=$CHAOS_S
    step "2P x 2D of tp 2, $way" "$PYTHON" -m bench.gpu_farm "${FARM[@]}" --model_dir "$MODEL" --modes pd --workers "${WORKERS[@]}" --masters 2 \
        --kill prefill decode --chaos_s "$chaos" --label ": 2P x 2D of tp 2, $way" --serve_flags "$(serve --kv_transfer "$way")" --out "$OUT/pd_8_$way"
done
finish
