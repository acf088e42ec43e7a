"""Which part of a stored tensor a rank reads."""

from typing import NamedTuple


class Cut(NamedTuple):
    """Along `dim`, which is `whole` long in the file, from `start` on; how far is said by what it is read into."""

    dim: int
    start: int
    whole: int
