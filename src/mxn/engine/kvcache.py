"""KV page accounting. Knows pages, sequences and prefixes; knows nothing of tensors or layouts.

A page is in exactly one of three states: *used* (at least one sequence holds it), *cached* (nobody
holds it, its content is still addressable by prefix, it is given away when needed) or *blank*.
Start at `PageTable.allocate`. Invariant: blank + cached + used == total, checked by `validate()`.

What is free of copies and loops over tokens: `grow` and `commit` cost O(1) unless a page border is
crossed; `allocate` is linear in pages.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from mxn.engine.pageruns import PageRuns
from mxn.errors import InternalError

_DIGEST_BYTES = 16  # 128 bits: two different prefixes never meet, so tokens need not be kept


class PrefixKeys:
    """The content address of each full page of a token list: a hash chained over all tokens before.

    `salt` separates contents that must not be shared although their tokens are equal, such as those
    of two adapters.
    """

    __slots__ = ("_page_tokens", "_root", "digests")

    def __init__(self, page_tokens: int, salt: bytes = b"") -> None:
        self._page_tokens = page_tokens
        self._root = blake2b(salt, digest_size=_DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    def extend(self, token_ids: list[int], num_pages: int) -> None:
        """Add the keys up to page `num_pages` (not included); the list must hold their tokens."""
        digests, size = self.digests, self._page_tokens
        parent = digests[-1] if digests else self._root
        for page in range(len(digests), num_pages):
            tokens = array("q", token_ids[page * size : (page + 1) * size]).tobytes()
            parent = blake2b(tokens, digest_size=_DIGEST_BYTES, key=parent).digest()
            digests.append(parent)


class _Holding:
    """What one sequence holds."""

    __slots__ = ("keys", "num_committed", "pages")

    def __init__(self, pages: list[int], keys: PrefixKeys | None, num_committed: int) -> None:
        self.pages = pages
        self.keys = keys  # None: nothing of this sequence is shared
        self.num_committed = num_committed  # leading pages whose content is computed and full


class PageTable:
    """Who holds which page, and which pages can be found by the tokens they contain."""

    def __init__(self, num_pages: int, page_tokens: int, *, prefix_caching: bool = True) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(
                f"num_pages and page_tokens must be at least 1, got {num_pages}, {page_tokens}"
            )
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.prefix_caching = prefix_caching
        self._blank = PageRuns(num_pages)
        self._references = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, least recent first
        self._holdings: dict[str, _Holding] = {}
        self._pending: dict[bytes, _Holding] = {}  # being computed by a holder, not committed yet
        # Evicting a few pages together gives back runs instead of single holes.
        self._evict_batch = max(1, num_pages // 64)

    @property
    def pages_free(self) -> int:
        """Pages that can be given out now: blank ones and cached ones that nobody holds."""
        return self._blank.num_pages + len(self._cached)

    @property
    def pages_cached(self) -> int:
        return len(self._cached)

    @property
    def pages_used(self) -> int:
        return self.num_pages - self.pages_free

    def pages_needed(self, num_tokens: int) -> int:
        """Return the pages that `num_tokens` tokens occupy; a partly filled page counts whole."""
        return -(-num_tokens // self.page_tokens)

    def pages_of(self, seq_id: str) -> list[int]:
        """Return the page ids of a sequence in token order: the live list, not a copy."""
        return self._holdings[seq_id].pages

    def make_keys(self, salt: bytes = b"") -> PrefixKeys | None:
        """Return an empty key list for one sequence, or None when prefix caching is off."""
        return PrefixKeys(self.page_tokens, salt) if self.prefix_caching else None

    def match_prefix(self, token_ids: list[int], keys: PrefixKeys | None) -> int:
        """Return how many leading pages of `token_ids` are in the cache.

        The page of the last token never counts: its logits are wanted, so it must be computed.
        """
        if keys is None:
            return 0
        num_full = (len(token_ids) - 1) // self.page_tokens
        keys.extend(token_ids, num_full)
        page_of = self._page_of
        for index, digest in enumerate(keys.digests):
            if index == num_full or digest not in page_of:
                return index
        return num_full

    def is_pending(self, keys: PrefixKeys | None, page_index: int) -> bool:
        """Return whether a sequence is computing just this page: waiting makes it a cache hit."""
        return (
            keys is not None
            and page_index < len(keys.digests)
            and keys.digests[page_index] in self._pending
        )

    def allocate(
        self,
        seq_id: str,
        token_ids: list[int],
        keys: PrefixKeys | None = None,
        *,
        num_matched: int = 0,
        keep_free: int = 0,
    ) -> bool:
        """Give a sequence the pages of all `token_ids`; the first `num_matched` are cached ones.

        `num_matched` is what `match_prefix` said, with nothing in between. False, and nothing has
        changed, when fewer than `keep_free` pages would stay free. `keys` makes the pages of this
        sequence shareable once they are committed.
        """
        if seq_id in self._holdings:
            raise InternalError(f"sequence {seq_id!r} already holds pages")
        digests = keys.digests if keys is not None else []
        matched = [self._page_of[digest] for digest in digests[:num_matched]]
        num_fresh = self.pages_needed(len(token_ids)) - num_matched
        references = self._references
        num_revived = sum(1 for page in matched if not references[page])
        if num_fresh + num_revived + keep_free > self.pages_free:
            return False
        for page in matched:
            if not references[page]:
                del self._cached[page]
            references[page] += 1
        holding = _Holding(matched, keys, num_matched)
        self._holdings[seq_id] = holding
        self._take(holding, num_fresh)
        for digest in digests[num_matched : len(token_ids) // self.page_tokens]:
            self._pending.setdefault(digest, holding)
        return True

    def grow(self, seq_id: str, num_tokens: int) -> bool:
        """Make the pages of a sequence cover `num_tokens`; False, unchanged: too few are free."""
        holding = self._holdings[seq_id]
        num_fresh = -(-num_tokens // self.page_tokens) - len(holding.pages)
        if num_fresh <= 0:
            return True
        if num_fresh > self.pages_free:
            return False
        self._take(holding, num_fresh)
        return True

    def trim(self, seq_id: str, num_tokens: int) -> None:
        """Take back the pages behind those of `num_tokens`; they hold nothing that counts.

        Raises: InternalError when one of them was committed.
        """
        holding = self._holdings[seq_id]
        num_kept = -(-num_tokens // self.page_tokens)
        surplus = holding.pages[num_kept:]
        if not surplus:
            return
        if num_kept < holding.num_committed:
            raise InternalError(
                f"sequence {seq_id!r}: {holding.num_committed} pages are committed, "
                f"{num_kept} were to stay"
            )
        del holding.pages[num_kept:]
        for page in surplus:
            self._references[page] = 0
        self._blank.give(surplus[::-1])

    def commit(self, seq_id: str, token_ids: list[int], num_computed: int) -> None:
        """Make the full pages among the first `num_computed` tokens findable by their content.

        A page whose content is already in the cache under another page id stays private.
        """
        holding = self._holdings[seq_id]
        num_full = num_computed // self.page_tokens
        if num_full == holding.num_committed:
            return
        keys = holding.keys
        if keys is not None:
            keys.extend(token_ids, num_full)
            for index in range(holding.num_committed, num_full):
                digest = keys.digests[index]
                if digest not in self._page_of:
                    page = holding.pages[index]
                    self._page_of[digest] = page
                    self._key_of[page] = digest
                if self._pending.get(digest) is holding:
                    del self._pending[digest]
        holding.num_committed = num_full

    def free(self, seq_id: str) -> None:
        """Take all pages of a sequence back; those with a known content stay in the cache."""
        holding = self._holdings.pop(seq_id)
        references, key_of = self._references, self._key_of
        blank = []
        for page in reversed(holding.pages):  # the end of a prefix is evicted before its beginning
            references[page] -= 1
            if references[page]:
                continue
            if key_of[page] is None:
                blank.append(page)
            else:
                self._cached[page] = None
        self._blank.give(blank)
        if holding.keys is not None:
            for digest in holding.keys.digests[holding.num_committed :]:
                if self._pending.get(digest) is holding:
                    del self._pending[digest]

    def drop_cache(self) -> None:
        """Forget all cached pages that nobody holds, such as after the weights have changed."""
        self._evict(len(self._cached))

    def _take(self, holding: _Holding, num_pages: int) -> None:
        missing = num_pages - self._blank.num_pages
        if missing > 0:
            self._evict(max(missing, min(self._evict_batch, len(self._cached))))
        pages = holding.pages
        taken = self._blank.take(num_pages, after=pages[-1] if pages else None)
        for page in taken:
            self._references[page] = 1
        pages += taken

    def _evict(self, num_pages: int) -> None:
        evicted = [self._cached.popitem(last=False)[0] for _ in range(num_pages)]
        for page in evicted:
            digest = self._key_of[page]
            assert digest is not None
            del self._page_of[digest]
            self._key_of[page] = None
        self._blank.give(evicted)

    def validate(self) -> None:
        """Check every invariant; O(pages). Raises: InternalError that names the broken one."""
        counted = [0] * self.num_pages
        for holding in self._holdings.values():
            for page in holding.pages:
                counted[page] += 1
        _require(counted == self._references, "references differ from what sequences hold")
        used = {page for page, count in enumerate(counted) if count}
        _disjoint_cover(self.num_pages, used, set(self._cached), set(self._blank))
        _require(all(self._key_of[page] for page in self._cached), "a cached page has no key")
        _require(not any(self._key_of[page] for page in self._blank), "a blank page has a key")
        for digest, page in self._page_of.items():
            _require(self._key_of[page] == digest, f"page {page} is found under a foreign key")
        num_keys = sum(key is not None for key in self._key_of)
        _require(num_keys == len(self._page_of), "a page has a key that does not find it")
        live = set(map(id, self._holdings.values()))
        _require(
            all(id(holding) in live for holding in self._pending.values()),
            "a prefix is pending for a sequence that is gone",
        )
        self._blank.validate()


def _disjoint_cover(total: int, *parts: set[int]) -> None:
    sizes = [len(part) for part in parts]
    union: set[int] = set().union(*parts)
    _require(
        sum(sizes) == len(union) == total,
        f"used + cached + blank = {sizes}, total {total}, {len(union)} different pages",
    )


def _require(is_true: bool, message: str) -> None:
    if not is_true:
        raise InternalError(f"page table: {message}")


def num_runs(pages: Iterable[int]) -> int:
    """Return how many contiguous runs a page list consists of; 1 lets a kernel use a view."""
    runs, previous = 0, None
    for page in pages:
        runs += previous is None or page != previous + 1
        previous = page
    return runs
