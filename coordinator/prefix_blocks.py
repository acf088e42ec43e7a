"""Names for the beginnings of prompts: one digest per full KV page, each over its tokens and the digest of the page before it.

Producers and workers compute the same ones, so equal digests mean (but for a collision of 64 bits, which costs time and never an answer)
that a worker has the keys and values of all tokens up to there.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 8
ROOT = b""


def next_digest(parent: bytes, page_tokens: Sequence[int]) -> bytes:
    return blake2b(array("I", page_tokens), digest_size=DIGEST_BYTES, key=parent).digest()


def block_digests(token_ids: Sequence[int], page_size: int, most: int) -> list[bytes]:
    """Of the first `most` full pages. The last token is left out: whoever draws the next one must run it anyway."""
    digests: list[bytes] = []
    digest = ROOT
    for start in range(0, min((len(token_ids) - 1) // page_size, most) * page_size, page_size):
        digest = next_digest(digest, token_ids[start:start + page_size])
        digests.append(digest)
    return digests
