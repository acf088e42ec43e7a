"""The prefix tree: full pages only, locks, eviction order, sharing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.page_pool import PagePool
from workers.radix_cache import Node, RadixCache


def cached(cache: RadixCache, pool: PagePool, tokens: list[int]) -> list[int]:
    """Run a sequence of these tokens to its end. Returns the pages that it left in the tree."""
    path = cache.match(tokens, len(tokens))
    pages = [node.page for node in path]
    pool.retain(pages)
    pages += pool.allocate(-(-len(tokens) // cache.page_size) - len(pages))
    cache.insert(path, tokens, pages, len(tokens))
    cache.unlock(path)
    pool.release(pages)
    return pages[:len(tokens) // cache.page_size]


def found(cache: RadixCache, tokens: list[int]) -> list[int]:
    path = cache.match(tokens, len(tokens))
    pages = [node.page for node in path]
    cache.unlock(path)
    return pages


def test_only_full_pages_are_found() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 4)
    pages = cached(cache, pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == pages and len(pages) == 2
    assert found(cache, [1, 2, 3, 4, 5, 6, 7]) == pages[:1]
    assert found(cache, [1, 2, 3]) == []
    assert found(cache, [2, 1, 3, 4]) == []


def test_prompts_branch_where_they_differ() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 2)
    left = cached(cache, pool, [1, 2, 3, 4])
    right = cached(cache, pool, [1, 2, 5, 6])
    assert left[0] == right[0] and left[1] != right[1]
    assert (cache.num_nodes, pool.num_free) == (3, 5)


def test_the_least_recently_used_leaf_goes_first_and_a_locked_page_never() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 1)
    a, b, c = (cached(cache, pool, tokens)[0] for tokens in ([1], [2], [3]))
    locked = cache.match([2], 1)
    found(cache, [1])
    assert cache.evict(1) == 1 and found(cache, [3]) == []
    assert cache.evict(5) == 1 and found(cache, [1]) == []
    assert [node.page for node in locked] == [b] and found(cache, [2]) == [b]
    cache.unlock(locked)
    assert cache.evict(5) == 1 and pool.num_free == 8
    assert len({a, b, c}) == 3


def test_a_prefix_is_evicted_after_what_hangs_below_it() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 1)
    pages = cached(cache, pool, [1, 2, 3])
    cache.evict(1)
    assert found(cache, [1, 2, 3]) == pages[:2]


def test_equal_prompts_that_ran_side_by_side_end_up_on_the_same_pages() -> None:
    pool = PagePool(8)
    cache = RadixCache(pool, 2)
    tokens, paths, tables = [1, 2, 3, 4], list[list[Node]](), list[list[int]]()
    for _ in range(2):
        paths.append(cache.match(tokens, 4))
        tables.append(pool.allocate(2))
    for path, table in zip(paths, tables, strict=True):
        cache.insert(path, tokens, table, 4)
    assert tables[0] == tables[1] and pool.num_free == 6
    pool.check_integrity([*tables, cache.pages()])


def test_a_disabled_cache_finds_nothing() -> None:
    pool = PagePool(4)
    cache = RadixCache(pool, 2, enabled=False)
    cached(cache, pool, [1, 2, 3, 4])
    assert found(cache, [1, 2, 3, 4]) == [] and pool.num_free == 4


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from(["run", "hold", "end", "evict"]), prompts), max_size=60))
def test_any_history_keeps_locks_pages_and_counts_consistent(page_size: int, history: list[tuple[str, list[int]]]) -> None:
    pool = PagePool(64)
    cache = RadixCache(pool, page_size)
    held: list[tuple[list[int], list[Node], list[int]]] = []
    for action, tokens in history:
        if action == "evict":
            before = cache.num_evictable
            assert cache.evict(len(tokens)) == min(len(tokens), before)
        elif action == "end" and held:
            _, path, pages = held.pop(len(tokens) % len(held))
            cache.unlock(path)
            pool.release(pages)
        elif action == "run" and pool.num_free >= 10:
            cached(cache, pool, tokens)
            assert len(found(cache, tokens)) == len(tokens) // page_size
        elif action == "hold" and pool.num_free >= 10:
            path = cache.match(tokens, len(tokens))
            pages = [node.page for node in path]
            pool.retain(pages)
            pages += pool.allocate(-(-len(tokens) // page_size) - len(pages))
            cache.insert(path, tokens, pages, len(tokens))
            held.append((tokens, path, pages))
        for tokens_held, path, pages in held:
            assert [node.page for node in path] == pages[:len(path)] and len(path) == len(tokens_held) // page_size
        cache.check_integrity()
        pool.check_integrity([*(pages for _, _, pages in held), cache.pages()])
    for _, path, pages in held:
        cache.unlock(path)
        pool.release(pages)
    cache.evict(64)
    assert pool.num_free == 64 and cache.num_nodes == 0
