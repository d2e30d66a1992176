"""What a worker's -Q selects, and which shard a tenant is in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloacina_celery.core.shard import Selection, Selector, shard_of
from cloacina_celery.errors import SettingsError

NAMES = st.from_regex(r"[A-Za-z0-9_]{1,63}", fullmatch=True)


@pytest.mark.parametrize("queue", ["tenant_acme", "celery", "mail@host.dq", "orders.eu", "tenant_a@2", "a/b"])
def test_a_queues_name_selects_nothing_but_itself(queue: str) -> None:
    assert Selector.parse(queue) is None
    assert Selection.of([queue]).queues == {queue}


def test_a_pattern_selects_the_tenants_that_match_it() -> None:
    selection = Selection.of(["tenant_*", "acme"])
    assert selection.has("tenant_a")
    assert selection.has("acme")
    assert not selection.has("other_a")
    assert selection.queues == {"acme"}


def test_what_is_left_out_is_not_selected() -> None:
    selection = Selection.of(["tenant_*"], leave_out=["tenant_big", "tenant_vip_*"])
    assert selection.has("tenant_a")
    assert not selection.has("tenant_big")
    assert not selection.has("tenant_vip_1")


@given(NAMES, st.integers(1, 200))
def test_every_tenant_is_in_exactly_one_shard(name: str, shards: int) -> None:
    pattern = [Selector(pattern="*", shard=shard, shards=shards) for shard in range(1, shards + 1)]
    assert sum(selector.matches(name) for selector in pattern) == 1


@given(NAMES, st.integers(1, 200))
def test_one_shard_more_takes_tenants_from_the_others_and_moves_no_other(name: str, shards: int) -> None:
    assert shard_of(name, shards + 1) in (shard_of(name, shards), shards + 1)


def test_shards_are_of_about_the_same_size() -> None:
    counts = [0] * 8
    for number in range(10_000):
        counts[shard_of(f"tenant_{number}", 8) - 1] += 1
    assert min(counts) > 1100
    assert max(counts) < 1400


def test_the_assignment_never_changes_between_releases() -> None:
    # Workers of two releases run side by side during a deploy: both must agree.
    assert [shard_of(f"tenant_{name}", 8) for name in "abcdefgh"] == [2, 2, 1, 4, 2, 4, 6, 3]


@pytest.mark.parametrize(
    ("queue", "says"),
    [
        ("tenant_*@0/8", "counted from 1"),
        ("tenant_*@9/8", "counted from 1"),
        ("tenant_*@1/0", "counted from 1"),
        ("tenant-é*", "no tenant's name can match"),
        ("orders.*", "no tenant's name can match"),
        ("a@b@1/2", "no tenant's name can match"),
        ("tenant_*@2", "no tenant's name can match"),
    ],
)
def test_a_selection_that_can_select_nothing_is_an_error_that_shows_how(queue: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        Selection.of([queue])
    assert "tenant_*@2/8" in str(caught.value)
