"""The table at the end: each tenant's totals beside the file's."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cloacina_celery import cloacina
from examples.flights.totals import Months, delays_in_tenant, months_in_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What one tenant holds, and what it should."""

    tenant: str
    carrier: str
    expected: Months
    loaded: Months
    delays: list[tuple[int, int, int]]
    recoveries: int

    @property
    def is_equal(self) -> bool:
        """Whether the flights, and what the tasks wrote about each month, are exactly the file's."""
        delays = [(month, total.flights, total.cancelled) for month, total in sorted(self.expected.items())]
        return self.loaded == self.expected and self.delays == delays


def account_of(tenant: str, names: dict[str, str], expected: Months) -> Account:
    """Count what a tenant holds."""
    with cloacina.session(tenant) as session:
        loaded, delays = months_in_tenant(session), delays_in_tenant(session)
    return Account(
        tenant=tenant,
        carrier=names[tenant.removeprefix("tenant_").upper()],
        expected=expected,
        loaded=loaded,
        delays=delays,
        recoveries=sum(execution.recoveries for execution in cloacina.executions(tenant).list()),
    )


def flights_in(months: Months) -> int:
    return sum(month.flights for month in months.values())


def mean_arrival_delay(months: Months) -> str:
    """Tell how late the flights that arrived were on average, in minutes."""
    arrived = sum(month.arrivals for month in months.values())
    return f"{sum(month.arrival_minutes for month in months.values()) / arrived:.1f}" if arrived else ""


def table_of(accounts: list[Account]) -> Table:
    """Set the accounts side by side, the largest tenant first, and add them up."""
    table = Table(
        title="What the tenants hold, and what the file holds (late: minutes at arrival, mean)",
        box=SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("tenant", "all", no_wrap=True)
    table.add_column("carrier", no_wrap=True, max_width=17)
    for heading, sum_of_all in (
        ("months", str(sum(len(account.loaded) for account in accounts))),
        ("loaded", f"{sum(flights_in(account.loaded) for account in accounts):,}"),
        ("in file", f"{sum(flights_in(account.expected) for account in accounts):,}"),
        ("equal", ""),
        ("late", ""),
        ("recoveries", str(sum(account.recoveries for account in accounts))),
    ):
        table.add_column(heading, sum_of_all, justify="right", no_wrap=True, min_width=len(heading))
    for account in sorted(accounts, key=lambda account: -flights_in(account.expected)):
        table.add_row(
            account.tenant,
            account.carrier.removesuffix(" Inc.").removesuffix(" Co."),
            str(len(account.loaded)),
            f"{flights_in(account.loaded):,}",
            f"{flights_in(account.expected):,}",
            "[green]yes[/]" if account.is_equal else "[red]NO[/]",
            mean_arrival_delay(account.loaded),
            str(account.recoveries or ""),
        )
    return table


def verdict(accounts: list[Account]) -> tuple[bool, str]:
    """Tell whether the demo has shown what it is to show, and in words."""
    wrong = [account.tenant for account in accounts if not account.is_equal]
    recoveries = sum(account.recoveries for account in accounts)
    if wrong:
        return False, f"[red]The totals of {', '.join(wrong)} are not the file's.[/]"
    if not recoveries:
        return False, "[red]Every total is right, but nothing had to be recovered.[/]"
    counted = "1 recovery" if recoveries == 1 else f"{recoveries} recoveries"
    return True, f"[green]Every total is exactly the file's, after {counted}.[/]"
