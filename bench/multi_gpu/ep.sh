#!/usr/bin/env bash
# 4 to 8 GPUs: experts spread over all ranks, a dp group on each, with and without each microbatch overlap.
#
# SIZES="4 8" chooses (those that the machine has), MODELS="v2-lite v3-layers:4"; about 2 minutes for each line.
source "$(dirname "$0")/common.sh"
need_gpus 4
MODELS=${MODELS:-v2-lite v3-layers:4}
SIZES=${SIZES:-4 8}
FARM=(--requests "${REQUESTS:-400}")
if [ -n "$DRY_RUN" ]; then
    SIZES=2 MODELS=tiny
    TINY=$(mktemp -d)/model
    "$PYTHON" -m tokenmill model random --like deepseek-v2 --dest "$TINY" >/dev/null || exit 1
    FARM=(--device cpu --requests 8 --num_clients 4 --input_len 40 --output_len 8 --pool_tokens 8192 --load_workers 1 --model_dir "$TINY")
fi
export MOE_MODE=EP
run() { # MODEL SIZE NAME FLAGS…
    local model=$1 size=$2 name=$3
    shift 3
    step "$model, EP $size, $name" "$PYTHON" -m bench.gpu_farm "${FARM[@]}" --model "$model" --modes normal \
        --label ": $model, EP over $size, $name" --serve_flags "$(serve --tp "$size" --dp "$size" "$@")" --out "$OUT/ep_${size}_${model//:/_}_$name"
}
for model in $MODELS; do
    for size in $SIZES; do
        has_gpus "$size" || continue
        run "$model" "$size" plain
        run "$model" "$size" prefill_overlap --enable_prefill_microbatch_overlap
        run "$model" "$size" decode_overlap --enable_decode_microbatch_overlap
        run "$model" "$size" both_overlaps --enable_prefill_microbatch_overlap --enable_decode_microbatch_overlap
        MOE_MODE=TP "$PYTHON" -m bench.cost_model --num_gpus "$size" --out "$OUT/expected_$size.md" >/dev/null
    done
done
finish
