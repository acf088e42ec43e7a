"""Kernels run on the GPU where there is one, else in Triton's interpreter, which has to be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["half", "wide"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The types that kernels see: bfloat16 and float16 on a GPU; float16 and float32 in the interpreter, which has no bfloat16."""
    if torch.cuda.is_available():
        return {"half": torch.float16, "wide": torch.bfloat16}[request.param]
    return {"half": torch.float16, "wide": torch.float32}[request.param]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
