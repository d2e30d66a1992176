"""A stand-in for a bank at the other end of a network: sometimes away, sometimes unwilling."""

from __future__ import annotations

LIMIT = 100_000
"""Cents; more is declined."""


class BankUnreachable(OSError):
    """Nothing is known of the charge; ask again with the same key."""


class CardDeclined(ValueError):
    """The bank has said no, and will say it again."""


def charge(cents: int, *, key: str, is_line_down: bool) -> str:
    """Charge a card and return the receipt; the same key gets the same receipt and is charged once."""
    if is_line_down:
        raise BankUnreachable("the line to the bank is down")
    if cents > LIMIT:
        raise CardDeclined(f"{cents / 100:.2f} is over the limit of {LIMIT / 100:.2f}")
    return f"receipt-{key[:8]}"
