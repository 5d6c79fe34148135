"""API keys from a file that changes, and from the environment."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import pytest

from waiting import run, until
from wisp.api import keys as module
from wisp.api.keys import ANONYMOUS, Keyring, on_behalf
from wisp.core.errors import ConfigError, RequestError
from wisp.core.verify.admission import KeyLimits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def refused(ring: Keyring, header: str | None) -> RequestError:
    with pytest.raises(RequestError) as error:
        ring.authorize(header)
    assert error.value.status == 401
    return error.value


def test_without_keys_everyone_is_anonymous() -> None:
    assert Keyring().authorize(None) == ANONYMOUS
    assert not Keyring()


def test_secrets_and_digests_name_their_key(path: Path) -> None:
    digest = hashlib.sha256(b"hidden").hexdigest().upper()
    path.write_text(f'[keys.a]\nsecret = "open"\nsessions = 3\n[keys.b]\nsha256 = "{digest}"\n')
    ring = Keyring(path, "fixed")
    assert [ring.authorize(f"{scheme} {s}") for scheme, s in (("Bearer", "open"), ("bearer", "hidden"))] == [
        "a",
        "b",
    ]
    assert ring.authorize("Bearer fixed") == "default"
    assert ring.limits == {"a": KeyLimits(sessions=3), "b": KeyLimits()}
    for header in (None, "", "Bearer", "Bearer ", "Basic open", "open", "Bearer OPEN", f"Bearer {digest}"):
        assert "open" not in str(refused(ring, header))


def test_the_environment_may_hold_several_keys_apart_from_each_other() -> None:
    ring = Keyring(None, " one,two ,,one,three")
    names = [ring.authorize(f"Bearer {secret}") for secret in ("one", "two", "three")]
    assert names == ["default", "default-2", "default-3"]
    assert all(ring.is_admin(name) for name in names)
    for header in ("Bearer one,two", "Bearer ,", "Bearer  "):
        refused(ring, header)
    assert not Keyring(None, " ,")


def test_an_empty_file_lets_nobody_in(path: Path) -> None:
    path.write_text("[keys]\n")
    ring = Keyring(path)
    assert ring
    refused(ring, "Bearer x")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "expected tables"),
        ("[keys.a]\n", r"\[keys.a\] needs a secret"),
        ('[keys.a]\nsha256 = "short"\n', "64 hexadecimal digits"),
        (f'[keys.a]\nsha256 = "{"é" * 64}"\n', "64 hexadecimal digits"),
        (f'[keys.a]\nsha256 = "{"g" * 64}"\n', "64 hexadecimal digits"),
        (f'[keys.a]\nsecret = "x"\nsha256 = "{"0" * 64}"\n', "a secret or a sha256"),
        ('[keys.a]\nsecret = "pässword"\n', "ASCII"),
        ('[keys.a]\nsecret = " x"\n', "white space"),
        ('[keys."a\\nb"]\nsecret = "x"\n', "no name for a key"),
        ('[keys.a]\nsecret = "x"\n[keys.b]\nsecret = "x"\n', r"\[keys.b\].* of its own"),
        ('[keys.a]\nsecret = "x"\nlimit = 3\n', "limit"),
        ("[keys", "cannot read"),
    ],
)
def test_a_bad_file_is_explained_and_leaves_the_old_keys(path: Path, text: str, advice: str) -> None:
    path.write_text('[keys.a]\nsecret = "good"\n')
    ring = Keyring(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=advice):
        ring.reload()
    assert ring.authorize("Bearer good") == "a"
    with pytest.raises(ConfigError, match=advice):
        Keyring(path)


def test_a_changed_file_is_taken_up_and_trouble_is_logged_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    caplog.set_level(logging.INFO, "wisp.keys")
    path.write_text('[keys.a]\nsecret = "old"\n')
    ring = Keyring(path)
    changes: list[int] = []
    looks: list[int] = []
    reload = ring.reload

    def counted() -> bool:
        looks.append(1)
        return reload()

    monkeypatch.setattr(ring, "reload", counted)

    def write(text: str) -> None:
        path.write_text(text)

    async def scenario() -> None:
        watch = asyncio.create_task(ring.watch(lambda: changes.append(1)))
        write("broken [")
        await until(lambda: "stay in force" in caplog.text)
        looks.clear()
        await until(lambda: len(looks) > 3)
        assert caplog.text.count("stay in force") == 1
        assert ring.authorize("Bearer old") == "a"
        write('[keys.a]\nsecret = "newer"\n')
        await until(lambda: "read again" in caplog.text)
        watch.cancel()

    run(scenario())
    assert changes == [1]
    refused(ring, "Bearer old")
    assert ring.authorize("Bearer newer") == "a"


def test_a_front_speaks_for_keys_by_its_token_and_nobody_else_does(path: Path) -> None:
    path.write_text('[keys."älice/1"]\nsecret = "open"\n')
    ring = Keyring(path, router="token")
    shown = on_behalf("token", "älice/1")
    assert shown.isascii()
    assert ring.authorize(f"Bearer {shown}") == ring.speaks_for(f"Bearer {shown}") == "älice/1"
    assert ring.authorize("Bearer open") == "älice/1"
    for header in (None, "", "Bearer open", "Bearer /x", "Bearer tok/x", "Bearer token2/x"):
        assert ring.speaks_for(header) is None
    refused(ring, f"Bearer {on_behalf('tokem', 'älice/1')}")
    for other in (Keyring(path), Keyring(path, "fixed")):
        assert other.speaks_for(f"Bearer {on_behalf('', 'x')}") is None
        refused(other, f"Bearer {shown}")
        refused(other, "Bearer /x")


def test_only_admin_keys_manage_replicas(path: Path) -> None:
    path.write_text(
        '[keys.a]\nsecret = "1"\nadmin = true\n[keys.b]\nsecret = "2"\n[keys.default]\nsecret = "3"\n'
    )
    ring = Keyring(path)
    assert [ring.is_admin(name) for name in ("a", "b", "default", ANONYMOUS)] == [True, False, False, False]
    assert Keyring(None, "secret").is_admin("default")
    assert Keyring().is_admin(ANONYMOUS)


def test_a_secret_that_no_header_can_carry_is_refused_at_start() -> None:
    for secrets in ("pässword", "good,b\udcffd"):
        with pytest.raises(ConfigError, match="ASCII"):
            Keyring(secrets=secrets)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "{b = " * 3000, "a = " + "9" * 5000, "a = '\x00'"]
)
def test_a_file_that_no_parser_takes_keeps_the_old_keys(path: Path, text: str) -> None:
    path.write_text('[keys.a]\nsecret = "open"\n')
    ring = Keyring(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        ring.reload()
    assert ring.authorize("Bearer open") == "a"
