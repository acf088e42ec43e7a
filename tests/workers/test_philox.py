"""The counter-based generator against the known answers that its authors publish with Random123."""

import numpy as np
import pytest

from workers.philox import philox4x32, uniforms


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_known_answers(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(word, 16) for word in text.split()], dtype=np.uint64) for text in (counter, key)]
    assert " ".join(f"{word:08x}" for word in philox4x32(*words)) == expected


def test_a_draw_depends_on_its_seed_and_index_alone() -> None:
    alone = uniforms([2**64 - 1], [5])[0]
    assert uniforms([3, 2**64 - 1, 7], [0, 5, 5])[1] == alone
    assert len(set(uniforms([1, 1, 2, 2**32 + 1], [0, 1, 0, 0]))) == 4


def test_draws_are_uniform() -> None:
    numbers = uniforms([12345] * 20_000, list(range(20_000)))
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=20, range=(0.0, 1.0))
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi squared, 19 degrees of freedom, p = 0.001
