#!/bin/sh
# A decode worker of all masters.
# Usage: sh pd_decode.sh <host> <config_server_host>
export host=${1:?usage: sh pd_decode.sh <host> <config_server_host>}
export config_server_host=${2:?usage: sh pd_decode.sh <host> <config_server_host>}

# MPS lets processes share a GPU better; some drivers have trouble with it, and a machine without it goes on.
command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d
export MOE_MODE=${MOE_MODE:-EP}
export KV_TRANS_USE_P2P=${KV_TRANS_USE_P2P:-1}
export LOADWORKER=${LOADWORKER:-18}
exec ${TOKENMILL:-tokenmill} serve \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --run_mode "decode" \
    --host $host \
    --port 8121 \
    --tp ${TP:-8} \
    --dp ${DP:-8} \
    --nccl_port ${NCCL_PORT:-12322} \
    --enable_fa3 \
    --config_server_host $config_server_host \
    --config_server_port ${CONFIG_SERVER_PORT:-60088} \
    ${TOKENMILL_FLAGS:-}
# microbatch overlap: TOKENMILL_FLAGS=--enable_decode_microbatch_overlap
