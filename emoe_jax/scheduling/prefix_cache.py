"""Automatic prefix reuse: a sequence takes over the pages of others that begin with the same tokens."""

from array import array
from hashlib import blake2b
from typing import Any

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import PagePool


class PrefixCache:
    """Which pages of a pool hold the first tokens of a sequence; only full pages are published and shared.

    A page's key is a hash over the page before it, its own tokens and, at the start of the chain, the routing
    contract and the salt: equal keys mean equal tokens from position 0 on, computed under the same contract for
    requests of the same salt. Requests of another salt learn nothing of them, neither by counts nor by time.
    """

    def __init__(self, pool: PagePool, enabled: bool):
        self.enabled = enabled
        self._pool = pool
        self._pending: dict[bytes, Sequence] = {}  # pages that a running sequence is computing, by their keys
        self._query_tokens = 0
        self._hit_tokens = 0

    def find(self, sequence: Sequence) -> list[int]:
        """Pages of a sequence's longest published prefix. Its last token is never in them: its logits are needed.

        No pages for a sequence whose prompt must be computed: one that wants the prompt's log probabilities, and one
        whose routing is recorded.
        """
        if not self.enabled or not self._may_reuse(sequence):
            return []
        count = (sequence.num_tokens - 1) // self._pool.page_size
        return self._pool.find(self._key(sequence, index) for index in range(count))

    def is_pending(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether the page after those found for a waiting sequence is being computed for one that runs."""
        if not self._pending or not self._may_reuse(sequence):
            return False
        count = (sequence.num_tokens - 1) // self._pool.page_size
        return len(found) < count and self._key(sequence, len(found)) in self._pending

    def expect(self, sequence: Sequence) -> None:
        """Note on a new sequence how much of it is published by now."""
        sequence.num_cached = len(self.find(sequence)) * self._pool.page_size

    def take(self, sequence: Sequence, pages: list[int]) -> None:
        """Start a sequence, which has no pages, with those that were found for it. It will compute the others."""
        self._pool.share(pages)
        if self.enabled:
            for index in range(len(pages), sequence.num_known // self._pool.page_size):
                self._pending.setdefault(self._key(sequence, index), sequence)
        sequence.pages = list(pages)
        sequence.num_computed = len(pages) * self._pool.page_size
        if sequence.num_preemptions:
            return
        sequence.num_cached = sequence.num_computed
        if self.enabled and self._may_reuse(sequence):
            self._query_tokens += sequence.num_tokens
            self._hit_tokens += sequence.num_cached

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Publish the pages that a sequence has filled by computing tokens `start .. end - 1`, which are known."""
        if self.enabled:
            size = self._pool.page_size
            for index in range(start // size, end // size):
                key = self._key(sequence, index)
                self._pool.publish(sequence.pages[index], key)
                if self._pending.get(key) is sequence:
                    del self._pending[key]

    def stopped(self, sequence: Sequence) -> None:
        """A sequence runs no more: what it has not computed by now, it does not compute."""
        if self._pending:
            for key in sequence.page_keys:
                if self._pending.get(key) is sequence:
                    del self._pending[key]

    def state(self) -> dict[str, Any]:
        """Totals over sequences that started, those left out that must be computed whole; preempted ones count once."""
        return {
            "prefix_caching": self.enabled,
            "prefix_query_tokens": self._query_tokens,
            "prefix_hit_tokens": self._hit_tokens,
        }

    def _may_reuse(self, sequence: Sequence) -> bool:
        return sequence.params.prompt_logprobs is None and sequence.sample < 0

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """The key of a sequence's page, which its tokens fill; hashed once."""
        keys, size = sequence.page_keys, self._pool.page_size
        while len(keys) <= index:
            parent = keys[-1] if keys else _start(sequence)
            tokens = array("I", sequence.tokens(len(keys) * size, size))
            keys.append(blake2b(parent + tokens.tobytes(), digest_size=32).digest())
        return keys[index]


def _start(sequence: Sequence) -> bytes:
    """Stands for the page before the first: 32 bytes, as of any page, so that no salt is taken for tokens."""
    salt = b"" if sequence.cache_salt is None else b"\0" + sequence.cache_salt.encode(errors="surrogatepass")
    return blake2b(repr(sequence.allowance).encode() + salt, digest_size=32).digest()
