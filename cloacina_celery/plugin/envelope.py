"""The Celery message of an execution, as its row keeps it and as it is sent again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kombu.exceptions import EncodeError
from kombu.utils import json

from cloacina_celery.errors import InvalidPayload

TENANT_HEADER = "cloacina_tenant"
ATTEMPT_HEADER = "cloacina_attempt"
EPOCH_HEADER = "cloacina_epoch"
KEY_HEADER = "cloacina_idempotency_key"

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""A NUL's escape; after an escaped backslash the same characters are a text about one."""

DELAY_HEADERS = {"countdown": "cloacina_delay", "eta": "cloacina_eta"}
"""By which of them an option of ``apply_async`` reaches the row; no message carries one."""

_TRANSIENT_HEADERS = ("eta", *DELAY_HEADERS.values())


@dataclass(frozen=True, slots=True)
class Envelope:
    """Headers, properties and body ``[args, kwargs, embed]`` of a message."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: Any

    @property
    def embed(self) -> dict[str, Any]:
        """Celery's canvas parts: callbacks, errbacks, chain and chord."""
        return self.body[2] or {}

    def following_ids(self) -> Iterator[str]:
        """Name the executions that Celery has frozen to follow this one: the rest of its chain, its chord's body."""
        embed = self.embed
        chord = embed.get("chord")
        for signature in (*(embed.get("chain") or ()), *([chord] if chord else ())):
            yield from _frozen_ids(signature)

    def dump(self, task: str) -> str:
        """Encode for the row.

        Raises:
            InvalidPayload: JSON cannot carry an argument or option of the call.
        """
        headers = {k: v for k, v in self.headers.items() if v is not None and k not in _TRANSIENT_HEADERS}
        return dump_json([headers, self.properties, self.body], f"the arguments and options of {task}")

    @classmethod
    def load(cls, stored: str) -> Envelope:
        """Decode what `dump` made."""
        headers, properties, body = json.loads(stored)
        return cls(headers, properties, body)

    def moved(self, old: str, new: str) -> Envelope:
        """Return the message with what its callbacks say of the tenant ``old``, as tenant or queue, said of ``new``."""
        args, kwargs, _ = self.body
        embed = {
            part: [_moved(s, old, new) for s in found] if isinstance(found, list) else _moved(found, old, new)
            for part, found in self.embed.items()
        }
        return Envelope(self.headers, self.properties, [args, kwargs, embed])

    def ringing_for(self, tenant: str, epoch: int, attempt: int, failures: int) -> dict[str, Any]:
        """Return the headers of the message that rings for one attempt."""
        return {
            **self.headers, TENANT_HEADER: tenant, EPOCH_HEADER: epoch, ATTEMPT_HEADER: attempt, "retries": failures,
        }  # fmt: skip


def dump_json(value: Any, what: str) -> str:
    """Encode a value with kombu's JSON (datetimes, decimals and UUIDs included).

    Raises:
        InvalidPayload: it cannot be; ``what`` is named in the error.
    """
    try:
        dumped: str = json.dumps(value)
    except (TypeError, ValueError, EncodeError, RecursionError) as error:
        raise InvalidPayload(
            f"{what} cannot be carried by JSON ({error}): pass plain values, such as an id instead of an object"
        ) from error
    if "\\u0000" in dumped and _NUL.search(dumped):
        raise InvalidPayload(f"{what} contain a NUL character, which Postgres cannot store: remove it")
    return dumped


load_json = json.loads


def _moved(signature: Any, old: str, new: str) -> Any:
    # Arguments are the user's: a tenant's name in there may mean anything.
    if not isinstance(signature, dict) or "task" not in signature:
        return signature
    options = {
        key: new if key in ("tenant", "queue", "routing_key") and value == old else value
        for key, value in (signature.get("options") or {}).items()
    }
    for key in ("link", "link_error"):
        if isinstance(options.get(key), list):
            options[key] = [_moved(one, old, new) for one in options[key]]
    kwargs = dict(signature.get("kwargs") or {})
    if signature.get("subtask_type") in ("chain", "group", "chord"):
        for key in ("tasks", "header", "body"):
            part = kwargs.get(key)
            if part is not None:
                kwargs[key] = (
                    [_moved(one, old, new) for one in part]
                    if isinstance(part, list)
                    else _moved(part, old, new)
                )
    return {**signature, "options": options, "kwargs": kwargs}


def _frozen_ids(signature: Any) -> Iterator[str]:
    execution_id = signature.get("options", {}).get("task_id")
    if execution_id is not None:
        yield execution_id
    kwargs = signature.get("kwargs") or {}
    if signature.get("subtask_type") == "chord" and kwargs.get("body"):
        yield from _frozen_ids(kwargs["body"])
    elif signature.get("subtask_type") in ("chain", "group"):
        for task in kwargs.get("tasks") or ():
            yield from _frozen_ids(task)
