"""A bookkeeper's Celery app on its way: one task is plain still, one was plain until today, one is durable."""

from __future__ import annotations

import os
import time

from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cloacina_celery import Cloacina

app = Celery("books", broker=os.environ["CLOACINA_BROKER_URL"])
app.conf.broker_connection_retry_on_startup = True
cloacina = Cloacina(app)

WORK = 0.05
"""Seconds that an entry takes, so that there is work in flight whenever somebody looks."""


class Base(DeclarativeBase):
    """No table names its schema: the session that uses it does."""


class Entry(Base):
    """One entry of a book. Nothing makes its number unique, so that one made twice would show in the totals."""

    __tablename__ = "book_entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    cents: Mapped[int]


# Stage one: as it always was. Its message is all that there is of it.
@app.task(name="books.greet")
def greet(number: int) -> None:
    """Greet somebody, and note it in a table that belongs to no tenant."""
    with create_engine(cloacina.database.url).begin() as connection:
        connection.execute(text("INSERT INTO public.greetings (number) VALUES (:number)"), {"number": number})


# Stage two: durable, under a name of its own.
@cloacina.task(name="books.enter")
def enter(number: int, cents: int) -> None:
    """Make an entry in the tenant's own book; it commits with the fact that this attempt has succeeded."""
    time.sleep(WORK)
    with cloacina.session() as session:
        session.add(Entry(number=number, cents=cents))


# The old name stays plain until no message of it can be left: such a message names no tenant, so it can be no
# durable task's. It hands over by a key, so that a message which comes twice makes one entry.
@app.task(name="books.enter_entry")
def enter_entry(number: int, cents: int) -> None:
    """Submit what was sent before the deploy."""
    enter.apply_async((number, cents), tenant="public", idempotency_key=f"entry-{number}")
