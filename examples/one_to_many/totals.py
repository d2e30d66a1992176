"""What each book holds beside what was submitted for it: to be equal, in number and in cents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from examples.one_to_many.app import Entry, cloacina


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One tenant's book: each entry's number and cents, as submitted and as made."""

    tenant: str
    expected: Counter[tuple[int, int]]
    made: Counter[tuple[int, int]]
    executions: int

    @property
    def is_right(self) -> bool:
        """Whether each entry was made, and once, by one execution."""
        return self.made == self.expected and self.executions == self.expected.total()


def account_of(tenant: str, expected: dict[int, int]) -> Account:
    """Read what a tenant's book holds."""
    with cloacina.session(tenant) as session:
        made = Counter(
            (number, cents) for number, cents in session.execute(select(Entry.number, Entry.cents))
        )
    executions = sum(cloacina.executions(tenant).count().values())
    return Account(tenant=tenant, expected=Counter(expected.items()), made=made, executions=executions)


def print_accounts(accounts: list[Account]) -> bool:
    """Print the accounts as a table with a verdict, and tell whether all are right."""
    table = Table("tenant", "entries", "submitted", "cents", "submitted", "executions", "equal")
    for account in accounts:
        table.add_row(
            account.tenant,
            str(account.made.total()),
            str(account.expected.total()),
            f"{_cents(account.made):,}",
            f"{_cents(account.expected):,}",
            str(account.executions),
            "yes" if account.is_right else "NO",
        )
    Console(width=100).print(table)
    is_right = all(account.is_right for account in accounts)
    print("Every entry was made once." if is_right else "Some totals are wrong.", flush=True)
    return is_right


def _cents(entries: Counter[tuple[int, int]]) -> int:
    return sum(cents * times for (_, cents), times in entries.items())
