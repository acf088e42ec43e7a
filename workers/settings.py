"""Settings of a worker, one section per receiver. Flags map onto them in workers/worker.py; nothing else reads flags or the environment."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """One engine process among those that compute together. The defaults: it computes alone."""

    rank: int = 0                  # of all `tp` ranks, over all nodes
    local_rank: int = 0            # of those on this node: the number of its GPU
    num_local: int = 1             # ranks on this node
    desk: str = ""                 # host:port where ranks meet (coordinator/desk.py)
    tp: int = 1
    dp: int = 1
    moe_mode: str = "TP"
    ep_exchange: str = "auto"
    ep_redundant_experts: int = 0
    ep_rebalance_steps: int = 0
    prefill_overlap: bool = False
    decode_overlap: bool = False
    one_shot_all_reduce_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engine process needs. 0 means: choose by device and free memory."""

    model_dir: str
    model_name: str
    role: str                        # prefill, decode or both
    engine: str = "model"            # model, or mock: made-up tokens in the time that `mock_costs` say
    mock_costs: str = ""
    device: str = "cpu"              # auto (a GPU if there is one), cpu, cuda or cuda:N
    dtype: str = "auto"              # auto: float32 on CPU, the checkpoint's on GPU
    page_size: int = 0               # tokens
    max_total_token_num: int = 0     # tokens that the KV pool holds
    mem_fraction: float = 0.9        # of the free memory, when max_total_token_num is 0
    max_req_total_len: int = 16384   # prompt + output of one sequence
    running_max_req_size: int = 0    # sequences running at once
    chunked_prefill_size: int = 0    # tokens of one prefill step
    load_workers: int = 1
    num_threads: int = 0             # CPU threads for the math of any step
    use_prefix_cache: bool = True
    report_blocks: bool = False      # tell what the prefix cache gains and loses
    graph_max_batch_size: int = 256  # decoding sequences up to which steps are CUDA graphs
    use_cuda_graphs: bool = True
    use_fa3: bool = False
    kv_transfer: str = "auto"        # ways by which keys and values are handed over: auto, mapped or collective
    kv_host: str = "127.0.0.1"       # where the desk for KV pages listens, for transfers by collectives
    depth: int = 0                   # steps between launch and result: 1 on CPU, 2 on GPU
    ranks: RankSettings = field(default_factory=RankSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the I/O process needs."""

    nats_url: str
    redis_url: str
    worker_id: str
    engine: EngineSettings
    drain_timeout_s: float = 30.0
    max_queued: int = 0              # jobs per class before producers get 429; 0: the bound that is there
    lease_s: float = 5.0
    prefix_affinity: bool = False    # tell the index of prefixes what is cached here, and serve a lane of our own
    handoff_same_host: bool = True   # hand over to decode workers of the same host first, where there are others
    host: str = ""                   # a name in this machine's place; "": its own
    serves_local: bool = False       # role decode: prefill short prompts here
    engine_stall_s: float = 0.0      # an engine silent for this long is killed; 0: by device
