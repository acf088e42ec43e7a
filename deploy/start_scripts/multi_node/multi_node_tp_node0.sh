#!/bin/sh
# Node 0 of 2, tensor parallel.
# Usage: sh multi_node_tp_node0.sh <nccl_host>
export nccl_host=${1:?usage: sh multi_node_tp_node0.sh <nccl_host>}

export LOADWORKER=${LOADWORKER:-18}
exec ${TOKENMILL:-tokenmill} serve \
    --port ${PORT:-8088} \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --tp ${TP:-16} \
    --enable_fa3 \
    --nnodes 2 \
    --node_rank 0 \
    --nccl_host $nccl_host \
    --nccl_port ${NCCL_PORT:-2732} \
    ${TOKENMILL_FLAGS:-}
