"""Settings are checked when they are made, and complaints name the setting."""

import os

import msgspec
import pytest

from kvstore.config import StoreConfig
from kvstore.remote.config import RemoteConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"host_bytes": -1}, "host_bytes"),
        ({"disk_bytes": 0}, "disk_bytes"),
        ({"disk_path": ""}, "disk_path"),
        ({"disk_path": "a\0b"}, "disk_path must name a folder"),
        ({"disk_write_bytes_per_s": 0}, "disk_write_bytes_per_s"),
        ({"host_bytes": 0}, "disk_path"),
        ({"policy": "mru"}, "policy is one of lru, fifo"),
        ({"admission": "never"}, "admission is one of always, second-sight"),
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        StoreConfig(**settings)


def test_an_unknown_setting_is_refused():
    with pytest.raises(msgspec.ValidationError, match="host_gib"):
        msgspec.convert({"host_gib": 1}, StoreConfig)
    with pytest.raises(msgspec.ValidationError, match="policy"):
        msgspec.convert({"policy": "mru"}, StoreConfig)


def test_either_tier_may_be_left_out():
    assert StoreConfig().disk_path is None
    assert StoreConfig(host_bytes=0, disk_path="store").host_bytes == 0


@pytest.mark.parametrize("name", ["timeout_s", "connect_timeout_s", "retry_s"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e11, float("inf"), float("nan")])
def test_times_of_a_shared_tier_are_of_this_world(name, seconds):
    with pytest.raises(ValueError, match=f"remote.{name} must be"):
        RemoteConfig(url="redis://here", **{name: seconds})


def test_a_secret_may_be_any_bytes(monkeypatch):
    monkeypatch.setenv("HEADRACE_REMOTE_SECRET", os.fsdecode(b"\xff\xfe" * 20))
    assert RemoteConfig(url="redis://here").secret() == b"\xff\xfe" * 20
