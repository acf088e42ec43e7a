"""Prefill and decode apart, each of several ranks, split differently: the tokens of transformers, whoever dies."""

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.system.served import Served
from tests.system.test_ranks import PROMPTS, greedy, stream
from workers.random_model import write_random_model

pytestmark = [pytest.mark.system, pytest.mark.services]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values of its own for each pair of heads: ranks hold different ones."""
    return write_random_model(tmp_path_factory.mktemp("llama") / "model", "llama", seed=4)


@contextmanager
def disaggregated(folder: Path, model_dir: Path, prefill: list[str], decode: list[str],
                  moe_mode: str = "TP") -> Iterator[dict[str, Served]]:
    sizes = ["--model_dir", str(model_dir), "--max_total_token_num", "16384", "--max_req_total_len", "2048"]
    with ExitStack() as stack:
        farm = {"master": stack.enter_context(Served(folder / "master", "--run_mode", "pd_master", "--port", "0", "--state_dir",
                                                     str(folder / "state"), *sizes[:2]))}
        join = ["--pd_master_ip", "127.0.0.1", "--pd_master_port", farm["master"].url().rpartition(":")[2]]
        for role, flags in (("prefill", prefill), ("decode", decode)):
            farm[role] = stack.enter_context(Served(folder / role, "--run_mode", role, *join, *sizes, *flags,
                                                    environment={"MOE_MODE": moe_mode}))
        farm["master"].wait_ready()
        yield farm


async def test_keys_and_values_split_over_two_ranks_are_decoded_by_one(tmp_path: Path, llama: Path) -> None:
    with disaggregated(tmp_path, llama, ["--tp", "2", "--chunked_prefill_size", "64"], []) as farm:
        url = farm["master"].url()
        answers = await asyncio.gather(*(stream(url, prompt, 24) for prompt in PROMPTS))
        assert answers == greedy(llama, PROMPTS, 24)
        farm["master"].wait_at_rest()


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode", "moe_mode", "transfer"), [
    ("2 1", "4 1", "TP", "mapped"), ("2 2", "2 2", "EP", "mapped"), ("4 1", "1 1", "TP", "collective"),
])
@pytest.mark.parametrize("kind", ["gqa", "mla"])
async def test_any_split_hands_over_to_any_other(tmp_path: Path, llama: Path, tiny_v3: Path, kind: str, prefill: str, decode: str,
                                                 moe_mode: str, transfer: str) -> None:
    if kind == "gqa" and moe_mode == "EP":
        pytest.skip("a dense model has no experts to spread")
    model_dir = llama if kind == "gqa" else tiny_v3
    flags = [["--tp", tp, "--dp", dp, "--kv_transfer", transfer] for tp, dp in (prefill.split(), decode.split())]
    with disaggregated(tmp_path, model_dir, *flags, moe_mode=moe_mode) as farm:
        url = farm["master"].url()
        assert await asyncio.gather(*(stream(url, prompt, 24) for prompt in PROMPTS)) == greedy(model_dir, PROMPTS, 24)
        under_way = asyncio.Event()
        streams = [asyncio.create_task(stream(url, prompt, 120, under_way)) for prompt in PROMPTS[:5]]
        await under_way.wait()
        victim = max(int(size.split()[0]) for size in (prefill, decode)) - 1
        role = "prefill" if int(prefill.split()[0]) > victim else "decode"
        with contextlib.suppress(ProcessLookupError):
            farm[role].rank(victim).kill()
        assert await asyncio.gather(*streams) == greedy(model_dir, PROMPTS[:5], 120)
        farm["master"].wait_at_rest()
