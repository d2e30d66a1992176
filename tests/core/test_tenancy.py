"""Which verb leads where, as a table, and what each refusal says."""

from __future__ import annotations

import pytest

from cloacina_celery.core.tenancy import STARTING_STATES, Standing, TenantState, Verb, after, entering
from cloacina_celery.errors import SubmitRefused, TenantStateRefused, UnknownTenant

ACTIVE, SUSPENDED, DRAINING, REMOVED = TenantState
STATES = (ACTIVE, SUSPENDED, DRAINING)

LEADS = {
    Verb.SUSPEND: (SUSPENDED, SUSPENDED, SUSPENDED),
    Verb.RESUME: (ACTIVE, ACTIVE, ACTIVE),
    Verb.DRAIN: (DRAINING, DRAINING, DRAINING),
    Verb.DROP: (REMOVED, REMOVED, REMOVED),
    Verb.SET: (ACTIVE, SUSPENDED, DRAINING),
    Verb.LIMIT: (ACTIVE, SUSPENDED, DRAINING),
    Verb.RENAME: (None, REMOVED, None),
    Verb.ADOPT: (None, REMOVED, None),
    Verb.EXPORT: (ACTIVE, SUSPENDED, DRAINING),
    Verb.LOGIN: (ACTIVE, SUSPENDED, DRAINING),
}


def test_every_verb_is_in_the_table() -> None:
    assert set(LEADS) == set(Verb) - {Verb.CREATE, Verb.IMPORT}


@pytest.mark.parametrize(("verb", "targets"), LEADS.items(), ids=str)
def test_a_verb_leads_from_each_state_to_its_own_or_is_refused_with_the_mend(
    verb: Verb, targets: tuple[TenantState | None, ...]
) -> None:
    for state, target in zip(STATES, targets, strict=True):
        standing = Standing(name="tenant_a", state=state)
        if target is None:
            with pytest.raises(TenantStateRefused, match=f"it is {state}; run "):
                after(verb, standing)
        else:
            assert after(verb, standing) is target


@pytest.mark.parametrize("verb", LEADS)
def test_nothing_acts_on_a_tombstone_but_a_drop_that_is_done_again(verb: Verb) -> None:
    standing = Standing(name="tenant_a", state=REMOVED)
    if verb is Verb.DROP:
        assert after(verb, standing) is REMOVED
    else:
        with pytest.raises(UnknownTenant, match="'tenant_a' was removed"):
            after(verb, standing)


@pytest.mark.parametrize("verb", [Verb.CREATE, Verb.IMPORT, Verb.RENAME, Verb.ADOPT])
def test_a_name_is_taken_where_nobody_has_it_and_what_comes_from_elsewhere_is_suspended(verb: Verb) -> None:
    assert entering(verb, Standing(name="t", state=REMOVED)) is (ACTIVE if verb is Verb.CREATE else SUSPENDED)
    for state in STATES:
        with pytest.raises(TenantStateRefused, match="choose another name"):
            entering(verb, Standing(name="t", state=state))


@pytest.mark.parametrize("unfinished", [Verb.DROP, Verb.RENAME, Verb.ADOPT])
@pytest.mark.parametrize("verb", Verb)
def test_what_is_not_finished_is_finished_before_anything_else(verb: Verb, unfinished: Verb) -> None:
    standing = Standing(name="tenant_a", state=REMOVED, unfinished=unfinished)
    if verb is unfinished:
        assert after(verb, standing) is REMOVED
    elif verb in LEADS:
        with pytest.raises(TenantStateRefused, match=f"run `tenant {unfinished}` once more"):
            after(verb, standing)
    if verb in (Verb.CREATE, Verb.IMPORT, Verb.RENAME):
        with pytest.raises(TenantStateRefused, match=f"run `tenant {unfinished}` once more"):
            entering(verb, standing)


def test_an_import_that_was_interrupted_is_taken_up_by_the_next_one() -> None:
    assert entering(Verb.IMPORT, Standing(name="t", state=REMOVED, unfinished=Verb.IMPORT)) is SUSPENDED


def test_keys_are_counted_by_name_and_epoch_and_move_with_the_tenant() -> None:
    spaces = [
        Standing(name="t").key_space,
        Standing(name="t", epoch=2).key_space,
        Standing(name="u", inherited_key_space="t").key_space,
    ]
    assert spaces == ["t", "t//2", "t"]


def test_executions_start_while_a_tenant_is_active_or_drains() -> None:
    assert {ACTIVE, DRAINING} == STARTING_STATES


@pytest.mark.parametrize(
    ("standing", "is_admitted"),
    [
        (Standing(name="t"), True),
        (Standing(name="t", state=SUSPENDED), True),
        (Standing(name="t", state=SUSPENDED, refuses_submits=True), False),
        (Standing(name="t", state=DRAINING), False),
    ],
    ids=str,
)
def test_a_suspended_tenant_takes_submissions_unless_told_not_to_and_a_draining_one_none(
    standing: Standing, is_admitted: bool
) -> None:
    if is_admitted:
        standing.admit()
    else:
        with pytest.raises(SubmitRefused, match="tenant resume t"):
            standing.admit()


def test_a_removed_tenant_says_where_it_went() -> None:
    with pytest.raises(UnknownTenant, match="moved to 'tenant_b'"):
        Standing(name="tenant_a", state=REMOVED, moved_to="tenant_b").admit()
