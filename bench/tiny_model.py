"""A Llama so small that its engine answers in about a millisecond: what is left of a request's time is the way there and back."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.workload import vocab_size_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_TOKENS = 2048


def write_tiny_model(dest: Path, *, tokenizer_from: Path) -> Path:
    """Two layers, 64 wide, random weights, with the tokenizer of the model in `tokenizer_from`. Returns `dest`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size_of(tokenizer_from), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_TOKENS, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(dest)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, dest / name)
    return dest
