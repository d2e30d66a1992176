"""Statements written once, quoted per tenant, and prepared per connection where that pays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cloacina_celery.core.tenant import quote
from cloacina_celery.store.database import Cursor, note_met

_PARAMETER = re.compile(r"\$(\d+)")

MAX_PREPARED = 256
"""Prepared statements one connection keeps: a worker of a thousand tenants must not grow its backends for ever."""


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL with ``{s}`` for the tenant's quoted schema, ``{t}`` for its name and ``$1::type`` for parameters.

    A hot statement is prepared on its connection at first use: that saves the planner a quarter of the time.
    """

    name: str
    sql: str
    hot: bool = False

    def execute(self, cursor: Cursor, tenant: str, *params: Any, prepare: bool = False) -> None:
        """Run the statement for ``tenant`` on the cursor."""
        note_met(cursor, tenant)
        if self.hot and prepare:
            prepared: dict[tuple[str, str], str] = cursor.connection.prepared
            name = prepared.get((self.name, tenant))
            if name is None and len(prepared) < MAX_PREPARED:
                name = f"cloacina_{self.name}_{len(prepared)}"
                cursor.execute(f"PREPARE {name} AS {_for_tenant(self.sql, tenant)}")
                prepared[self.name, tenant] = name
            if name is not None:
                cursor.execute(f"EXECUTE {name}({', '.join(['%s'] * len(params))})", params)
                return
        cursor.execute(_rendered(self.sql, tenant), {f"p{n}": value for n, value in enumerate(params, 1)})


@lru_cache(maxsize=4096)
def _rendered(sql: str, tenant: str) -> str:
    return _PARAMETER.sub(r"%(p\1)s", _for_tenant(sql.replace("%", "%%"), tenant))


def _for_tenant(sql: str, tenant: str) -> str:
    quoted = quote(tenant)
    # What passes as an identifier has no quote of either kind in it.
    return sql.format(s=quoted, t=f"'{quoted[1:-1]}'")
