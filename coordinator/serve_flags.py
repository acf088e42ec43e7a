"""`tokenmill serve`: every flag, what it means, and which this version refuses. Names and defaults are LightLLM's where it has them."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from coordinator import group_plan, serve_doors, serve_ranks, tls
from coordinator.cluster_token import ENV, LEAST_CHARS, is_loopback
from coordinator.errors import ConfigError

RUN_MODES = ("normal", "config_server", "pd_master", "prefill", "decode")
CONFIG_SERVER_PORT = 60088

EPILOG = """\
examples
  tokenmill serve --model_dir models/smollm2-135m-instruct --port 8088
  tokenmill serve --run_mode pd_master --model_dir DIR --port 60011
  tokenmill serve --run_mode prefill   --model_dir DIR --pd_master_ip 127.0.0.1 --pd_master_port 60011
  tokenmill serve --run_mode decode    --model_dir DIR --pd_master_ip 127.0.0.1 --pd_master_port 60011
  tokenmill serve --run_mode config_server --config_server_host 127.0.0.1 --config_server_port 60088
  tokenmill serve --run_mode pd_master     --model_dir DIR --port 60012 --config_server_host 127.0.0.1 --config_server_port 60088

environment
  LOADWORKER=N   threads that load weights      MOE_MODE=TP|EP   KV_TRANS_USE_P2P=1   as LightLLM names them
  TOKENMILL_CLUSTER_TOKEN=…   the secret that all processes of a farm share; --cluster_token_file reads it from a file
  TOKENMILL_API_KEY=tm-…      a trusted key, for workers and commands that ask a pd_master which wants keys
  TOKENMILL_NATS_URL, TOKENMILL_REDIS_URL   as --nats_url and --redis_url, unseen by others on the machine
"""


def parse(argv: list[str], environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """Flags and environment as one namespace. Raises ConfigError for what cannot be honoured; exits with 2 on what cannot be parsed."""
    flags = _parser().parse_args(argv)
    flags.load_workers = _load_workers(environment)
    flags.moe_mode = group_plan.moe_mode(environment)
    flags.api_key = environment.get("TOKENMILL_API_KEY", "")
    flags.nats_url = flags.nats_url or environment.get("TOKENMILL_NATS_URL", "")
    flags.redis_url = flags.redis_url or environment.get("TOKENMILL_REDIS_URL", "")
    flags.tls_ca = flags.tls_ca or environment.get(tls.ENV, "")
    flags.cluster_token = _cluster_token(flags, environment)
    if flags.run_mode == "config_server":
        flags.config_server_host = flags.config_server_host or flags.host
    flags.kv_transfer = _kv_transfer(flags.kv_transfer, environment)
    _refuse_what_is_not_there(flags, environment)
    return flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenmill serve", description="Start a farm on this machine, or one part of it.", epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_what_and_where(parser.add_argument_group("what and where").add_argument)
    _add_engine(parser.add_argument_group("engine").add_argument)
    _add_many_processes(parser.add_argument_group("many processes").add_argument)
    _add_secrets(parser.add_argument_group("secrets and certificates").add_argument)
    _add_limits(parser.add_argument_group("limits and endings").add_argument)
    return parser


def _add_what_and_where(add: Callable[..., argparse.Action]) -> None:
    add("--run_mode", choices=RUN_MODES, default="normal",
        help="normal: everything here. pd_master: the REST door, and the queue if there is no config server. config_server: the queue, and "
             "where it is. prefill, decode: one worker that joins a pd_master or a config server")
    add("--model_dir", help="Hugging Face style folder: config.json, tokenizer, safetensors")
    add("--model_name", default="default_model_name", help="the name that clients see (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    add("--port", type=int, default=8000, help="REST port; 0 picks a free one (default: %(default)s)")
    add("--state_dir", default="", help="where the queue and Redis keep their data (default: ./state/<run mode and port>)")
    add("--files_dir", default="", help="where uploaded files and batches are kept; the same folder for all REST shims of a farm (default: "
        "`files` in the state_dir)")
    add("--nats_url", default="", help="use this NATS instead of an embedded one")
    add("--redis_url", default="", help="use this Redis or Valkey instead of an embedded one")
    add("--nats_port", type=int, default=0, help="port of the embedded NATS; 0 picks a free one")
    add("--nats_monitor_port", type=int, default=0, help="config_server, pd_master: also open NATS' monitoring port, for KEDA and "
        "dashboards (it shows names and counts to everybody; default: closed)")
    add("--redis_port", type=int, default=0, help="port of the embedded Valkey; 0 picks a free one")
    add("--insecure", action="store_true", help="allow a bind address that is not loopback, without keys or TLS")
    add("--api_keys_file", default="", help="REST wants a key of this file (tokenmill keys create); needed unless --host is loopback")
    add("--cors_origins", default="", help="origins whose web pages may ask here, separated by commas, or * (default: none)")


def _add_engine(add: Callable[..., argparse.Action]) -> None:
    add("--engine", choices=["model", "mock"], default="model",
        help="mock: no model and no weights, made-up tokens in the time that --mock_costs say; for tests and simulations of farms")
    add("--mock_costs", default="", help="of the mock engine: prefill=TOKENS_PER_S,step_ms=…,seq_ms=…,copy_ms=… (default: 20000, 8, 0.05, "
        "0.02)")
    add("--device", default="auto", help="where the math runs: cpu, cuda, cuda:N, or auto: a GPU if there is one (default: %(default)s)")
    add("--data_type", default="auto", choices=["auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16"],
        help="of weights and KV cache (default: float32 on CPU, the checkpoint's own on GPU)")
    add("--max_req_total_len", type=int, default=16384, help="most tokens of one request, prompt and output (default: %(default)s)")
    add("--max_total_token_num", type=int, default=0, help="tokens the KV pool holds (default: from --mem_fraction)")
    add("--mem_fraction", type=float, default=0.9,
        help="share of memory to use: of a GPU's, weights included; of the machine's free memory half of it, at most 4 GiB, as KV pool "
             "(default: %(default)s)")
    add("--running_max_req_size", type=int, default=0, help="sequences running at once (default: 64 on CPU, 256 on GPU)")
    add("--chunked_prefill_size", type=int, default=0, help="tokens of one prefill step (default: 512 on CPU, 8192 on GPU)")
    add("--page_size", type=int, default=0, help="tokens of one KV page; on GPU a power of two (default: 16 on CPU, 64 on GPU)")
    add("--num_threads", type=int, default=0,
        help="CPU threads of one rank (default: all cores for prompts, one less for decode; several ranks share them)")
    add("--disable_dynamic_prompt_cache", action="store_true", help="no prefix cache")
    add("--graph_max_batch_size", type=int, default=256, help="sequences up to which a decode step is a CUDA graph (default: %(default)s)")
    add("--disable_cudagraph", action="store_true", help="decode without CUDA graphs (there are none on CPU)")
    add("--prefix_affinity", choices=["on", "off"], default="off",
        help="on, given to every process of the farm: prompts go to workers that have their beginning cached, where that pays "
             "(default: %(default)s)")
    add("--handoff_same_host", choices=["on", "off"], default="on",
        help="prefill hands over to decode workers of its own host first, where there are others too (default: %(default)s)")
    add("--disagg_min_tokens", type=int, default=0,
        help="prefill and decode apart: prompts with fewer tokens to compute are prefilled by decode workers (default: none)")
    add("--tp", type=int, default=1, help="ranks over all nodes, one process and one GPU each (default: %(default)s)")
    add("--dp", type=int, default=1, help="groups among them that take jobs and hold KV each for itself (default: %(default)s)")
    add("--enable_fa3", action="store_true", help="attention by the package flash_attn_interface on a Hopper GPU (not in this version: its "
        "own kernels need no flag)")
    add("--enable_mps", action="store_true", help="of LightLLM's visual service (not in this version; CUDA's MPS itself needs no flag)")
    add("--enable_prefill_microbatch_overlap", action="store_true",
        help="MOE_MODE=EP: steps with prompts run as two halves, one computes while the other's tokens travel")
    add("--enable_decode_microbatch_overlap", action="store_true", help="MOE_MODE=EP: the same for steps of decodes")
    add("--ep_exchange", default="auto", help="MOE_MODE=EP, how tokens travel: exact, padded, deepep or auto (default: %(default)s)")
    add("--ep_redundant_experts", type=int, default=0, help="MOE_MODE=EP: slots per rank for copies of experts in demand (default: 0)")
    add("--ep_rebalance_steps", type=int, default=0, help="MOE_MODE=EP: steps after which experts move by load; 0: never (default: 0)")
    add("--one_shot_all_reduce_bytes", type=int, default=0,
        help="GPUs that reach each other's memory: sums of up to so many bytes in one kernel of ours; 0: all by NCCL (default: 0)")
    add("--mtp_mode", default=None, help="not in this version")
    add("--mtp_step", type=int, default=0, help="not in this version")


def _add_many_processes(add: Callable[..., argparse.Action]) -> None:
    add("--pd_master_ip", default="", help="prefill, decode: where the pd_master is")
    add("--pd_master_port", type=int, default=0, help="its REST port (default: 1212, 60011 or 8000, whichever answers)")
    add("--worker_id", default="", help="name of this worker in the farm (default: role and process id)")
    add("--kv_transfer", choices=["auto", "mapped", "collective"], default="",
        help="how keys and values are handed over. mapped: memory of this host (CUDA IPC between GPUs). collective: NCCL or gloo, from "
             "any host. auto: mapped where it can be (default; KV_TRANS_USE_P2P=0 makes it collective)")
    add("--kv_host", default="", help="the address where decode workers of other hosts fetch keys and values (default: the one "
        "towards NATS)")
    add("--nnodes", type=int, default=1, help="nodes that the ranks are spread over, in order (default: %(default)s)")
    add("--node_rank", type=int, default=0, help="which of them this is; node 0 has the REST port and the queue (default: %(default)s)")
    add("--nccl_host", default="", help="address of node 0, where ranks of all nodes meet (default: with --redis_url it is found through "
        "Redis, else 127.0.0.1)")
    add("--nccl_port", type=int, default=0, help="port there (default: 28765; with one node any free one)")
    add("--config_server_host", default="", help="config_server: address to bind. Others: where config servers are, several separated by "
        "commas, each with a port of its own if it has one (a,b:60089)")
    add("--config_server_port", type=int, default=CONFIG_SERVER_PORT, help="(default: %(default)s)")
    add("--join", default="", help="config_server: take part in the queue of the config servers at these HOST:PORT, separated by commas")

    add("--planner", choices=["off", "advise", "act"], default="off", help="config_server, or the only pd_master: watch queues and "
        "latencies, and propose (advise) or order (act) that workers change their roles (default: %(default)s)")
    add("--ttft_objective", type=float, default=2.0, help="planner: seconds to the first token, p90 (default: %(default)s)")
    add("--tpot_objective", type=float, default=0.1, help="planner: seconds per token after it, p90 (default: %(default)s)")


def _add_secrets(add: Callable[..., argparse.Action]) -> None:
    add("--cluster_token", default="", help="the secret that all processes of a farm share (better in the environment or in a file: what "
        "stands here everybody on the machine can read)")
    add("--cluster_token_file", default="", help="read it from the first line of this file")
    add("--tls_cert", default="", help="certificate of this door (REST or config server); the embedded NATS then speaks TLS too")
    add("--tls_key", default="", help="its key")
    add("--tls_ca", default="", help="doors are asked by https and must show a certificate of this CA; also for tls:// and rediss://")


def _add_limits(add: Callable[..., argparse.Action]) -> None:
    add("--max_queued", type=int, default=10_000, help="jobs per class, waiting or running, before clients get 429 (default: %(default)s)")
    add("--max_queued_tokens", type=int, default=8_000_000,
        help="open tokens (prompt and max_new_tokens) per class before clients get 429; 0: no bound (default: %(default)s)")
    add("--max_tenant_jobs", type=int, default=0, help="open jobs of one tenant (X-Tenant) before it gets 429 (default: no bound)")
    add("--max_tenant_tokens", type=int, default=0, help="open tokens of one tenant before it gets 429 (default: no bound)")
    add("--max_body_bytes", type=int, default=4 * 1024 * 1024, help="of one REST request (default: %(default)s)")
    add("--drain_timeout", type=float, default=30.0, help="seconds a stopping worker may finish what it has (default: %(default)s)")
    add("--engine_stall_s", type=float, default=0.0,
        help="an engine silent for this long is ended, and its jobs go back into the queue (default: 60 on GPU, 120 on CPU)")
    add("--log_level", default="warning", choices=["debug", "info", "warning", "error"])


def _load_workers(environment: Mapping[str, str]) -> int:
    given = environment.get("LOADWORKER", "1")
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"LOADWORKER={given!r}: must be a number of threads, at least 1")
    return int(given)


def _kv_transfer(given: str, environment: Mapping[str, str]) -> str:
    """LightLLM's KV_TRANS_USE_P2P asks for CUDA IPC where our flag is not given; one that contradicts the flag is refused."""
    p2p = environment.get("KV_TRANS_USE_P2P", "")
    if p2p not in ("", "0", "1"):
        raise ConfigError(f"KV_TRANS_USE_P2P={p2p!r}: must be 0 or 1")
    if (p2p == "1" and given == "collective") or (p2p == "0" and given == "mapped"):
        raise ConfigError(f"KV_TRANS_USE_P2P={p2p} contradicts --kv_transfer {given}: give one of them")
    return given or ("collective" if p2p == "0" else "auto")


def _refuse_what_is_not_there(flags: argparse.Namespace, environment: Mapping[str, str]) -> None:
    refusals = {
        "--enable_mps": flags.enable_mps,
        f"--mtp_mode {flags.mtp_mode}": flags.mtp_mode is not None,
        f"--mtp_step {flags.mtp_step}": flags.mtp_step != 0,
    }
    for name, is_given in refusals.items():
        if is_given:
            raise ConfigError(f"{name}: this version does not have it; nothing was started")
    if flags.mock_costs and flags.engine != "mock":
        raise ConfigError("--mock_costs says how long steps of --engine mock take: there is no mock engine here")
    if flags.engine == "mock" and (flags.tp, flags.dp, flags.nnodes) != (1, 1, 1):
        raise ConfigError("--engine mock has no ranks: leave out --tp, --dp and --nnodes")
    if flags.disagg_min_tokens < 0:
        raise ConfigError(f"--disagg_min_tokens {flags.disagg_min_tokens}: must be a number of tokens, 0 for none")
    if flags.prefix_affinity == "on" and flags.disable_dynamic_prompt_cache:
        raise ConfigError("--prefix_affinity on: there is no prefix cache with --disable_dynamic_prompt_cache")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", flags.device):
        raise ConfigError(f"--device {flags.device}: must be auto, cpu, cuda or cuda:N")
    if flags.engine_stall_s < 0:
        raise ConfigError(f"--engine_stall_s {flags.engine_stall_s:g}: must be a number of seconds")
    serve_ranks.plan_of(flags)
    if bool(flags.nats_url) != bool(flags.redis_url):
        raise ConfigError("--nats_url and --redis_url go together: give both or neither")
    serve_doors.check(flags)
    if flags.run_mode == "config_server":
        return
    if not flags.model_dir:
        raise ConfigError("--model_dir is missing: the folder with config.json, tokenizer and safetensors")
    if not (Path(flags.model_dir) / "config.json").is_file():
        raise ConfigError(f"--model_dir {flags.model_dir}: there is no config.json in it")
    if flags.api_keys_file and not Path(flags.api_keys_file).is_file():
        raise ConfigError(f"--api_keys_file {flags.api_keys_file}: there is no such file; `tokenmill keys create` makes one")
    serves_rest = flags.run_mode in ("normal", "pd_master") and not serve_ranks.is_other_node(flags)
    if serves_rest and not flags.api_keys_file and not flags.insecure and not is_loopback(flags.host):
        raise ConfigError(f"--host {flags.host}: not a loopback address: give --api_keys_file (tokenmill keys create), or say --insecure")


def _cluster_token(flags: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """From the flag, the file or the environment, in this order."""
    if not flags.cluster_token_file:
        token: str = flags.cluster_token or environment.get(ENV, "")
    else:
        try:
            token = Path(flags.cluster_token_file).read_text().split("\n", 1)[0].strip()
        except OSError as error:
            raise ConfigError(f"--cluster_token_file {flags.cluster_token_file}: {error.strerror}") from None
        if not token:
            raise ConfigError(f"--cluster_token_file {flags.cluster_token_file}: its first line is empty")
    if token and (len(token) < LEAST_CHARS or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"the cluster token must be at least {LEAST_CHARS} printable ASCII characters; `openssl rand -hex 24` makes one")
    return token
