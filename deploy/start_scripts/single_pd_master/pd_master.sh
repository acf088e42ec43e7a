#!/bin/sh
# The only master: REST door, and the queue.
# Usage: sh pd_master.sh <pd_master_ip>
export pd_master_ip=${1:?usage: sh pd_master.sh <pd_master_ip>}

exec ${TOKENMILL:-tokenmill} serve \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --run_mode "pd_master" \
    --host $pd_master_ip \
    --port ${PD_MASTER_PORT:-60011} \
    ${TOKENMILL_FLAGS:-}
