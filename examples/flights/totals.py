"""What the file holds, counted by pandas, and what the tenants hold, counted by Postgres: to be equal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pandas as pd
from sqlalchemy import text
from sqlalchemy.orm import Session

from examples.flights.data import path_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Month:
    """One carrier's month, in whole numbers only, so that equal means equal."""

    flights: int
    cancelled: int
    arrivals: int
    departure_minutes: int
    arrival_minutes: int
    miles: int


Months = dict[int, Month]


def names_of_carriers() -> dict[str, str]:
    """Map each carrier's code to its name."""
    airlines = pd.read_csv(path_of("airlines.csv"))
    return {str(row.carrier): str(row.name) for row in airlines.itertuples(index=False)}


def months_in_file() -> dict[str, Months]:
    """Count the file's flights by carrier and month, by another way than the tasks read it."""
    flights = pd.read_csv(path_of("flights.csv.zip"))
    counted = flights.groupby(["carrier", "month"]).agg(
        flights=("flight", "size"),
        cancelled=("dep_delay", lambda delays: delays.isna().sum()),
        arrivals=("arr_delay", "count"),
        departure_minutes=("dep_delay", "sum"),
        arrival_minutes=("arr_delay", "sum"),
        miles=("distance", "sum"),
    )
    carriers: dict[str, Months] = defaultdict(dict)
    for (carrier, month), row in counted.iterrows():
        carriers[carrier][int(month)] = Month(**{name: int(value) for name, value in row.items()})
    return dict(carriers)


def months_in_tenant(session: Session) -> Months:
    """Count what a tenant's schema holds."""
    rows = session.execute(
        text("""
            SELECT month, count(*) AS flights, count(*) FILTER (WHERE departure_delay IS NULL) AS cancelled,
                   count(arrival_delay) AS arrivals,
                   coalesce(sum(departure_delay), 0) AS departure_minutes,
                   coalesce(sum(arrival_delay), 0) AS arrival_minutes, sum(distance) AS miles
            FROM flights GROUP BY month
        """)
    )
    return {
        month: Month(**{name: int(value) for name, value in counts.items()})
        for month, counts in ((row.pop("month"), row) for row in (dict(row) for row in rows.mappings()))
    }


def delays_in_tenant(session: Session) -> list[tuple[int, int, int]]:
    """List month, flights and cancelled flights of each row that the tasks wrote about a month."""
    rows = session.execute(text("SELECT month, flights, cancelled FROM delays_by_month ORDER BY month"))
    return [(row.month, row.flights, row.cancelled) for row in rows]
