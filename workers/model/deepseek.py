"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, dense layers first, then mixtures of experts."""

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.decoder import Decoder
from workers.model.mla import MlaAttention
from workers.model.mlp import GatedMlp
from workers.model.moe import Moe
from workers.model.spread_moe import SpreadMoe
from workers.model.turns import MlpSteps, at_once
from workers.model_config import ModelConfig
from workers.parallel import ONE, Parallel


def deepseek(weights: Checkpoint, config: ModelConfig, ops: Ops, num_threads: int, parallel: Parallel = ONE) -> Decoder:
    moe = config.moe
    assert moe is not None
    spread: dict[int, SpreadMoe] = {}  # layers are built in several threads

    def make_mlp(prefix: str, layer: int) -> MlpSteps:
        if layer < moe.first_layer:
            return at_once(GatedMlp(weights, prefix, ops, config.hidden_size, config.intermediate_size, parallel.attn))
        if not parallel.sizes.is_ep:
            return at_once(Moe(weights, prefix, ops, config.hidden_size, moe, parallel.attn))
        spread[layer] = SpreadMoe(weights, prefix, ops, config.hidden_size, moe, parallel)
        return spread[layer].steps

    decoder = Decoder(weights, config, ops, lambda prefix: MlaAttention(weights, prefix, config, ops, parallel), make_mlp, num_threads,
                      parallel.attn)
    decoder.spread = [spread[layer] for layer in sorted(spread)]
    return decoder
