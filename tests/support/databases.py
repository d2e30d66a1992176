"""A fresh Postgres database for each test, copied from a template that a session prepares once.

Each pytest process (each xdist worker is one) has its own template, so nobody is ever connected to a template
while another copies it. A session holds an advisory lock for as long as it lives: what a killed session left
behind is thereby known to be nobody's, and the next session drops it.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import psycopg2
from psycopg2 import extensions, sql
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_CLASS = 0x434C4F41
"""The first half of the sessions' advisory lock keys: "CLOA"."""

SESSION_DATABASE = re.compile(r"cloacina_test_\w+_\d+_(?P<key>[0-9a-f]{8})_\w+")


def prepare_template(url: str) -> None:
    """Put into the template database what every test's database should hold from the start.

    The hook for whoever makes the first test wait: for example the migrated catalog, which then is made once
    per session and not once per test. It is called once per session with the URL of the empty template, and
    must leave no connection to it open, as Postgres copies only a database that nobody uses.
    """


def sqlalchemy_url(url: str, database: str | None = None) -> str:
    """Return the URL as SQLAlchemy takes it, with the driver named, for another database if one is given."""
    parsed = make_url(url).set(drivername="postgresql+psycopg2")
    if database is not None:
        parsed = parsed.set(database=database)
    return parsed.render_as_string(hide_password=False)


def connect(url: str) -> extensions.connection:
    """Open a plain autocommit connection that takes any of our URLs, with or without a driver in it."""
    conn = psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))
    conn.autocommit = True
    return conn


class Databases:
    """Makes and drops the databases of one pytest process."""

    def __init__(self, admin_url: str, worker_id: str) -> None:
        self._admin_url = admin_url
        self._admin = connect(admin_url)
        key = secrets.randbelow(2**31)
        self._session = f"cloacina_test_{worker_id}_{os.getpid()}_{key:08x}"
        self._numbers = count(1)
        self._execute(
            sql.SQL("SELECT pg_advisory_lock({}, {})").format(sql.Literal(LOCK_CLASS), sql.Literal(key))
        )
        self._drop_what_killed_sessions_left()
        self._template = f"{self._session}_template"
        self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self._template)))
        prepare_template(sqlalchemy_url(admin_url, self._template))

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Yield the SQLAlchemy URL of a new copy of the template, dropped afterwards whoever is in it."""
        name = f"{self._session}_{next(self._numbers)}"
        self._execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(self._template)
            )
        )
        try:
            yield sqlalchemy_url(self._admin_url, name)
        finally:
            self._drop(name)

    def drop_now(self, url: str) -> None:
        """Drop a fresh database before its block ends, for whoever must go after it."""
        self._drop(make_url(url).database or "")

    def url_of(self, name: str) -> str:
        """Return a superuser's URL of a database."""
        return sqlalchemy_url(self._admin_url, name)

    def close(self) -> None:
        """Drop the template and end the session."""
        self._drop(self._template)
        self._admin.close()

    def _drop_what_killed_sessions_left(self) -> None:
        with self._admin.cursor() as cursor:
            # pg_locks shows the locks of all databases, so a session that came in through another one counts
            # as well.
            cursor.execute(
                "SELECT objid::bigint FROM pg_locks"
                " WHERE locktype = 'advisory' AND classid = %s AND objsubid = 2",
                (LOCK_CLASS,),
            )
            living = {row[0] for row in cursor.fetchall()}
            cursor.execute("SELECT datname FROM pg_database WHERE datname LIKE 'cloacina\\_test\\_%'")
            names = [row[0] for row in cursor.fetchall()]
        for name in names:
            match = SESSION_DATABASE.fullmatch(name)
            if match and int(match["key"], 16) not in living:
                self._drop(name)

    def _drop(self, name: str) -> None:
        with self._admin.cursor() as cursor:
            cursor.execute("SELECT oid FROM pg_database WHERE datname = %s", (name,))
            oids = [row[0] for row in cursor.fetchall()]
        self._drop_database(name)
        # Roles are the cluster's and outlive the database whose tenants they were.
        for oid in oids:
            with self._admin.cursor() as cursor:
                cursor.execute(
                    "SELECT rolname FROM pg_roles WHERE shobj_description(oid, 'pg_authid') LIKE %s",
                    (f"cloacina_celery, database {oid}:%",),
                )
                for (role,) in cursor.fetchall():
                    self._execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))

    def _drop_database(self, name: str) -> None:
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composable) -> None:
        with self._admin.cursor() as cursor:
            cursor.execute(statement)
