"""Settings: a wrong or unknown one names the nearest right one, and they are checked together."""

from __future__ import annotations

from typing import Any

import pytest

from cloacina_celery import SettingsError
from cloacina_celery.core.settings import Settings


def test_the_defaults_fit_together() -> None:
    assert Settings.from_mapping({}) == Settings()


def test_settings_come_from_the_configuration_and_arguments_win() -> None:
    conf = {"cloacina_lease_ttl": 60.0, "cloacina_max_recoveries": 7, "task_default_queue": "celery"}
    settings = Settings.from_mapping(conf, max_recoveries=1, database_url=None)
    assert (settings.lease_ttl, settings.max_recoveries) == (60.0, 1)


def test_none_means_the_default() -> None:
    assert Settings.from_mapping({"cloacina_lease_ttl": None}, sweep_batch=None) == Settings()


def test_the_environment_names_the_database_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOACINA_DATABASE_URL", "postgresql://environment")
    assert Settings.from_mapping({}).database_url == "postgresql://environment"
    assert (
        Settings.from_mapping({"cloacina_database_url": "postgresql://conf"}).database_url
        == "postgresql://conf"
    )
    assert (
        Settings.from_mapping({}, database_url="postgresql://argument").database_url
        == "postgresql://argument"
    )


@pytest.mark.parametrize(
    ("conf", "overrides", "message"),
    [
        (
            {"cloacina_lease_tll": 5},
            {},
            r"unknown setting cloacina_lease_tll: did you mean cloacina_lease_ttl\?",
        ),
        ({"cloacina_max_retries": 5}, {}, "unknown setting cloacina_max_retries: did you mean cloacina_"),
        ({}, {"databse_url": "x"}, r"unknown setting databse_url: did you mean database_url\?"),
        ({"cloacina_zzz": 1}, {}, "unknown setting cloacina_zzz: known are auto_create, control"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest_known_one(
    conf: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_mapping(conf, **overrides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", 5), ("auto_create", ["tenant_*"]), ("control_queue", ""), ("control_queue", 1),
        ("max_recoveries", -1), ("max_recoveries", 1.5), ("max_recoveries", True), ("max_recoveries", 2**31),
        ("enable_recovery", "yes"), ("enable_recovery", 1),
        ("lease_ttl", 0), ("lease_ttl", "15"), ("lease_ttl", float("nan")), ("lease_ttl", float("inf")),
        ("heartbeat_interval", 0), ("heartbeat_interval", -1), ("heartbeat_interval", float("nan")),
        ("liveness", "ping"), ("liveness_grace", -1), ("liveness_grace", float("inf")),
        ("poll_interval", 0), ("sweep_interval", 0), ("stranded_after", 0), ("stranded_after", False),
        ("sweep_batch", 0), ("sweep_batch", 1.5), ("pool_size", 0), ("prepared_statements", "off"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_an_error_that_names_the_setting(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"cloacina_{name}"):
        Settings(**{name: value})


def test_a_heartbeat_must_fit_three_times_into_a_lease_and_the_error_says_which_would() -> None:
    assert Settings(lease_ttl=3, heartbeat_interval=1).lease_ttl == 3
    with pytest.raises(
        SettingsError, match=r"cloacina_heartbeat_interval \(5\.0 s\) must fit three"
    ) as error:
        Settings(lease_ttl=14)
    assert "set cloacina_heartbeat_interval to at most 4.66667" in str(error.value)
