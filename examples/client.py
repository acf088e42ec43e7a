"""tokenmill's own client: submit, stream, come back for the rest, wait for the whole.

    python examples/client.py NATS_URL REDIS_URL MODEL "What is AI?"
"""

import asyncio
import sys

from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient


async def main(nats_url: str, redis_url: str, model: str, prompt: str) -> None:
    async with await TokenmillClient.connect(nats_url, redis_url, model=model) as client:
        handle = await client.submit(prompt, SamplingParams(max_new_tokens=24), klass="interactive", timeout_s=120)
        async for token in handle.stream():
            print(token.text, end="", flush=True)
            if token.index == 7:
                break                                   # say that this process loses its place here
        handle.close()

    async with await TokenmillClient.connect(nats_url, redis_url, model=model) as another:
        async for token in another.stream(handle.job_id, next_index=8):
            print(token.text, end="", flush=True)
        result = await another.result(handle.job_id)
        print(f"\n{result.reason}: {len(result.token_ids)} tokens", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
