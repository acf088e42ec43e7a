"""How a deployment splits a model over ranks, in plain numbers. Knows no process and no tensor.

    tp 8, dp 2:   attention   [ 0 1 2 3 ][ 4 5 6 7 ]    dp groups: each its own requests and KV pool, heads split over its 4 ranks
                  experts TP  [ 0 1 2 3 ][ 4 5 6 7 ]    every expert split over the dp group's ranks: the groups never meet
                  experts EP  [ 0 1 2 3   4 5 6 7 ]     whole experts spread over all ranks, tokens travel to them
"""

from dataclasses import dataclass, replace

from coordinator.errors import ConfigError
from coordinator.group_plan import MOE_MODES
from kernels.block_fp8 import BLOCK
from workers.batch import Agreed, ForwardBatch
from workers.model_config import ModelConfig

EXCHANGES = ("auto", "exact", "padded", "deepep")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """What `--tp`, `--dp`, MOE_MODE and the flags that go with them say. A rank is numbered from 0 over all nodes."""

    tp: int = 1                    # ranks of the deployment
    dp: int = 1                    # attention groups among them
    moe_mode: str = "TP"
    exchange: str = "auto"         # how tokens travel to experts, see workers/model/exchange.py
    redundant_experts: int = 0     # further expert slots per rank, for copies of those in demand
    rebalance_steps: int = 0       # steps after which experts move to where the load asks for; 0: never
    prefill_overlap: bool = False  # two half batches in steps with prompts: one computes while the other's tokens travel
    decode_overlap: bool = False   # the same in steps of decodes alone
    one_shot_bytes: int = 0        # sums of up to so many bytes by reading the other ranks' memory; 0: always by the library

    @property
    def attn_tp(self) -> int:
        """Ranks of one dp group."""
        return self.tp // self.dp

    @property
    def is_ep(self) -> bool:
        """All ranks of all dp groups must then run every step together, an empty one if need be."""
        return self.moe_mode == "EP"

    def dp_rank(self, rank: int) -> int:
        return rank // self.attn_tp

    def attn_tp_rank(self, rank: int) -> int:
        return rank % self.attn_tp

    def kv_heads(self, config: ModelConfig, rank: int) -> range:
        """The model's key/value heads that this rank's cache holds. A latent cache (MLA) is whole on every rank."""
        if config.mla is not None:
            return range(config.num_kv_heads)
        count = max(config.num_kv_heads // self.attn_tp, 1)
        first = self.attn_tp_rank(rank) * config.num_kv_heads // self.attn_tp
        return range(first, first + count)

    def local(self, config: ModelConfig) -> ModelConfig:
        """`config` with the numbers of heads that one rank computes: what its KV pool and its kernels are sized by."""
        kv_heads = config.num_heads // self.attn_tp if config.mla else len(self.kv_heads(config, 0))
        return replace(config, num_heads=config.num_heads // self.attn_tp, num_kv_heads=kv_heads)

    def agreed(self, batch: ForwardBatch) -> Agreed | None:
        """What is known of all batches of this step. A dp group that steps by itself knows it of its own."""
        if batch.agreed is None and (self.dp == 1 or not self.is_ep):
            return Agreed(len(batch.token_ids), len(batch.logit_rows) == len(batch.token_ids))
        return batch.agreed

    def capacity(self, agreed: Agreed | None) -> int:
        """Rows of a dp group that an exchange without sizes makes room for in this step; 0: sizes are exchanged."""
        if agreed is None or not self.is_ep or not (self.exchange == "padded" or (agreed.is_decode and self.exchange != "exact")):
            return 0
        return max(agreed.num_rows, 1)

    def validate(self, config: ModelConfig, *, keeps_fp8: bool = False) -> None:
        """Raises ConfigError naming the flag that this model cannot honour. `keeps_fp8`: FP8 weights stay FP8 (on a GPU)."""
        if self.tp < 1 or self.dp < 1 or self.tp % self.dp:
            raise ConfigError(f"--dp {self.dp} does not divide --tp {self.tp}: --tp counts all ranks, each dp group gets tp / dp of them")
        if self.moe_mode not in MOE_MODES:
            raise ConfigError(f"MOE_MODE must be one of {', '.join(MOE_MODES)}, got {self.moe_mode!r}")
        if self.exchange not in EXCHANGES:
            raise ConfigError(f"--ep_exchange must be one of {', '.join(EXCHANGES)}, got {self.exchange!r}")
        if self.one_shot_bytes < 0 or (self.one_shot_bytes and self.attn_tp == 1):
            raise ConfigError(f"--one_shot_all_reduce_bytes {self.one_shot_bytes}: it must not be negative, and a dp group of one rank "
                              "has no sums over ranks")
        self._check_heads(config)
        if self.is_ep:
            self._check_ep(config)
        else:
            self._refuse_ep_flags(config)
        self._check_widths(config, keeps_fp8)

    def _check_heads(self, config: ModelConfig) -> None:
        if config.num_heads % self.attn_tp:
            raise ConfigError(f"{self._group}: {config.num_heads} attention heads do not split over {self.attn_tp} ranks")
        if config.num_kv_heads % self.attn_tp and self.attn_tp % config.num_kv_heads:
            raise ConfigError(f"{self._group}: {config.num_kv_heads} key/value heads neither split over {self.attn_tp} ranks nor "
                              "repeat evenly")

    def _check_ep(self, config: ModelConfig) -> None:
        if config.moe is None:
            raise ConfigError(f"MOE_MODE=EP: {config.architecture} has no experts to spread; use MOE_MODE=TP")
        if self.tp < 2:
            raise ConfigError("MOE_MODE=EP needs --tp of at least 2: on one rank no expert is anywhere else")
        if config.moe.num_experts % self.tp:
            raise ConfigError(f"MOE_MODE=EP: {config.moe.num_experts} experts do not spread evenly over --tp {self.tp} ranks")
        most = config.moe.num_experts - config.moe.num_experts // self.tp
        if not 0 <= self.redundant_experts <= most:
            raise ConfigError(f"--ep_redundant_experts {self.redundant_experts}: must be from 0 to {most}, the experts that a rank lacks")
        if self.rebalance_steps < 0:
            raise ConfigError(f"--ep_rebalance_steps must not be negative, got {self.rebalance_steps}")

    def _refuse_ep_flags(self, config: ModelConfig) -> None:
        why = "the model has no experts" if config.moe is None else "MOE_MODE is TP, set MOE_MODE=EP"
        for flag, is_set in (("--enable_prefill_microbatch_overlap", self.prefill_overlap),
                             ("--enable_decode_microbatch_overlap", self.decode_overlap)):
            if is_set:
                raise ConfigError(f"{flag}: there is no exchange of tokens to hide behind computation ({why})")
        for flag, is_set in (("--ep_redundant_experts", self.redundant_experts > 0),
                             ("--ep_rebalance_steps", self.rebalance_steps > 0), ("--ep_exchange", self.exchange != "auto")):
            if is_set:
                raise ConfigError(f"{flag}: experts are not spread over ranks ({why})")

    def _check_widths(self, config: ModelConfig, keeps_fp8: bool) -> None:
        """Feed-forward blocks split by their inner width; FP8 weights only between blocks that share a scale."""
        widths = [("intermediate_size", config.intermediate_size)]
        if config.moe is not None:
            if config.moe.first_layer == 0:
                widths.clear()
            if not self.is_ep:
                widths.append(("moe_intermediate_size", config.moe.intermediate_size))
        needs_blocks = keeps_fp8 and config.fp8_block is not None
        for name, width in widths:
            if width % self.attn_tp:
                raise ConfigError(f"{self._group}: {name} {width} does not split over {self.attn_tp} ranks")
            if needs_blocks and width % BLOCK == 0 and width // self.attn_tp % BLOCK:
                raise ConfigError(f"{self._group}: {name} {width} over {self.attn_tp} ranks cuts through FP8 blocks of {BLOCK}: "
                                  "use fewer ranks per dp group (a larger --dp), or MOE_MODE=EP for the experts")

    @property
    def _group(self) -> str:
        return f"--tp {self.tp}" + (f" --dp {self.dp}" if self.dp > 1 else "")


ONE_RANK = ParallelSizes()
