"""The packaged app: all of its configuration is in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloacina_celery import SettingsError, devservers, packaged
from tests.support.processes import Processes

DATABASE = "postgresql://db.example.org/shop"
BROKER = "redis://broker.example.org/0"


def test_an_empty_environment_asks_for_the_embedded_servers() -> None:
    nothing = packaged.Environment(database_url=None, database_url_file=None, broker_url=None, imports=())

    assert packaged.Environment.of({}) == nothing
    assert packaged.Environment.of({"CLOACINA_DATABASE_URL": "", "CLOACINA_BROKER_URL": ""}) == nothing


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"CLOACINA_DATABASE_URL": DATABASE}, "CLOACINA_BROKER_URL"),
        ({"CLOACINA_BROKER_URL": BROKER}, "CLOACINA_DATABASE_URL"),
    ],
)
def test_one_url_without_the_other_is_an_error_that_names_the_other(
    variables: dict[str, str], missing: str
) -> None:
    with pytest.raises(SettingsError, match=f"and {missing} is not: set both"):
        packaged.Environment.of(variables)


def test_a_database_whose_url_stands_in_a_file_is_one_that_is_given() -> None:
    found = packaged.Environment.of({"CLOACINA_DATABASE_URL_FILE": "/run/url", "CLOACINA_BROKER_URL": BROKER})
    assert (found.database_url, found.database_url_file) == (None, "/run/url")
    with pytest.raises(SettingsError, match="CLOACINA_BROKER_URL is not: set both"):
        packaged.Environment.of({"CLOACINA_DATABASE_URL_FILE": "/run/url"})


def test_imports_are_separated_by_commas() -> None:
    assert packaged.Environment.of({"CLOACINA_IMPORTS": "shop.orders, shop.mails,"}).imports == (
        "shop.orders",
        "shop.mails",
    )


@pytest.mark.parametrize("name", ["shop/orders.py", "shop.orders shop.mails", ".shop"])
def test_what_can_be_no_module_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match="CLOACINA_IMPORTS names"):
        packaged.Environment.of({"CLOACINA_IMPORTS": name})


def test_the_app_takes_json_alone_and_needs_no_server_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOACINA_DATABASE_URL", DATABASE)
    monkeypatch.setenv("CLOACINA_BROKER_URL", BROKER)
    monkeypatch.setenv("CLOACINA_IMPORTS", "examples.shop.tasks")

    app, cloacina = packaged.build()

    assert app.main == "cloacina_celery"
    assert app.conf.broker_url == BROKER
    assert app.conf.accept_content == ["json"]
    assert app.conf.broker_transport_options == {"priority_steps": [0]}
    assert app.conf.imports == ("examples.shop.tasks",)
    assert cloacina.app is app
    assert cloacina.settings.auto_create == "*"
    assert cloacina.settings.database_url == DATABASE


def test_without_urls_it_brings_its_own_servers_and_says_so_in_one_line(
    processes: Processes, tmp_path: Path
) -> None:
    folder = tmp_path / "servers"
    environment = {
        "CLOACINA_DEV_DIR": str(folder),
        "CLOACINA_DATABASE_URL": None,
        "CLOACINA_BROKER_URL": None,
    }
    try:
        created = processes.cli(
            "cloacina", "tenant", "create", "tenant_acme", app="cloacina_celery", env=environment
        )
        listed = processes.cli("cloacina", "tenant", "list", app="cloacina_celery", env=environment)
    finally:
        devservers.stop(folder)

    assert (created.returncode, listed.returncode) == (0, 0)
    assert "tenant_acme" in listed.stdout
    (announced,) = (line for line in listed.stderr.splitlines() if "embedded" in line)
    assert str(folder) in announced
    assert announced.endswith("for production set CLOACINA_DATABASE_URL and CLOACINA_BROKER_URL")
