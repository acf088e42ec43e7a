"""What a prefix cache tells of itself, against what it has."""

import random

from coordinator.prefix_blocks import block_digests
from workers.block_journal import BlockJournal, split_digests
from workers.page_pool import PagePool
from workers.radix_cache import RadixCache

PAGE = 4


def test_told_changes_add_up_to_what_can_be_found_however_pages_come_and_go() -> None:
    draw = random.Random(1)
    journal, pool = BlockJournal(), PagePool(40)
    cache = RadixCache(pool, PAGE, journal=journal)
    told: set[bytes] = set()
    prompts: list[list[int]] = []
    for turn in range(200):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(PAGE, 6 * PAGE))]
        prompts.append(tokens)
        path = cache.match(tokens, len(tokens))
        num_pages = len(tokens) // PAGE
        cache.evict(num_pages - len(path) - pool.num_free)
        pages = [node.page for node in path]
        pool.retain(pages)
        pages += pool.allocate(num_pages - len(path))
        cache.insert(path, tokens, pages, len(tokens))
        cache.unlock(path)
        pool.release(pages)
        if turn % 7 == 0 and (blocks := journal.take()) is not None:
            told = (told - set(split_digests(blocks.evicted))) | set(split_digests(blocks.added))
            found = set()
            for prompt in prompts:
                held = cache.match(prompt, len(prompt))
                found |= set(block_digests([*prompt, 0], PAGE, len(held)))
                cache.unlock(held)
            assert told == found
    journal.want_all()
    everything = journal.take()
    assert everything is not None and everything.is_all and len(split_digests(everything.added)) == cache.num_nodes
    assert journal.take() is None
