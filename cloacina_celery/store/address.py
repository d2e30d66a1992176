"""Where the database is and as whom it is spoken to: a URL, or a file that holds the present one."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from cloacina_celery.errors import DatabaseUnavailable, SettingsError


def normalise_url(url: str) -> URL:
    """Return a URL that means psycopg2: since SQLAlchemy 2.1 a plain ``postgresql://`` means psycopg 3.

    Raises:
        SettingsError: the URL is not one, or is not Postgres' through psycopg2.
    """
    try:
        parsed = make_url(
            url.replace("postgres://", "postgresql://", 1) if url.startswith("postgres://") else url
        )
    except (ArgumentError, ValueError):
        raise SettingsError(
            "cloacina_database_url is not a URL: write postgresql://user:password@host:5432/database"
        ) from None
    if parsed.drivername not in ("postgresql", "postgresql+psycopg2"):
        raise SettingsError(
            f"cloacina_database_url uses {parsed.drivername!r}; tenants live in Postgres through psycopg2: "
            "write postgresql://... or postgresql+psycopg2://..."
        )
    return parsed.set(drivername="postgresql+psycopg2")


class Address:
    """One URL for ever.

    Raises:
        SettingsError: see `normalise_url`.
    """

    may_change = False

    def __init__(self, url: str) -> None:
        self._url = normalise_url(url)

    def url(self) -> URL:
        """Return the URL to connect to now."""
        return self._url

    def is_stale(self, user: str) -> bool:
        """Tell whether a connection that was opened as this user should give way to a new one."""
        return False


class AddressInFile(Address):
    """The URL that stands in a file now: one that replaces the file gives running processes other credentials.

    Raises:
        SettingsError: the file cannot be read, or what is in it is no URL.
    """

    may_change = True

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        try:
            self._seen = self._stamp()
            super().__init__(self._path.read_text().strip())
        except OSError as error:
            raise SettingsError(
                f"cloacina_database_url_file {path!r} cannot be read: {error.strerror}"
            ) from None

    def url(self) -> URL:
        """Return the URL to connect to now.

        Raises:
            DatabaseUnavailable: the file is gone or holds no URL at the moment; it may be in the middle of a change.
        """
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._url = normalise_url(self._path.read_text().strip())
                self._seen = stamp
        except (OSError, SettingsError) as error:
            raise DatabaseUnavailable(f"no URL in {str(self._path)!r}: {error}") from None
        return self._url

    def is_stale(self, user: str) -> bool:
        """Tell whether the file names another user by now; while it says nothing, the old one will do."""
        try:
            return self.url().username not in (None, user)
        except DatabaseUnavailable:
            return False

    def _stamp(self) -> tuple[int, int, int]:
        found = os.stat(self._path)  # noqa: PTH116  # at each loan of a connection
        return found.st_mtime_ns, found.st_ino, found.st_size
