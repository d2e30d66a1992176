"""The leak canary: a hostile tenant tries everything, and each level stops what it claims to stop and no less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import table
from tests.isolation.attacks import ATTACKS, OPEN
from tests.support import ROOT

if TYPE_CHECKING:
    from tests.isolation.attacks import Attack
    from tests.isolation.stages import Stage

DOCUMENT = ROOT / "docs" / "isolation.md"


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_stopped_where_the_documents_say_so_and_only_there(stage: Stage, attack: Attack) -> None:
    assert attack.gets_through(stage) is (attack.verdict(stage.level) == OPEN)


def test_the_documents_table_is_this_list() -> None:
    rows = [row[:4] for row in table(DOCUMENT, "a task tries", "schema", "role", "login")]
    assert [tuple(row) for row in rows] == [
        (attack.name.replace("`", ""), attack.schema, attack.role, attack.login) for attack in ATTACKS
    ]
