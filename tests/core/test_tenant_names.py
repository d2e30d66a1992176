"""What may be a tenant's name, and how one gets into a statement."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery.core.tenant import MAX_BYTES, quote, validate_tenant_name
from cloacina_celery.errors import CloacinaError, InvalidTenantName

LETTERS = string.ascii_letters + string.digits + "_"
NAMES = st.text(alphabet=LETTERS, min_size=1, max_size=MAX_BYTES)


@pytest.mark.parametrize(
    "name", ["tenant_acme", "Acme", "a", "_", "7", "1st", "A" * 63, "pg", "pgx_1", "cloacina_x"]
)
def test_letters_digits_and_underscores_make_a_name(name: str) -> None:
    assert validate_tenant_name(name) == name


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "it is empty"),
        ("a" * 64, "it is 64 bytes long, Postgres takes 63"),
        ("a" * 5000, "it is 5000 bytes long"),
        ("tenant-acme", "a character that is not allowed"),
        ("tenant acme", "a character that is not allowed"),
        (" tenant", "a character that is not allowed"),
        ("tenant\n", "a character that is not allowed"),
        ("tenant\0", "a character that is not allowed"),
        ('ten"ant', "a character that is not allowed"),
        ("ten'ant", "a character that is not allowed"),
        ('a"; DROP SCHEMA public; --', "a character that is not allowed"),
        ("tenant.acme", "a character that is not allowed"),
        ("ten%ant", "a character that is not allowed"),
        ("ten{s}ant", "a character that is not allowed"),
        ("größe", "a character that is not allowed"),
        ("тенант", "a character that is not allowed"),
        ("tenant_\u0661", "a character that is not allowed"),  # a digit, but not an ASCII one
        ("\N{KELVIN SIGN}elvin", "a character that is not allowed"),  # lower() makes an ASCII k of it
        ("pg_toast", "it is reserved"),
        ("PG_temp", "it is reserved"),
        ("pg_", "it is reserved"),
        ("information_schema", "it is reserved"),
        ("Information_Schema", "it is reserved"),
        ("cloacina", "it is reserved"),
        ("CLOACINA", "it is reserved"),
        ("public", "taken on purpose only: pass legacy=True"),
        ("Public", "taken on purpose only"),
    ],
)
def test_a_name_that_breaks_the_rule_is_refused_and_the_rule_is_said(name: str, complaint: str) -> None:
    with pytest.raises(InvalidTenantName) as refusal:
        validate_tenant_name(name)
    assert complaint in str(refusal.value)
    assert refusal.value.name == name
    if name.lower() != "public":
        assert "1 to 63 ASCII letters, digits and underscores" in str(refusal.value)


@pytest.mark.parametrize("name", [None, 5, b"tenant_acme", ["tenant_acme"], True])
def test_what_is_no_string_is_refused_by_its_type(name: object) -> None:
    with pytest.raises(InvalidTenantName, match=f"is a string, not {type(name).__name__}"):
        validate_tenant_name(name)


def test_public_passes_on_purpose_only_and_only_as_it_is_written() -> None:
    assert validate_tenant_name("public", allow_legacy=True) == "public"
    for name in ("Public", "PUBLIC", "pg_public", "cloacina", "information_schema"):
        with pytest.raises(InvalidTenantName):
            validate_tenant_name(name, allow_legacy=True)


@given(NAMES)
def test_every_string_of_the_alphabet_passes_or_is_reserved(name: str) -> None:
    folded = name.lower()
    reserved = folded in {"public", "cloacina", "information_schema"} or folded.startswith("pg_")
    try:
        assert validate_tenant_name(name) == name
    except InvalidTenantName:
        assert reserved
    else:
        assert not reserved


@given(st.text())
def test_no_string_reaches_a_statement_unless_it_is_harmless_between_quotes(name: str) -> None:
    try:
        quoted = quote(name)
    except CloacinaError:
        return
    assert re.fullmatch(r'"[A-Za-z0-9_]{1,63}"', quoted)
    assert quoted == f'"{name}"'
