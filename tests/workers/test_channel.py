"""Messages over a socketpair: whole, in order, and a clear end."""

import asyncio
import socket
import struct
import threading

import pytest

from coordinator.errors import MalformedMessage
from workers.channel import MAX_FRAME_BYTES, AsyncChannel, BlockingChannel

MESSAGES = [b"", b"a", b"b" * 70_000, b"c" * 9_000_000, b"d"]


async def open_both() -> tuple[AsyncChannel, BlockingChannel]:
    ours, theirs = socket.socketpair()
    return await AsyncChannel.open(ours), BlockingChannel(theirs)


async def test_messages_of_any_size_arrive_whole_and_in_order_both_ways() -> None:
    ours, theirs = await open_both()
    received: list[bytes] = []

    def echo() -> None:
        for message in theirs:
            received.append(message)
            theirs.send(message)
        theirs.close()

    thread = threading.Thread(target=echo)
    thread.start()
    for message in MESSAGES:
        ours.send(message)
    replies = []
    async for message in ours:
        replies.append(message)
        if len(replies) == len(MESSAGES):
            break
    await ours.close()
    await asyncio.to_thread(thread.join)
    assert replies == received == MESSAGES


async def test_the_end_of_one_side_is_the_end_of_iteration_on_the_other() -> None:
    ours, theirs = await open_both()
    theirs.send(b"last words")
    theirs.close()
    assert [message async for message in ours] == [b"last words"]
    ours.send(b"to nobody")
    await ours.close()

    ours, theirs = await open_both()
    ours.send(b"last words")
    await ours.close()
    assert await asyncio.to_thread(lambda: list(theirs)) == [b"last words"]
    theirs.close()


async def test_a_message_cut_short_by_the_senders_death_is_dropped() -> None:
    raw, theirs = socket.socketpair()
    with raw:
        raw.sendall(struct.pack("<I", 3) + b"one" + struct.pack("<I", 100) + b"cut")
    channel = BlockingChannel(theirs)
    assert list(channel) == [b"one"]
    channel.close()


async def test_a_length_that_no_sender_writes_is_refused() -> None:
    raw, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    with raw:
        raw.sendall(struct.pack("<I", MAX_FRAME_BYTES + 1))
        with pytest.raises(MalformedMessage, match="over the limit"):
            next(iter(channel))
    with pytest.raises(ValueError, match="over the channel's limit"):
        channel.send(bytes(MAX_FRAME_BYTES + 1))
    channel.close()


async def test_threads_may_send_at_once_without_mixing_their_messages() -> None:
    ours, theirs = await open_both()
    threads = [threading.Thread(target=lambda n=n: [theirs.send(bytes([n]) * 10_000) for _ in range(50)]) for n in range(4)]
    for thread in threads:
        thread.start()
    counts = dict.fromkeys(range(4), 0)
    async for message in ours:
        assert message == message[:1] * 10_000
        counts[message[0]] += 1
        if sum(counts.values()) == 200:
            break
    assert set(counts.values()) == {50}
    for thread in threads:
        thread.join()
    theirs.close()
    await ours.close()
