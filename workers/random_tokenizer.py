"""A byte-level BPE tokenizer of any vocabulary size, made by rule: any text can be encoded, any id can be decoded."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from coordinator.errors import ConfigError

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
LETTERS = "Ġetaoinshrdlucmfwypvbgkjqxz"  # Ġ is the byte-level alphabet's space
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
                 "{% if add_generation_prompt %}assistant:{% endif %}")


def write_tokenizer(path: Path, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with `vocab_size` tokens. Raises ConfigError below 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_merges = vocab_size - 2 - len(alphabet)
    if num_merges < 0:
        raise ConfigError(f"a byte-level tokenizer needs a vocabulary of at least {2 + len(alphabet)}, got {vocab_size}")
    merges = list(islice(_merges(), num_merges))
    tokens = [BOS, EOS, *alphabet, *(left + right for left, right in merges)]
    if len(tokens) < vocab_size:
        raise ConfigError(f"a rule-made tokenizer has at most {len(tokens)} tokens, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "model_max_length": max_length,
              "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of letters, then a pair and a letter, then two pairs; common letters first. About 550,000 distinct results."""
    letters = LETTERS
    pairs = sorted((a + b for a in letters for b in letters[1:]), key=lambda pair: letters.index(pair[0]) + letters.index(pair[1]))
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((pair, letter) for pair in pairs for letter in letters[1:])
    yield from ((left, right) for left in pairs for right in pairs if right[0] != letters[0])
