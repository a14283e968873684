"""A KV cache with memory for the tokens that follow, so that a sampling loop does not copy the context at each step."""

from collections.abc import Iterable

import torch.nn.functional as F  # noqa: N812

from ..network.attention import KVCache


class PreallocatedKVCache(KVCache):
    """Keys and values of a layer, (B, S + T, D), of which the last T are memory for new tokens.

    `append` writes the new tokens there and returns the whole. The next `append` overwrites them, because each step of
    a solver has new actions after the same context. It cannot be differentiated, and only one thread may use it.
    """

    def append(self, new: KVCache) -> KVCache:
        """All keys and values, with those of T new tokens at the end."""
        for whole, tokens in zip(self, new, strict=True):
            whole[:, -tokens.shape[1] :] = tokens
        return KVCache(*self)


def preallocate(cache: Iterable[KVCache], tokens: int) -> list[KVCache]:
    """A copy of each layer's KV cache, with memory for this many more tokens."""
    return [PreallocatedKVCache(*(F.pad(x, (0, 0, 0, tokens)) for x in layer)) for layer in cache]
