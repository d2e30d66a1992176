"""The types of the public surface, as mypy sees them in a user's module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api

PROMISES = Path(__file__).with_name("promises.py")
MESSAGE = re.compile(r"promises\.py:(?P<line>\d+): (?P<level>error|note): (?P<text>.*)")
REVEALED = re.compile(r'Revealed type is "(?P<type>.*)"')
CODE = re.compile(r"\[(?P<code>[a-z-]+)\]$")
EXPECTED = re.compile(r"# (?P<kind>type|error): (?P<what>.+)$")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, set[tuple[str, str]]]:
    """What strict mypy says of each line of the module: revealed types and error codes."""
    # A module of the user's: our own settings and the errors inside the package are not what is looked at.
    out, err, _code = api.run(
        [
            "--strict",
            "--config-file=",
            f"--cache-dir={tmp_path_factory.mktemp('mypy')}",
            "--follow-imports=silent",
            "--allow-untyped-decorators",
            "--ignore-missing-imports",
            "--hide-error-context",
            "--no-error-summary",
            str(PROMISES),
        ]
    )
    assert not err, err
    found: dict[int, set[tuple[str, str]]] = {}
    for message in filter(None, map(MESSAGE.search, out.splitlines())):
        line = int(message["line"])
        if message["level"] == "error":
            code = CODE.search(message["text"])
            found.setdefault(line, set()).add(("error", code["code"] if code else message["text"]))
        elif revealed := REVEALED.search(message["text"]):
            found.setdefault(line, set()).add(("type", revealed["type"]))
    return found


def test_every_line_of_a_users_module_has_the_type_or_the_error_that_it_says(
    said: dict[int, set[tuple[str, str]]],
) -> None:
    expected: dict[int, set[tuple[str, str]]] = {}
    for number, line in enumerate(PROMISES.read_text(encoding="utf-8").splitlines(), 1):
        if wanted := EXPECTED.search(line):
            expected[number] = {(wanted["kind"], wanted["what"])}
    assert expected, "the module promises something"
    assert said == expected
