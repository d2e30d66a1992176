"""How far the load is: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cloacina_celery import cloacina

STEP = 0.1
"""How much must have happened for another line where there is no terminal."""


class Board:
    """Shows how many months of each tenant are loaded, and what happens meanwhile."""

    def __init__(self, console: Console, months: dict[str, int]) -> None:
        self._months = months
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._bars = {
            tenant: self._progress.add_task(tenant, total=count) for tenant, count in months.items()
        }
        self._next_line = STEP
        self.share = 0.0
        """How much of all is loaded, at the last `update`."""

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """Print a line above the bars."""
        self._console.print(what, soft_wrap=True, highlight=False)

    def update(self) -> None:
        """Count anew what has succeeded, and show it."""
        done = 0
        for tenant, bar in self._bars.items():
            counts = cloacina.executions(tenant).count()
            succeeded = sum(count for state, count in counts.items() if state == "succeeded")
            self._progress.update(bar, completed=succeeded)
            done += succeeded
        self.share = done / sum(self._months.values())
        if not self._console.is_terminal and self.share >= self._next_line:
            self._next_line = self.share + STEP
            self.say(f"{self.share:4.0%} of the months are loaded")
