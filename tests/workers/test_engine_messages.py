"""Commands and events survive their msgpack form; what is not one of them is refused with the reason."""

from typing import Any

import msgpack
import pytest

from coordinator.errors import InvalidField, MalformedMessage
from coordinator.messages import KVLayout, KVRank, pack_ids
from coordinator.sampling import SamplingParams
from workers.engine_messages import (
    Activate,
    AddSequence,
    Cancel,
    Failed,
    Imported,
    ImportSequence,
    Ping,
    Pinned,
    Pong,
    PoolAddress,
    Prefilled,
    Progress,
    Ready,
    ReleasePin,
    Shutdown,
    Stats,
    TokenRow,
    Tokens,
    decode_command,
    decode_event,
    encode,
)

LAYOUT = KVLayout(model="m", weights="w", kind="mla", num_layers=2, row=576, dtype="bfloat16", page_size=64)
POOL = PoolAddress(ranks=(KVRank(address="/proc/1/fd/3"), KVRank(desk="10.0.0.1:5:abc")), num_pages=7)
PARAMS = SamplingParams(do_sample=True, seed=2**64 - 1, stop_sequences=("text", (1, 2)), exponential_decay_length_penalty=(3, 1.5))


@pytest.mark.parametrize("command", [
    AddSequence(job_id="job:1", token_ids=pack_ids([1, 2**32 - 1]), num_prompt=2, params=PARAMS),
    ImportSequence(job_id="a", token_ids=pack_ids([1, 2]), num_prompt=1, params=PARAMS, num_kv_tokens=1, source=POOL, page_ids=(3, 4),
                   layout=LAYOUT),
    Activate(job_id="a"), Cancel(job_id="a"), ReleasePin(job_id="a"), Ping(), Shutdown(),
], ids=lambda command: type(command).__name__)
def test_commands_survive_the_wire(command: Any) -> None:
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize("event", [
    Ready(layout=LAYOUT, pool=POOL, device="cuda:1", max_total_tokens=448, max_seq_len=100, max_num_seqs=4, chunk_size=64, vocab_size=9,
          eos_ids=(1, 2)),
    Progress(loaded_bytes=1, total_bytes=2),
    Tokens(rows=(TokenRow("a", 0, 5, -0.25, None), TokenRow("b", 3, 1, 0.0, "stop")), prefilled=(Prefilled("a", 16),)),
    Pinned(job_id="a", generation=3, num_tokens=5, page_ids=(0, 1)),
    Imported(job_id="a", ok=False, error="gone"), Failed(job_id="a", error="too long", field="max_new_tokens"),
    Pong(), Stats(free_pages=1, total_pages=4, cached_pages=2, held_pages=1, pinned=0, running=1, waiting=0, importing=0, free_tokens=32),
], ids=lambda event: type(event).__name__)
def test_events_survive_the_wire(event: Any) -> None:
    assert decode_event(encode(event)) == event


@pytest.mark.parametrize(("body", "text"), [
    ({"kind": "cancel", "job_id": "a", "more": 1}, "cancel: more"),
    ({"kind": "cancel"}, "cancel: job_id"),
    ({"kind": "cancel", "job_id": 7}, "cancel: job_id"),
    ({"kind": "add", "job_id": "a", "token_ids": b"", "num_prompt": -1, "params": {}}, "num_prompt"),
    ({"kind": "tokens", "rows": []}, "kind 'tokens' is not one of add,"),
    ({"job_id": "a"}, "kind None"),
    ([1], "not a map"),
])
def test_what_is_no_command_is_refused_with_the_reason(body: Any, text: str) -> None:
    with pytest.raises(MalformedMessage, match=text):
        decode_command(msgpack.packb(body))


def test_garbage_and_wrong_parameters_are_refused() -> None:
    for garbage in (b"", b"\xc1", b"\x81\xa4kind", encode(Shutdown()) + b"x"):
        with pytest.raises(MalformedMessage):
            decode_command(garbage)
    with pytest.raises(InvalidField, match="top_p"):
        decode_command(msgpack.packb({"kind": "add", "job_id": "a", "token_ids": b"", "num_prompt": 1, "params": {"top_p": 2.0}}))
