"""Numbers and the words that go with them."""

from __future__ import annotations

import pytest

from cloacina_celery.core.words import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 tenants"), (1, "1 tenant"), (2, "2 tenants"), (21, "21 tenants")]
)
def test_one_thing_is_said_in_the_singular_and_every_other_number_in_the_plural(
    number: int, said: str
) -> None:
    assert counted(number, "tenant") == said


def test_words_with_a_plural_of_their_own_have_it() -> None:
    assert [counted(n, "letter waits", "letters wait") for n in (1, 2)] == [
        "1 letter waits",
        "2 letters wait",
    ]
