#!/bin/sh
# Node 1 of 2, data and expert parallel.
# Usage: sh multi_node_ep_node1.sh <nccl_host>
export nccl_host=${1:?usage: sh multi_node_ep_node1.sh <nccl_host>}

export MOE_MODE=${MOE_MODE:-EP}
export LOADWORKER=${LOADWORKER:-18}
exec ${TOKENMILL:-tokenmill} serve \
    --port ${PORT:-8088} \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --tp ${TP:-16} \
    --dp ${DP:-16} \
    --enable_fa3 \
    --nnodes 2 \
    --node_rank 1 \
    --nccl_host $nccl_host \
    --nccl_port ${NCCL_PORT:-2732} \
    ${TOKENMILL_FLAGS:-}
# microbatch overlap: TOKENMILL_FLAGS='--enable_prefill_microbatch_overlap --enable_decode_microbatch_overlap'
