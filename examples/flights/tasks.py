"""The tables that each carrier has in its own schema, and the durable task that fills them month by month."""

from __future__ import annotations

from celery.utils.log import get_task_logger
from sqlalchemy import Float, Integer, String, insert, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cloacina_celery import RetryPolicy, cloacina
from examples.flights.data import flights_of

log = get_task_logger(__name__)


class Base(DeclarativeBase):
    """No table names its schema: the session that uses it does."""


class Flight(Base):
    """One flight. Nothing makes it unique, so that a month loaded twice would show in the totals."""

    __tablename__ = "flights"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    month: Mapped[int]
    day: Mapped[int]
    flight: Mapped[int]
    tail_number: Mapped[str | None] = mapped_column(String(8))
    origin: Mapped[str] = mapped_column(String(3))
    destination: Mapped[str] = mapped_column(String(3))
    distance: Mapped[int]
    departure_delay: Mapped[int | None]
    arrival_delay: Mapped[int | None]


class MonthOfDelays(Base):
    """How late one month's flights were, in minutes, and which attempt found out."""

    __tablename__ = "delays_by_month"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    month: Mapped[int]
    flights: Mapped[int]
    cancelled: Mapped[int]
    mean_arrival_delay: Mapped[float | None] = mapped_column(Float)
    median_arrival_delay: Mapped[float | None] = mapped_column(Float)
    worst_arrival_delay: Mapped[int | None]
    execution_id: Mapped[str]
    attempt: Mapped[int]


SUMMARISE = text("""
    INSERT INTO delays_by_month (month, flights, cancelled, mean_arrival_delay, median_arrival_delay,
                                 worst_arrival_delay, execution_id, attempt)
    SELECT :month, count(*), count(*) FILTER (WHERE departure_delay IS NULL), avg(arrival_delay),
           percentile_cont(0.5) WITHIN GROUP (ORDER BY arrival_delay), max(arrival_delay),
           :execution_id, :attempt
    FROM flights WHERE month = :month
""")


@cloacina.task(
    name="flights.load_month", retry=RetryPolicy(max_attempts=3, initial_delay=1), max_recoveries=5
)
def load_month(carrier: str, month: int) -> int:
    """Load one month into the tenant's own schema, and return the number of flights.

    All of it commits together with the fact that this attempt has succeeded, or none of it.
    """
    execution = cloacina.current_execution()
    assert execution is not None  # as it would be where this is called as a plain function
    if execution.is_recovery:
        log.warning("%s month %s: attempt %s, after a lost worker", carrier, month, execution.attempt)
    flights = [{"month": month, **flight} for flight in flights_of(carrier, month)]
    with cloacina.session() as session:
        session.execute(insert(Flight), flights)
        session.execute(
            SUMMARISE, {"month": month, "execution_id": execution.id, "attempt": execution.attempt}
        )
    return len(flights)
