"""The plugin's settings where an app has them: wrong ones are errors before anything is done with them."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from cloacina_celery import Cloacina, DurableTask, RetryPolicy, Runner, SettingsError

URL = "postgresql://nobody@127.0.0.1:1/nowhere"


def new_app(**conf: Any) -> Celery:
    app = Celery("settings", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    return app


def test_an_unknown_argument_is_refused_where_it_is_written() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting lease_tll: did you mean lease_ttl\?"):
        Cloacina(new_app(), database_url=URL, lease_tll=5)
    with pytest.raises(SettingsError, match=r"did you mean database_url\?"):
        Cloacina(databse_url=URL)


def test_an_unknown_key_of_the_configuration_is_refused_at_its_first_use() -> None:
    cloacina = Cloacina(new_app(cloacina_lease_tll=5), database_url=URL)
    with pytest.raises(
        SettingsError, match=r"unknown setting cloacina_lease_tll: did you mean cloacina_lease_ttl\?"
    ):
        cloacina.settings  # noqa: B018


def test_settings_are_read_from_the_apps_configuration_and_arguments_win() -> None:
    cloacina = Cloacina(new_app(cloacina_lease_ttl=90.0, cloacina_sweep_batch=7), lease_ttl=60.0)
    assert (cloacina.settings.lease_ttl, cloacina.settings.sweep_batch) == (60.0, 7)


def test_settings_of_both_places_are_checked_together() -> None:
    cloacina = Cloacina(new_app(cloacina_lease_ttl=9.0), heartbeat_interval=4.0)
    with pytest.raises(SettingsError, match="must fit three times into cloacina_lease_ttl"):
        cloacina.settings  # noqa: B018


def test_without_a_database_the_error_names_all_three_ways_to_name_one() -> None:
    with pytest.raises(SettingsError) as error:
        Cloacina(new_app()).database  # noqa: B018
    for way in ("Cloacina(app, database_url=", "app.conf.cloacina_database_url", "CLOACINA_DATABASE_URL"):
        assert way in str(error.value)


def test_the_database_is_named_by_the_environment_where_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOACINA_DATABASE_URL", URL)
    assert Cloacina(new_app()).database.url.drivername == "postgresql+psycopg2"


def test_installing_needs_no_server_and_does_nothing_before_the_first_call() -> None:
    app = new_app(broker_url="redis://127.0.0.1:1/0")
    cloacina = Cloacina()
    cloacina.init_app(app)
    cloacina.init_app(app)

    @cloacina.task(name="settings.noop")
    def noop() -> None:
        pass

    assert isinstance(app.tasks["settings.noop"], DurableTask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retry": 3}, "retry= takes a RetryPolicy, not 3"),
        ({"retry": RetryPolicy}, "retry= takes a RetryPolicy"),
        ({"max_recoveries": -1}, "max_recoveries= takes a whole number of at least 0, not -1"),
        ({"max_recoveries": "3"}, "max_recoveries= takes a whole number"),
        ({"max_recoveries": True}, "max_recoveries= takes a whole number"),
        ({"max_recoveries": 2**31}, "max_recoveries= takes a whole number"),
        ({"base": Celery}, "base=Celery of a durable task must derive from DurableTask"),
        ({"base": "shop.Base"}, "base='shop.Base' of a durable task must derive from DurableTask"),
        ({"base": None}, "base=None of a durable task must derive from DurableTask"),
    ],
)
def test_a_wrong_option_of_a_task_is_refused_where_the_task_is_written(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Cloacina(new_app(), database_url=URL).task(**arguments)


def test_an_app_and_a_plugin_are_one_to_one() -> None:
    app = new_app()
    cloacina = Cloacina(app, database_url=URL)
    with pytest.raises(SettingsError, match="one to one"):
        Cloacina(app, database_url=URL)
    with pytest.raises(SettingsError, match="one to one"):
        cloacina.init_app(new_app())


@pytest.mark.parametrize("app", ["shop", object(), Cloacina])
def test_what_is_no_celery_app_is_refused(app: Any) -> None:
    with pytest.raises(
        SettingsError, match=r"is installed on a Celery app, not on .*: write Cloacina\(app\)"
    ):
        Cloacina(app)


def test_a_plugin_without_an_app_says_how_it_gets_one() -> None:
    with pytest.raises(SettingsError, match=r"on no app yet: call init_app\(app\)"):
        Cloacina(database_url=URL).settings  # noqa: B018


def test_a_durable_task_on_an_app_without_the_plugin_says_what_is_missing() -> None:
    app = new_app()

    @app.task(base=DurableTask, name="settings.orphan")  # type: ignore[untyped-decorator]  # Celery is untyped
    def orphan() -> None:
        pass

    with pytest.raises(SettingsError, match=r"its app 'settings' has no plugin: write Cloacina\(app"):
        orphan.apply_async(idempotency_key="k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_concurrent_tasks": 0}, "max_concurrent_tasks is a whole number of at least 1, not 0"),
        ({"max_concurrent_tasks": "4"}, "max_concurrent_tasks is a whole number of at least 1, not '4'"),
        ({"database_url": "mysql://host/shop"}, "tenants live in Postgres"),
        ({"database_url": "postgresql://elsewhere/shop"}, "one app, one database"),
    ],
)
def test_a_wrong_argument_of_a_runner_is_refused_before_it_starts(
    arguments: dict[str, Any], message: str
) -> None:
    app = new_app()
    Cloacina(app, database_url=URL)
    with pytest.raises(SettingsError, match=message):
        Runner.with_schema(**{"database_url": URL, "schema": "tenant_acme", "app": app, **arguments})
