"""Words that follow numbers."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """Say a number with the words that go with it: ``1 tenant``, ``2 tenants``.

    Args:
        many: where an ``s`` at the end does not do.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
