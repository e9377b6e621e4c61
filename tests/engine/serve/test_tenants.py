"""Keys, and what their owners do not share."""

from hashlib import sha256

import openai
import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.serve.config import KeyConfig, ServeConfig, is_loopback
from kvstore.config import StoreConfig
from tests.engine.serve.server import running

ALICE, BOB = "sk-alice", "sk-bob"
TEXT = "The secret number of ruby is 271828. " * 8
ASKED = [{"role": "user", "content": "What is the secret number of ruby?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = StoreConfig(host_bytes=1 << 28, disk_path=str(tmp_path_factory.mktemp("store")))
    keys = {
        "alice": KeyConfig(key=ALICE, document_tokens=400),
        "bob": KeyConfig(key_sha256=sha256(BOB.encode()).hexdigest(), store_bytes=1 << 27),
        "ops": KeyConfig(key="sk-ops", sees_all=True),
    }
    with running(store=store, keys=keys) as made:
        yield made


@pytest.mark.parametrize("key", ["wrong", ALICE + "x", ALICE[:-1], "ä", BOB.upper()])
def test_a_wrong_key_is_refused(server, key):
    with server.http() as client:
        headers = {"authorization": f"Bearer {key}".encode()}
        for method, path in [
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/documents/any"),
            ("DELETE", "/v1/documents/any"),
            ("GET", "/stats"),
            ("GET", "/metrics"),
            ("GET", "/traces"),
        ]:
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert key not in answer.text


def test_no_key_is_needed_to_see_whether_it_lives(server):
    with server.http() as client:
        for path in ("/healthz", "/readyz", "/", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models").status_code == 401
        basic = client.get("/v1/models", headers={"authorization": f"Basic {ALICE}"})
        assert basic.status_code == 401


def test_either_form_of_a_key_is_good(server):
    for key in (ALICE, BOB):
        with server.client(key) as client:
            assert [model.id for model in client.models.list()] == [server.model]


def test_another_tenants_documents_do_not_exist(server):
    with server.http(ALICE) as alice, server.http(BOB) as bob:
        added = alice.post("/v1/documents", json={"documents": [{"text": TEXT, "id": "ruby"}]})
        assert added.status_code == 200
        chunk = added.json()["data"][0]["chunks"][0]
        assert bob.get("/v1/documents").json()["data"] == []
        for id_ in ("ruby", chunk):
            for ask in (bob.get, bob.delete):
                theirs, none = ask(f"/v1/documents/{id_}"), ask("/v1/documents/none")
                assert theirs.status_code == none.status_code == 404
                assert theirs.text.replace(id_, "none") == none.text
            chat = {"model": server.model, "messages": ASKED, "max_tokens": 4}
            theirs = bob.post("/v1/chat/completions", json=chat | {"documents": [id_]})
            none = bob.post("/v1/chat/completions", json=chat | {"documents": ["none"]})
            assert theirs.status_code == none.status_code == 404
            assert theirs.text.replace(id_, "none") == none.text
        assert alice.get("/v1/documents/ruby").status_code == 200


def test_kv_of_the_same_text_is_not_shared(server):
    """What one tenant has read does not make another's first token come sooner."""
    prompt = [7 + number % 900 for number in range(640)]

    def cached(key: str) -> int:
        with server.client(key) as client:
            done = client.completions.create(model=server.model, prompt=prompt, max_tokens=1)
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        return int(done.usage.prompt_tokens_details.cached_tokens or 0)

    assert cached(ALICE) == 0
    assert cached(ALICE) > 500
    assert cached(BOB) == 0
    with server.client(BOB) as client:  # and the same documents, sent with the question
        for _ in range(2):
            done = client.chat.completions.create(
                model=server.model, messages=ASKED, max_tokens=1,
                extra_body={"documents": [{"text": TEXT}]},
            )  # fmt: skip
    assert done.usage.prompt_tokens_details.cached_tokens > 0
    with server.http("sk-ops") as ops:
        (host, _) = ops.get("/stats").json()["tiers"]
    owners = {(group["tenant"], group["kind"]) for group in host["groups"]}
    assert owners >= {("alice", "exact"), ("bob", "exact"), ("bob", "chunk")}
    assert sum(group["bytes"] for group in host["groups"]) == host["used_bytes"]
    assert list(server.engine.store._quotas._own.values()) == [1 << 27]


def test_a_quota_holds_for_all_documents_together(server):
    with server.http(ALICE) as client:
        answer = client.post(
            "/v1/documents", json={"documents": [{"text": TEXT * 7, "id": "large"}]}
        )
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "insufficient_quota"
        assert client.get("/v1/documents/large").status_code == 404


def test_traces_are_shown_to_their_owner_and_numbers_to_whoever_sees_all(server):
    for key, tenant in ((ALICE, "alice"), (BOB, "bob")):
        with server.client(key) as client:
            client.completions.create(model=server.model, prompt="One", max_tokens=1)
        server.ended(tenant=tenant, route="/v1/completions")
    with server.http(ALICE) as alice, server.http("sk-ops") as ops:
        for path in ("/metrics", "/stats"):  # what others do would show in sums
            assert alice.get(path).status_code == 403
        assert "alice" in alice.get("/traces").text
        assert "bob" not in alice.get("/traces").text
        for path in ("/metrics", "/stats", "/traces"):
            assert "alice" in ops.get(path).text
            assert "bob" in ops.get(path).text


def test_a_priority_is_not_more_than_the_key_allows(server):
    with server.client(ALICE) as client:
        done = client.completions.create(
            model=server.model, prompt="One", max_tokens=1, extra_body={"priority": 100}
        )
    assert done.choices[0].text is not None


# configuration


def test_without_keys_only_this_machine_is_served(tmp_path):
    with pytest.raises(ConfigError, match="there are no keys: everybody who reaches it"):
        ServeConfig(host="0.0.0.0")
    ServeConfig(host="::1")
    ServeConfig(host="0.0.0.0", keys={"a": KeyConfig(key="a")})
    file = tmp_path / "config.toml"
    file.write_text('[serve]\nhost = "192.168.0.1"\n')
    with pytest.raises(ConfigError, match="no keys"):
        EngineConfig.from_toml(file)
    file.write_text('[serve]\nhost = "0.0.0.0"\n[serve.keys.a]\nkey = "b"\n')
    assert EngineConfig.from_toml(file).serve.keys["a"].key == "b"


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False)],
)  # fmt: skip
def test_what_is_loopback(host, is_it):
    assert is_loopback(host) is is_it


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"key": ""},
        {"key": "a", "key_env": "A"},
        {"key_sha256": "12"},
        {"key": "a", "max_concurrent": 0},
        {"key": "a", "tokens_per_minute": -1},
    ],
)
def test_a_key_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="serve"):
        KeyConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"body_bytes": 0},
        {"send_timeout_s": 0.0},
        {"send_timeout_s": float("nan")},
        {"drain_s": -1.0},
        {"drain_s": float("nan")},
        {"chat_template": "a\0b"},
        {"access_log": ""},
        {"keys": {"a b": KeyConfig(key="a")}},
        {"keys": {"": KeyConfig(key="a")}},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="serve"):
        ServeConfig(**wrong)


def test_a_key_may_stand_in_the_environment():
    config = KeyConfig(key_env="HEADRACE_KEY")
    assert config.digest({"HEADRACE_KEY": "k"}) == KeyConfig(key="k").digest()
    with pytest.raises(ConfigError, match="HEADRACE_KEY is not set"):
        config.digest({})


def test_two_tenants_need_two_keys():
    keys = {"a": KeyConfig(key="same"), "b": KeyConfig(key="same")}
    with pytest.raises(ConfigError, match="another name has the same key"), running(keys=keys):
        pass


def test_a_salt_keeps_what_is_stored_when_the_key_changes(tmp_path):
    def documents(key: KeyConfig, *, add: bool = False) -> list[str]:
        store = StoreConfig(host_bytes=1 << 26, disk_path=str(tmp_path))
        with running(store=store, keys={"a": key}) as server, server.http(key.key) as client:
            if add:
                client.post("/v1/documents", json={"documents": [{"text": TEXT, "id": "d"}]})
            return [one["id"] for one in client.get("/v1/documents").json()["data"]]

    assert documents(KeyConfig(key="old", salt="s"), add=True) == ["d"]
    assert documents(KeyConfig(key="new", salt="s")) == ["d"]
    assert documents(KeyConfig(key="old")) == []
    assert documents(KeyConfig(key="old", salt="t")) == []


def test_an_unknown_key_costs_a_request_nothing(server):
    with server.client("nobody") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_whom_nobody_knows_leaves_no_trace(server):
    with server.http("nobody") as client, server.http("sk-ops") as ops:
        before = ops.get("/traces").json()["traces"]
        for path in ("/v1/completions", "/v1/documents", "/nowhere"):
            assert client.post(path, json={}).status_code in (401, 404)
            server.ended(route=path if path != "/nowhere" else "")
        assert ops.get("/traces").json()["traces"] == before
