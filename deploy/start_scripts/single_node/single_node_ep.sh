#!/bin/sh
# One node, data parallel attention and expert parallel experts.
# Usage: sh single_node_ep.sh

export MOE_MODE=${MOE_MODE:-EP}
export LOADWORKER=${LOADWORKER:-18}
exec ${TOKENMILL:-tokenmill} serve \
    --port ${PORT:-8088} \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --tp ${TP:-8} \
    --dp ${DP:-8} \
    --enable_fa3 \
    ${TOKENMILL_FLAGS:-}
# microbatch overlap: TOKENMILL_FLAGS='--enable_prefill_microbatch_overlap --enable_decode_microbatch_overlap'
