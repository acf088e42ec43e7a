"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, dense layers first, then mixtures of experts."""

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.decoder import Decoder, Mlp
from workers.model.mla import MlaAttention
from workers.model.mlp import GatedMlp
from workers.model.moe import Moe
from workers.model_config import ModelConfig


def deepseek(weights: Checkpoint, config: ModelConfig, ops: Ops, num_threads: int) -> Decoder:
    moe = config.moe
    assert moe is not None

    def make_mlp(prefix: str, layer: int) -> Mlp:
        if layer < moe.first_layer:
            return GatedMlp(weights, prefix, ops, config.hidden_size, config.intermediate_size)
        return Moe(weights, prefix, ops, config.hidden_size, moe)

    return Decoder(weights, config, ops, lambda prefix: MlaAttention(weights, prefix, config, ops), make_mlp, num_threads)
