#!/bin/sh
# Master 1. Any number may run, also on one machine with ports of their own.
# Usage: sh pd_master_1.sh <host> <config_server_host>
export host=${1:?usage: sh pd_master_1.sh <host> <config_server_host>}
export config_server_host=${2:?usage: sh pd_master_1.sh <host> <config_server_host>}

exec ${TOKENMILL:-tokenmill} serve \
    --model_dir ${MODEL_DIR:-/path/DeepSeek-R1} \
    --model_name ${MODEL_NAME:-default_model_name} \
    --run_mode "pd_master" \
    --host $host \
    --port ${PD_MASTER_1_PORT:-60011} \
    --config_server_host $config_server_host \
    --config_server_port ${CONFIG_SERVER_PORT:-60088} \
    ${TOKENMILL_FLAGS:-}
