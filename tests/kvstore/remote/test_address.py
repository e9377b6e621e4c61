"""URLs as people write them, and complaints that do not tell their passwords."""

import pytest

from kvstore.errors import StoreError
from kvstore.remote.address import Address, parse_url
from kvstore.remote.config import RemoteConfig


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", Address("host", 6379)),
        ("redis://host:7000/3", Address("host", 7000, db=3)),
        ("redis://[::1]:7000", Address("::1", 7000)),
        ("redis://:p%40ss@host", Address("host", 6379, password="p@ss")),
        ("rediss://me:pass@host/", Address("host", 6379, True, user="me", password="pass")),
        ("unix:///run/redis.sock", Address("/run/redis.sock", None)),
        ("unix://:pass@/run/r%20s?db=2", Address("/run/r s", None, db=2, password="pass")),
    ],
)
def test_a_url_names_a_server(url, address):
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "", "host:6379", "http://host", "redis://", "redis://host:port", "redis://host:99999",
        "redis://host/db", "redis://host/-1", "redis://host?db=1", "redis://user@host", "unix://",
        "unix://run/redis", "unix:///run/redis?database=1", "unix:///run/redis?db=x",
        "redis://[::1", "redis://:secret@host:x",
    ],
)  # fmt: skip
def test_another_url_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match=r"url must be redis://HOST.*: \w") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


def test_a_password_is_not_shown():
    config = RemoteConfig(url="redis://me:hush@host:7000")
    assert "hush" not in repr(config)
    assert "host:7000" in repr(config)
    assert "hush" not in repr(parse_url(config.url))
    assert "hush" not in str(parse_url(config.url))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ttl_s": 0}, "remote.ttl_s must be positive, got 0"),
        ({"timeout_s": -1.0}, "remote.timeout_s"),
        ({"timeout_s": float("nan")}, "remote.timeout_s"),
        ({"connect_timeout_s": 0.0}, "remote.connect_timeout_s"),
        ({"retry_s": 0.0}, "remote.retry_s"),
        ({"queue_bytes": 0}, "remote.queue_bytes"),
        ({"namespace": "a{b"}, "remote.namespace must be without braces"),
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        RemoteConfig(url="redis://host", **settings)


def test_the_secret_comes_from_the_environment_and_must_be_long(monkeypatch):
    config = RemoteConfig(url="redis://host", secret_env="SECRET_OF_TEST")
    for weak in (None, "", "short"):
        monkeypatch.delenv("SECRET_OF_TEST", raising=False)
        if weak is not None:
            monkeypatch.setenv("SECRET_OF_TEST", weak)
        with pytest.raises(StoreError, match=r"SECRET_OF_TEST.*token_hex") as caught:
            config.secret()
        assert "short" not in str(caught.value)
    monkeypatch.setenv("SECRET_OF_TEST", "sixteen bytes ok")
    assert config.secret() == b"sixteen bytes ok"
