"""Tables, commands and links in the documents name what exists, with the defaults that it has."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from typing import TYPE_CHECKING

import click
import pytest
from celery.bin.celery import celery as celery_command

from cloacina_celery import packaged, telemetry
from cloacina_celery.cli import cloacina
from cloacina_celery.core.lifecycle import after_loss
from cloacina_celery.core.retry import RetryPolicy
from cloacina_celery.core.settings import PREFIX, Settings
from cloacina_celery.runtime.attempt import Attempt
from tests.docs.markdown import Block, anchors, blocks, documents, links, table
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PROGRAMS = {"celery", "docker", "export", "make", "pip", "psql", "python"}
SHELL_BLOCKS = [block for document in documents() for block in blocks(document) if block.language == "sh"]
COMMANDS = [(block, command) for block in SHELL_BLOCKS for command in block.commands]
INLINE = re.compile(r"`(celery -A [^`]+|make [a-z][^`]*)`")


# --- settings ---


def written(value: object) -> str:
    """How the tables write a default."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def test_the_settings_table_has_each_setting_with_its_default() -> None:
    expected = {PREFIX + field.name: written(field.default) for field in dataclasses.fields(Settings)}
    assert {row[0]: row[1] for row in table(README, "setting", "default", "meaning")} == expected


def test_no_document_names_a_setting_that_does_not_exist() -> None:
    known = {PREFIX + field.name for field in dataclasses.fields(Settings)}
    for document in documents():
        for name in re.findall(r"`(cloacina_[a-z_]+)(?: = [^`]*)?`", document.read_text(encoding="utf-8")):
            is_setting = name in known
            is_other = name.startswith(("cloacina_celery", "cloacina_version")) or name in NOT_SETTINGS
            assert is_setting or is_other, f"{document.name}: {name}"


NOT_SETTINGS = {
    "cloacina_",
    "cloacina_executions",
    "cloacina_events",
    "cloacina_chords",
    "cloacina_outbox",
    "cloacina_tenant",
    "cloacina_attempt",
    "cloacina_epoch",
    "cloacina_idempotency_key",
    "cloacina_control",
    "cloacina_event",
}


def test_the_environments_table_has_each_variable() -> None:
    variables = {row[0] for row in table(README, "variable", "meaning")}
    assert variables == {
        packaged.DATABASE,
        packaged.DATABASE_FILE,
        packaged.BROKER,
        packaged.IMPORTS,
        "CLOACINA_DEV_DIR",
    }


def test_the_retry_policys_table_has_each_field_with_its_default() -> None:
    fields = [field for field in dataclasses.fields(RetryPolicy) if field.init]
    expected = {f.name: "(Exception,)" if f.name == "retry_on" else written(f.default) for f in fields}
    assert RetryPolicy().retry_on == (Exception,)
    rows = table(DOCS / "getting-started.md", "RetryPolicy", "default", "meaning")
    assert {row[0]: row[1] for row in rows} == expected


def test_the_table_of_what_a_task_knows_names_what_an_attempt_has() -> None:
    for row in table(DOCS / "getting-started.md", "field", "meaning"):
        is_field = row[0] in {field.name for field in dataclasses.fields(Attempt)}
        assert is_field or isinstance(getattr(Attempt, row[0]), property), row[0]


def test_the_recovery_delays_are_those_that_the_documents_say() -> None:
    delays = [after_loss(recoveries=n, max_recoveries=99).delay for n in (0, 1, 2, 3, 50)]  # type: ignore[union-attr]
    assert delays == [0, 1, 2, 4, 60]


# --- logs ---


def test_the_table_of_log_events_has_each_of_them_with_its_level() -> None:
    expected = {name: logging.getLevelName(level) for name, (level, _) in telemetry.EVENTS.items()}
    rows = table(DOCS / "operating.md", "event", "level", "meaning")
    assert {row[0]: row[1] for row in rows} == expected


# --- commands ---


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=lambda value: getattr(value, "where", None))
def test_a_command_in_a_shell_block_exists(block: Block, command: str) -> None:
    check(command, block.where)


def test_commands_in_the_text_exist() -> None:
    for document in documents():
        for command in INLINE.findall(document.read_text(encoding="utf-8")):
            if "..." not in command and "…" not in command:
                check(command, document.name)


def test_the_check_of_commands_refuses_what_does_not_exist() -> None:
    for command in (
        "celery -A shop cloacina tenant make x",
        "celery -A shop cloacina tenant create",
        "celery -A shop cloacina execution list tenant_acme --states failed",
        "celery -A shop worker --pol=prefork",
        "celery -A shop wroker",
        "make demon",
        "cargo build",
    ):
        with pytest.raises(AssertionError):
            check(command, "here")


def test_every_command_of_ours_is_in_a_document() -> None:
    said = "\n".join(document.read_text(encoding="utf-8") for document in documents())
    for path in leaves(cloacina, ()):
        assert f"cloacina {' '.join(path)}" in said, path


def check(command: str, where: str) -> None:
    """Fail unless a command line names a program, commands, options and targets that exist."""
    words = shlex.split(command.replace("<", "").replace(">", ""))
    assert words[0] in PROGRAMS, f"{where}: {command}"
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{where}: {command}"
    elif words[0] == "celery":
        assert words[1] == "-A", f"{where}: {command}"
        check_celery(words[3:], f"{where}: {command}")


def check_celery(words: list[str], where: str) -> None:
    """Fail unless the words after `celery -A app` are a command with its arguments and options."""
    current: click.Command = cloacina if words[:1] == ["cloacina"] else celery_command
    rest = words[1:] if current is cloacina else words
    while isinstance(current, click.Group):
        assert rest, f"{where}: a command of {current.name} is missing"
        assert rest[0] in current.commands, f"{where}: {current.name} has no {rest[0]!r}"
        current, rest = current.commands[rest[0]], rest[1:]
    options = {name: param for param in current.params for name in [*param.opts, *param.secondary_opts]}
    arguments = 0
    while rest:
        word, rest = rest[0], rest[1:]
        if not word.startswith("-"):
            arguments += 1
            continue
        name, has_value, _ = word.partition("=")
        assert name in options, f"{where}: {current.name} has no option {name}"
        param = options[name]
        if not has_value and not (isinstance(param, click.Option) and param.is_flag):
            rest = rest[1:]
    if words[0] != "cloacina":  # Celery's own commands read their arguments by themselves
        return
    needed = [param for param in current.params if isinstance(param, click.Argument) and param.required]
    takes_any = any(isinstance(p, click.Argument) and p.nargs == -1 for p in current.params)
    assert arguments >= len(needed) if takes_any else arguments == len(needed), f"{where}: arguments"


def leaves(group: click.Group, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """List the paths of all commands below a group."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        inside = leaves(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
        found += inside
    return found


# --- links ---


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen, ahead = {README}, [README]
    while ahead:
        document = ahead.pop()
        for link in links(document):
            target = (document.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in seen:
                seen.add(target)
                ahead.append(target)
    assert seen >= set(documents())


def test_no_document_names_a_place_of_one_machine() -> None:
    for document in documents():
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w./])/(work|home|root|tmp|Users)/", text), document.name
