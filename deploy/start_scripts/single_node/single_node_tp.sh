#!/bin/sh
# One node, tensor parallel.
# Usage: sh single_node_tp.sh

export LOADWORKER=${LOADWORKER:-18}
exec ${TOKENMILL:-tokenmill} serve \
    --port ${PORT:-8088} \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --tp ${TP:-8} \
    --enable_fa3 \
    ${TOKENMILL_FLAGS:-}
