"""Wire messages: what goes in comes out, and nothing malformed gets further than a typed error."""

import contextlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import InvalidField, MalformedMessage
from coordinator.fold import fold
from coordinator.messages import (
    DeadLetter,
    FinalRecord,
    Finish,
    Frame,
    Job,
    KVHandle,
    KVLayout,
    KVRank,
    KVSource,
    TokenRun,
    encode_map,
    new_job_id,
    pack_floats,
    pack_ids,
    pack_tops,
    unpack_ids,
    unpack_tops,
)
from coordinator.sampling import SamplingParams

LAYOUT = KVLayout(model="m", weights="abc", kind="mla", num_layers=2, row=80, dtype="float32", page_size=16)
SOURCE = KVSource(worker="p-0", incarnation=7, host="here", ranks=(KVRank(address="/proc/1/fd/3"),), num_pages=8)


def job(**changes: object) -> Job:
    fields: dict[str, object] = {"job_id": new_job_id(), "origin": "rest-1", "model": "m", "prompt_ids": (1, 2, 3)}
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


def handle(**changes: object) -> KVHandle:
    fields: dict[str, object] = dict(
        job=job().encode(), epoch=1, source=SOURCE, layout=LAYOUT, num_tokens=20, page_ids=(3, 7), generation=5, prompt_ids=pack_ids([1]),
        output=pack_ids([9]), logprobs=pack_floats([-0.5]), texts=("a",), cached_tokens=0, ack_subject="$JS.ACK.x", chains=("p-0.7",),
        emitters=("p-0.7",), lease_expires_ms=1)
    return KVHandle(**{**fields, **changes})  # type: ignore[arg-type]


def run(index: int, *ids: int, finish: Finish | None = None, epoch: int = 1) -> TokenRun:
    return TokenRun(job_id="j", epoch=epoch, first_index=index, token_ids=ids, logprobs=(-1.0,) * len(ids),
                    texts=tuple(f"<{i}>" for i in ids), finish=finish)


def test_every_message_survives_its_own_encoding() -> None:
    a_job = job(params=SamplingParams(max_new_tokens=5, stop_sequences=("x", (1, 2))), deadline_ms=12, tenant="t")
    assert Job.decode(a_job.encode()) == a_job
    frame = Frame(runs=(run(0, 5, 6), run(2, 7, finish=Finish(reason="stop", prompt_tokens=3))))
    assert Frame.decode(frame.encode()) == frame
    tombstone = Frame(tombstone="w.2")
    assert Frame.decode(tombstone.encode()) == tombstone
    record = FinalRecord(job_id="j", origin="o", model="m", reason="length", error="", epoch=1, prompt_tokens=3, cached_tokens=0,
                         token_ids=pack_ids([1]), logprobs=pack_floats([0.0]), texts=("é",), workers=("w.1",))
    assert FinalRecord.decode(record.encode()) == record
    letter = DeadLetter(subject="jobs.m.normal.any", reason="r", payload=b"\xff", at_ms=1)
    assert DeadLetter.decode(letter.encode()) == letter


TOPS = (((5, -0.5), (7, -1.5)), ((9, -0.25),))


@pytest.mark.parametrize("finish", [None, Finish(reason="stop", prompt_tokens=3)])
def test_the_likeliest_tokens_travel_with_their_tokens(finish: Finish | None) -> None:
    told = replace(run(0, 5, 9, finish=finish), top_logprobs=TOPS)
    assert Frame.decode(Frame(runs=(told, run(2, 7))).encode()) == Frame(runs=(told, run(2, 7)))
    assert KVHandle.decode(handle(top_logprobs=pack_tops(TOPS)).encode()).top_logprobs == pack_tops(TOPS)
    shown = fold([("out.o.p.1", told), ("out.o.d.2", replace(run(1, 9, 9, finish=Finish(reason="length")), top_logprobs=TOPS[:1] * 2))])
    record = FinalRecord.decode(shown.record(job(job_id="j")).encode())
    assert unpack_tops(record.top_logprobs) == (*TOPS, TOPS[0]) if finish is None else TOPS


def test_where_nobody_asked_for_them_messages_are_what_they_were_before() -> None:
    record = fold([("out.o.p.1", run(0, 5, finish=Finish(reason="stop")))]).record(job(job_id="j"))
    for message in (record, handle()):
        body = msgpack.unpackb(message.encode())
        assert "top_logprobs" not in body
        assert type(message).decode(encode_map({key: value for key, value in body.items() if key != "v"})) == message
    assert len(run(0, 5).to_wire()) == 6 and len(run(0, 5, finish=Finish(reason="stop")).to_wire()) == 7


@pytest.mark.parametrize("tops", [[[b"\1\0\0\0", b""]], [[b"\1\0\0\0"]], [5], 5, [[b"", b""]] * 2, [["a", "b"]]])
def test_likeliest_tokens_out_of_shape_are_malformed(tops: object) -> None:
    with pytest.raises(MalformedMessage):
        TokenRun.from_wire([*run(0, 5).to_wire(), None, tops])


def test_a_handle_keeps_all_its_fields() -> None:
    given_handle = handle()
    assert KVHandle.decode(given_handle.encode()) == given_handle


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_are_packed_little_endian(ids: list[int]) -> None:
    packed = pack_ids(ids)
    assert packed == b"".join(i.to_bytes(4, "little") for i in ids)
    assert unpack_ids(packed) == ids


@pytest.mark.parametrize("data", [
    b"", b"\xff\xfe", b"garbage", msgpack.packb([1]), msgpack.packb({"v": 1, 2: 3}, strict_types=False), msgpack.packb({"v": 99}),
    msgpack.packb({"v": True}), msgpack.packb({}), msgpack.packb({"v": 1, "x": msgpack.ExtType(4, b"")}), encode_map({}) + b"x",
    b"\x82\xa1v\x01\xa1v\x01", b"\x91" * 3000, b"\xdd\x7f\xff\xff\xff",
])
def test_garbage_is_a_malformed_message_never_a_crash(data: bytes) -> None:
    for kind in (Frame, KVHandle, FinalRecord, DeadLetter):
        with pytest.raises(MalformedMessage):
            kind.decode(data)
    with pytest.raises((MalformedMessage, InvalidField)):
        Job.decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_never_escape_the_typed_errors(data: bytes) -> None:
    for kind in (Job, Frame, KVHandle):
        with pytest.raises((MalformedMessage, InvalidField)):
            kind.decode(data)


@given(st.data())
def test_a_flipped_byte_in_a_job_decodes_or_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(job(text="hello", prompt_ids=None).encode())
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedMessage, InvalidField):
        Job.decode(bytes(encoded))


@pytest.mark.parametrize(("body", "field"), [
    ({}, "prompt_ids"), ({"prompt_ids": b"\x01\0\0\0", "text": "x"}, "prompt_ids"), ({"prompt_ids": b""}, "prompt_ids"),
    ({"text": ""}, "text"), ({"text": 5}, "text"), ({"text": "x", "klass": "urgent"}, "klass"), ({"text": "x", "job_id": "a.b"}, "job_id"),
    ({"text": "x", "origin": "*"}, "origin"), ({"text": "x", "params": {"top_p": 2}}, "top_p"), ({"text": "x", "prio": 1}, "prio"),
    ({"text": "x", "deadline_ms": -1}, "deadline_ms"), ({"text": "x", "tenant": "t" * 200}, "tenant"),
])
def test_a_job_that_cannot_be_honoured_names_the_field(body: dict[str, object], field: str) -> None:
    whole = {"job_id": "j-1", "origin": "o", "model": "m", **body}
    with pytest.raises(InvalidField) as caught:
        Job.decode(encode_map(whole))
    assert caught.value.field == field


@pytest.mark.parametrize("changes", [{"page_ids": (3,)}, {"page_ids": (3, 8)}, {"num_tokens": 0}, {"page_ids": (-1, 2)}])
def test_a_handle_whose_pages_make_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        KVHandle.decode(handle(**changes).encode())


def test_job_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_job_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [i[:12] for i in ids] == sorted(i[:12] for i in ids)


def test_folding_orders_runs_drops_repeats_and_stops_at_a_gap() -> None:
    p, d = "out.o.prefill.1", "out.o.decode.2"
    shown = fold([(d, run(1, 11, 12)), (p, run(0, 10)), (d, run(2, 12, 13, finish=Finish(reason="length"))), (p, run(0, 10))])
    assert shown.token_ids == [10, 11, 12, 13]
    assert shown.emitters == ["prefill.1", "decode.2"]
    assert shown.finish == Finish(reason="length")
    gapped = fold([(p, run(0, 10)), (d, run(2, 12, finish=Finish(reason="stop")))])
    assert gapped.token_ids == [10] and gapped.finish is None
