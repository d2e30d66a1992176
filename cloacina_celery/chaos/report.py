"""What a run prints in the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cloacina_celery.chaos.checker import FINDINGS, Verdict
from cloacina_celery.chaos.history import History
from cloacina_celery.chaos.measure import MESSAGE, RUN, percentile

if TYPE_CHECKING:
    from cloacina_celery.chaos.drive import Run

SLOWEST = 5
"""Recoveries that are listed below the table."""

LISTED = 50
"""Findings of one kind that are listed."""

SHOWN = 10
"""Executions whose history is printed where something was found."""


def show(console: Console, verdict: Verdict, history: History, run: Run, seconds: float, seed: int) -> None:
    """Print the table, the slowest recoveries, and what was found with the history of whom it was found about."""
    table = Table(title=f"chaos, seed {seed}, {seconds:.0f} s", show_header=False, min_width=50)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("executions", f"{verdict.executions:,}")
    for state, number in sorted(verdict.states.items()):
        table.add_row(f"  {state}", f"{number:,}")
    table.add_row("submissions with a lost answer, made again", f"{run.submissions.unknown:,}")
    table.add_row("transactions rolled back", f"{len(history.ghosts):,}")
    table.add_row("attempts", f"{verdict.attempts:,}")
    table.add_row("recoveries", f"{verdict.recoveries:,}")
    table.add_row("runs repeated by a crash of Postgres", f"{verdict.repeated_by_crash:,}")
    table.add_row("failures that nobody ordered", f"{verdict.unordered_failures:,}", end_section=True)
    table.add_row("faults", f"{len(history.faults):,}")
    for kind, number in sorted(Counter(fault.kind for fault in history.faults).items()):
        table.add_row(f"  {kind}", f"{number:,}")
    table.add_section()
    for kind in FINDINGS:
        number = verdict.count(kind)
        table.add_row(kind, f"[red]{number}[/]" if number else "0")
    table.add_section()
    for what in (RUN, MESSAGE):
        times = [one.seconds for one in verdict.recovered if one.what == what]
        for title, percent in (("p50", 50), ("p99", 99), ("max", 100)):
            table.add_row(f"recovery time of a lost {what}, {title}", f"{percentile(times, percent):.2f} s")
    console.print(table)
    for one in verdict.recovered[: -SLOWEST - 1 : -1]:
        console.print(f"{one.seconds:6.2f} s after {one.cause}: {one.execution_id}", highlight=False)
    if verdict.is_clean:
        return
    for kind in FINDINGS:
        found = [finding for finding in verdict.findings if finding.kind == kind]
        if found:
            console.print(f"{kind}:", style="red")
        for finding in found[:LISTED]:
            console.print(f"  {finding.execution_id} {finding.what}", highlight=False)
        if len(found) > LISTED:
            console.print(f"  and {len(found) - LISTED} more", highlight=False)
    for id_ in list(dict.fromkeys(finding.execution_id for finding in verdict.findings))[:SHOWN]:
        events = [event for event in history.events if event.execution_id == id_]
        if not events:
            continue
        planned = history.planned.get(id_)
        console.print(f"\n{id_} in {events[0].tenant} ({planned.kind if planned else 'not planned'})")
        told = [(event.at, f"{event.kind} (attempt {event.attempt}, worker {event.worker_id}) {event.reason or ''}")
                for event in events]  # fmt: skip
        told += [(line.at, f"user code of attempt {line.attempt} in process {line.pid}")
                 for line in history.lines if line.execution_id == id_]  # fmt: skip
        for at, what in sorted(told):
            console.print(f"  {at:%H:%M:%S.%f} {what}", highlight=False)
    console.print(f"\nto run the same plan and faults again: --seed {seed}", highlight=False)
