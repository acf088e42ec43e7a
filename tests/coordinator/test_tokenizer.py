"""Our tokenizer against transformers, on a byte-level and on a SentencePiece-style tokenizer made here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from coordinator.errors import ConfigError, InvalidField
from coordinator.tokenizer import IncrementalDetokenizer, Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "naïve café déjà-vu", "你好世界, 这是一个测试 😀 👩‍👩‍👧",
    "def f(x):\n    return x + 1\n", "  two  spaces and\ttabs", "▁ literal underline",
] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]
ANY_TEXT = st.text(alphabet=st.one_of(st.sampled_from("the quick<s>▁ \n你好😀é"), st.characters(exclude_categories=("Cs",))), max_size=40)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_level() -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, show_progress=False,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def sentence_piece() -> FastTokenizer:
    """As Llama 2's: a space before the text, bytes for what the vocabulary lacks."""
    learned = FastTokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    names = [*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"], "▁", "😀"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> FastTokenizer:
    """Another decoder, without a table of its own: goes through the window."""
    tokenizer = FastTokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False))
    return tokenizer


def write_model_dir(folder: Path, fast: FastTokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": 512, "eos_token_id": 2}))
    return folder


KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "metaspace": metaspace}
CONFIG = {
    "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True,
    "additional_special_tokens": ["<|tool|>"],
    "added_tokens_decoder": {"500": {"content": "<think>", "special": False, "normalized": False, "lstrip": False, "rstrip": False,
                                     "single_word": False}},
    "chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module", params=list(KINDS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp(request.param), KINDS[request.param](), CONFIG)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="module")
def auto(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir))


def joined(tokenizer: Tokenizer, ids: list[int], **flags: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **flags)
    return "".join(detokenizer.add(i) for i in ids) + detokenizer.flush()


@FEW
@given(text=ANY_TEXT, add_special_tokens=st.booleans())
def test_ids_and_text_equal_those_of_transformers(tokenizer: Tokenizer, auto: Any, text: str, add_special_tokens: bool) -> None:
    ids = tokenizer.encode(text, add_special_tokens)
    assert ids == auto.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == auto.decode(ids, skip_special_tokens=skip)


@FEW
@given(text=ANY_TEXT, skip=st.booleans(), spaces=st.booleans())
def test_joined_pieces_are_the_text_of_all_tokens(tokenizer: Tokenizer, text: str, skip: bool, spaces: bool) -> None:
    ids = [*tokenizer.encode("<think>" + text), *tokenizer.encode("</s><|tool|>" + text, add_special_tokens=False)]
    whole = tokenizer.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    assert joined(tokenizer, ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces) == whole


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_tokens_whatever_give_the_same_text_byte_level(byte_level_tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level_tokenizer.num_tokens + 3), max_size=30))
    assert joined(byte_level_tokenizer, ids, skip_special_tokens=skip) == byte_level_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_model_dir(tmp_path_factory.mktemp("bl"), byte_level(), CONFIG))


@pytest.fixture(scope="module")
def sentence_piece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_model_dir(tmp_path_factory.mktemp("sp"), sentence_piece(), CONFIG))


def test_a_character_of_several_tokens_is_shown_when_it_is_complete(sentence_piece_tokenizer: Tokenizer) -> None:
    ids = sentence_piece_tokenizer.encode("你 ok", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(sentence_piece_tokenizer)
    pieces = [detokenizer.add(i) for i in ids]
    assert len(ids) >= 5 and pieces[:4] == ["", "", "", "你"] and "".join(pieces) == "你 ok"


def test_bytes_that_are_no_character_are_replaced_and_text_goes_on(sentence_piece_tokenizer: Tokenizer) -> None:
    byte = sentence_piece_tokenizer.fast.token_to_id
    fox = sentence_piece_tokenizer.encode("fox", add_special_tokens=False)
    ids = [byte("<0xE4>"), byte("<0xBD>"), *fox, byte("<0xFF>"), byte("<0x41>")]
    assert joined(sentence_piece_tokenizer, ids) == sentence_piece_tokenizer.decode(ids) == "\ufffd\ufffd fox\ufffd\ufffd"


def test_added_tokens_stand_apart_by_spaces_only_when_asked(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("the<think>fox<|tool|>", add_special_tokens=False)
    assert byte_level_tokenizer.decode(ids) == "the<think>fox"
    assert byte_level_tokenizer.decode(ids, spaces_between_special_tokens=True) == "the <think> fox"
    assert byte_level_tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=True) == "the <think> fox <|tool|>"


def test_long_text_gives_the_same_ids_as_its_backend(byte_level_tokenizer: Tokenizer) -> None:
    text = " ".join(CORPUS * 5)
    expected = byte_level_tokenizer.fast.encode(text, add_special_tokens=False).ids
    assert byte_level_tokenizer.encode(text, add_special_tokens=False) == expected


def test_facts_of_the_folder_are_read(model_dir: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    assert tokenizer.is_special(2) and not tokenizer.is_special(tokenizer.encode("<think>", add_special_tokens=False)[-1])


def test_generation_config_names_the_eos_tokens_and_a_template_file_wins(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path / "m", byte_level(), {"eos_token": "</s>", "chat_template": "old"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.eos_token_ids == (2, 7) and tokenizer.chat_template == "new"


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidField, match="text: is not valid Unicode"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        Tokenizer.from_dir(tmp_path / "missing")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_a_folder_with_only_vocabulary_files_is_loaded_by_transformers(tmp_path: Path) -> None:
    fast = byte_level()
    fast.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 2}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids = tokenizer.encode("the quick 你好")
    assert ids == fast.encode("the quick 你好").ids and tokenizer.decode(ids) == joined(tokenizer, ids) == "the quick 你好"


def test_loading_needs_neither_transformers_nor_torch(model_dir: Path) -> None:
    code = ("import sys; from coordinator.tokenizer import Tokenizer; Tokenizer.from_dir(sys.argv[1]); "
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code, str(model_dir)], capture_output=True, text=True, check=True).stdout == "[]\n"
