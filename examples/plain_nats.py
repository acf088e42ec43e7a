"""A job over plain NATS, without tokenmill's code: nats-py and msgpack only. docs/wire.md explains each line.

    python examples/plain_nats.py nats://127.0.0.1:4222 MODEL "What is AI?"
"""

import asyncio
import struct
import sys
import time
import uuid

import msgpack
import nats

VERSION = 1


async def main(nats_url: str, model: str, prompt: str) -> None:
    origin, job_id = f"example-{uuid.uuid4().hex[:12]}", str(uuid.uuid4())
    nc = await nats.connect(nats_url)
    frames = await nc.subscribe(f"live.{origin}.>")            # before the job is published: no frame can be missed
    final = await nc.subscribe(f"results.{job_id}")
    job = {"v": VERSION, "job_id": job_id, "origin": origin, "model": model, "klass": "normal", "text": prompt,
           "params": {"max_new_tokens": 24, "do_sample": True, "seed": 7}, "created_ms": int(time.time() * 1000)}
    ack = await nc.jetstream().publish(f"jobs.{model}.normal.any", msgpack.packb(job), headers={"Nats-Msg-Id": job_id})
    print(f"accepted as number {ack.seq} of the queue", file=sys.stderr)

    shown, is_over = 0, False
    while not is_over:
        frame = msgpack.unpackb((await frames.next_msg(timeout=60)).data)
        for run_job, _epoch, first, _ids, _logprobs, texts, *end in frame.get("runs", []):
            if run_job != job_id or first > shown:             # a gap cannot be here: the subscription is older than the job
                continue
            print("".join(texts[shown - first:]), end="", flush=True)   # a worker that took over may repeat what was shown
            shown, is_over = max(shown, first + len(texts)), bool(end and end[0])

    record = msgpack.unpackb((await final.next_msg(timeout=60)).data)
    num_tokens = len(struct.unpack(f"<{len(record['token_ids']) // 4}I", record["token_ids"]))
    print(f"\n{record['reason']}: {num_tokens} tokens by {', '.join(record['workers'])}", file=sys.stderr)
    await nc.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
