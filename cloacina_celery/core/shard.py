"""Which tenants a worker serves: by name, by a shell pattern, or by one shard of what a pattern matches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b
from typing import Self

from cloacina_celery.errors import SettingsError

_SHARD = re.compile(r"(?P<pattern>.+)@(?P<shard>\d{1,6})/(?P<shards>\d{1,6})", re.ASCII)
_WILDCARD = re.compile(r"[*?\[]")
_PATTERN = re.compile(r"[A-Za-z0-9_*?!\[\]-]+", re.ASCII)
_HOW = "write -Q 'tenant_*' for all tenants whose names begin so, or -Q 'tenant_*@2/8' for the second of eight shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """The tenants whose names match a shell pattern and fall into one of ``shards`` shards, counted from 1."""

    pattern: str
    shard: int = 1
    shards: int = 1

    @classmethod
    def parse(cls, queue: str) -> Self | None:
        """Read what was given as a queue's name; ``None`` where it is the name of one queue.

        Raises:
            SettingsError: it is meant as a selection and can select nothing.
        """
        match = _SHARD.fullmatch(queue)
        if match is None:
            if not _WILDCARD.search(queue):
                return None
            selector = cls(pattern=queue)
        else:
            selector = cls(pattern=match["pattern"], shard=int(match["shard"]), shards=int(match["shards"]))
            if not 1 <= selector.shard <= selector.shards:
                raise SettingsError(
                    f"queue {queue!r} asks for shard {selector.shard} of {selector.shards}: shards are counted "
                    f"from 1, so {selector.pattern}@1/{selector.shards} is the first; {_HOW}"
                )
        if not _PATTERN.fullmatch(selector.pattern):
            raise SettingsError(
                f"queue {queue!r} selects tenants by a pattern that no tenant's name can match: names have "
                f"letters, digits and underscores; {_HOW}"
            )
        return selector

    def matches(self, name: str) -> bool:
        """Tell whether a tenant of this name is selected."""
        return fnmatchcase(name, self.pattern) and shard_of(name, self.shards) == self.shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """All that a worker was told to serve: queues by name, tenants by selectors, and what to leave out."""

    queues: frozenset[str]
    selectors: tuple[Selector, ...] = ()
    left_out: tuple[Selector, ...] = ()

    @classmethod
    def of(cls, queues: Iterable[str], *, leave_out: Iterable[str] = ()) -> Self:
        """Sort names from selectors, in what is to be served and in what is to be left out.

        Raises:
            SettingsError: one of them is meant as a selection and can select nothing.
        """
        parsed = {queue: Selector.parse(queue) for queue in queues}
        return cls(
            queues=frozenset(queue for queue, selector in parsed.items() if selector is None),
            selectors=tuple(selector for selector in parsed.values() if selector is not None),
            left_out=tuple(Selector.parse(queue) or Selector(pattern=queue) for queue in leave_out),
        )

    def has(self, name: str) -> bool:
        """Tell whether the tenant of this name is to be served."""
        return (
            name in self.queues or any(selector.matches(name) for selector in self.selectors)
        ) and not any(selector.matches(name) for selector in self.left_out)


@lru_cache(maxsize=65_536)
def shard_of(name: str, shards: int) -> int:
    """Return the shard, from 1 to ``shards``, that a tenant of this name is in, on every machine and for ever.

    Where ``shards`` grows by one, only the tenants that the new shard takes change theirs. The hash is the jump
    consistent hash of Lamping and Veach (2014).
    """
    if shards == 1:
        return 1
    key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    bucket, jump = 0, 0
    while jump < shards:
        bucket = jump
        key = (key * 2862933555777941757 + 1) % 2**64
        jump = int((bucket + 1) * 2**31 / ((key >> 33) + 1))
    return bucket + 1
