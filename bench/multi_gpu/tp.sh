#!/usr/bin/env bash
# 2 to 8 GPUs: tensor parallel workers, DeepSeek-V2-Lite in bf16 and layers of V3 in FP8, beside what the cost model expects.
#
# TPS="1 2 4 8" chooses (those that the machine has), MODELS="v2-lite v3-layers:4"; about 2 minutes for each.
source "$(dirname "$0")/common.sh"
need_gpus 2
MODELS=${MODELS:-v2-lite v3-layers:4}
TPS=${TPS:-1 2 4 8}
FARM=(--requests "${REQUESTS:-256}" --num_clients 64)
if [ -n "$DRY_RUN" ]; then
    TPS="1 2" MODELS=tiny
    TINY=$(mktemp -d)/model
    "$PYTHON" -m tokenmill model random --like deepseek-v2 --dest "$TINY" >/dev/null || exit 1
    FARM=(--device cpu --requests 8 --num_clients 4 --input_len 40 --output_len 8 --pool_tokens 8192 --load_workers 1 --model_dir "$TINY")
fi
for model in $MODELS; do
    for tp in $TPS; do
        has_gpus "$tp" || continue
        step "$model, tp $tp, one client" "$PYTHON" -m bench.gpu_farm "${FARM[@]}" --model "$model" --modes normal --num_clients 1 --requests 8 \
            --label ": $model, tp $tp, one client" --serve_flags "$(serve --tp "$tp")" --out "$OUT/tp_${tp}_${model//:/_}_1"
        step "$model, tp $tp, many" "$PYTHON" -m bench.gpu_farm "${FARM[@]}" --model "$model" --modes normal \
            --label ": $model, tp $tp" --serve_flags "$(serve --tp "$tp")" --out "$OUT/tp_${tp}_${model//:/_}"
        "$PYTHON" -m bench.cost_model --num_gpus "$tp" --out "$OUT/expected_$tp.md" >/dev/null
    done
done
finish
