#!/bin/sh
# The config server: the queue, and where it is.
# Usage: sh config_server.sh <config_server_host>
export config_server_host=${1:?usage: sh config_server.sh <config_server_host>}

exec ${TOKENMILL:-tokenmill} serve \
    --run_mode "config_server" \
    --config_server_host $config_server_host \
    --config_server_port ${CONFIG_SERVER_PORT:-60088} \
    ${TOKENMILL_FLAGS:-}
