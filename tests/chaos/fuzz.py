"""Messages that are almost right: bytes flipped, fields of wrong types and sizes, fields missing, doubled or unknown."""

import random
from collections.abc import Callable
from typing import Any

import msgpack

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64 - 1, 0.5, -1e308, float("nan"), float("inf"),
    "", "x", "a.b", "*", ">", "a b", "é" * 300, "-" * 5000, b"", b"\x00", b"\xff" * 7,
    [], [[]], [0] * 1000, {}, {"v": 1}, msgpack.ExtType(5, b"abc"), msgpack.Timestamp(1, 2),
]


def mutated(data: bytes, drawn: random.Random) -> bytes:
    """One or two faults in a message."""
    for _ in range(drawn.choice((1, 1, 1, 2))):
        data = drawn.choice(MUTATIONS)(data, drawn)
    return data


def _flip(data: bytes, drawn: random.Random) -> bytes:
    changed = bytearray(data or b"\x00")
    for _ in range(drawn.randint(1, 4)):
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def _cut(data: bytes, drawn: random.Random) -> bytes:
    return data[:drawn.randrange(len(data) + 1)]


def _insert(data: bytes, drawn: random.Random) -> bytes:
    at = drawn.randrange(len(data) + 1)
    return data[:at] + drawn.randbytes(drawn.randint(1, 40)) + data[at:]


def _noise(data: bytes, drawn: random.Random) -> bytes:
    return drawn.randbytes(drawn.randrange(200))


def _change_field(data: bytes, drawn: random.Random) -> bytes:
    return _with_body(data, drawn, lambda body, name: body.__setitem__(name, drawn.choice(ODD_VALUES)))


def _drop_field(data: bytes, drawn: random.Random) -> bytes:
    return _with_body(data, drawn, lambda body, name: body.__delitem__(name))


def _add_field(data: bytes, drawn: random.Random) -> bytes:
    return _with_body(data, drawn, lambda body, name: body.__setitem__(name + "_", drawn.choice(ODD_VALUES)))


def _swap_fields(data: bytes, drawn: random.Random) -> bytes:
    def swap(body: dict[str, Any], name: str) -> None:
        other = drawn.choice(list(body))
        body[name], body[other] = body[other], body[name]

    return _with_body(data, drawn, swap)


def _double_key(data: bytes, drawn: random.Random) -> bytes:
    body = _body(data)
    if not body or len(body) > 14 or data[0] & 0xF0 != 0x80:
        return _flip(data, drawn)
    name = drawn.choice(list(body))
    return bytes([data[0] + 1]) + data[1:] + msgpack.packb(name) + msgpack.packb(drawn.choice(ODD_VALUES))


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    _flip, _cut, _insert, _noise, _change_field, _change_field, _change_field, _drop_field, _add_field, _swap_fields, _double_key]


def _with_body(data: bytes, drawn: random.Random, change: Callable[[dict[str, Any], str], object]) -> bytes:
    """Change one field, at the top or one level down. Bytes that are no map are flipped instead."""
    body = _body(data)
    if not body:
        return _flip(data, drawn)
    name = drawn.choice(list(body))
    inner = body[name]
    if isinstance(inner, dict) and inner and drawn.random() < 0.6:
        change(inner, drawn.choice(list(inner)))
    elif isinstance(inner, bytes) and (nested := _body(inner)) and drawn.random() < 0.6:
        change(nested, drawn.choice(list(nested)))
        body[name] = msgpack.packb(nested)
    else:
        change(body, name)
    return bytes(msgpack.packb(body))


def _body(data: bytes) -> dict[str, Any]:
    try:
        body = msgpack.unpackb(data, strict_map_key=True)
    except Exception:   # of a message that an earlier fault has broken
        return {}
    return body if isinstance(body, dict) and all(isinstance(name, str) for name in body) else {}
