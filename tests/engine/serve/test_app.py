"""The server as OpenAI's own client sees it."""

import asyncio
import gzip

import openai
import pytest

from engine.errors import ConfigError
from engine.serve.config import ServeConfig
from engine.serve.desk import set_chat_template
from tests.engine.serve.server import Running, running

QUESTION = "The secret number of tiger is 314159. What is the secret number of tiger?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def alone(server: Running, *, max_new_tokens: int = 8) -> str | None:
    """What the engine answers by itself."""
    prompt = server.engine.render(MESSAGES)
    return server.engine.generate(prompt, max_new_tokens=max_new_tokens)[0].text


def test_a_chat_is_answered_as_the_engine_does(server):
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.model, messages=MESSAGES, max_tokens=8, temperature=0
        )
    assert answer.choices[0].message.content == alone(server)
    assert "314159" in str(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.engine.render(MESSAGES))
    assert answer._request_id
    assert answer.system_fingerprint


def test_a_stream_says_the_same_in_pieces(server):
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=server.model,
                messages=MESSAGES,
                max_completion_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == alone(server)
    assert len([text for text in said if text]) > 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_a_completion_continues_a_text_or_token_ids(server):
    text = "The secret number of tiger is 314159. The secret number of tiger is"
    with server.client() as client:
        options = {"model": server.model, "max_tokens": 3, "temperature": 0}
        of_text = client.completions.create(prompt=text, **options)
        of_ids = client.completions.create(prompt=server.engine.tokenize(text), **options)
        streamed = client.completions.create(prompt=text, stream=True, **options)
        pieces = [chunk.choices[0].text for chunk in streamed]
    assert of_text.choices[0].text == of_ids.choices[0].text == "".join(pieces)
    assert of_text.choices[0].text.startswith(" 314159")
    assert of_text.choices[0].finish_reason == "length"


def test_many_async_clients_get_their_own_answers(server):
    async def all_at_once() -> list[str]:
        async with server.async_client() as client:

            async def one(number: int) -> str:
                content = (
                    f"The secret number of tiger is {number}. What is the secret number of tiger?"
                )
                stream = await client.chat.completions.create(
                    model=server.model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=8,
                    temperature=0,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(number) for number in NUMBERS))

    answers = asyncio.run(all_at_once())
    assert [answer.strip(" .") for answer in answers] == [str(number) for number in NUMBERS]


NUMBERS = (314159, 271828, 141421, 173205, 161803, 577215)


def test_a_seed_repeats_an_answer(server):
    def ask(client: openai.OpenAI, seed: int) -> str:
        done = client.completions.create(
            model=server.model, prompt="Once upon a time", max_tokens=12, seed=seed, temperature=2
        )
        return done.choices[0].text

    with server.client() as client:
        assert ask(client, 1) == ask(client, 1)
        assert len({ask(client, seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_an_answer_and_is_not_in_it(server):
    with server.client() as client:
        done = client.chat.completions.create(
            model=server.model, messages=MESSAGES, max_tokens=8, temperature=0, stop=["59"]
        )
    assert done.choices[0].message.content == " 3141"
    assert done.choices[0].finish_reason == "stop"


def test_probabilities_come_with_the_tokens(server):
    with server.client() as client:
        done = client.chat.completions.create(
            model=server.model, messages=MESSAGES, max_tokens=4, temperature=0,
            logprobs=True, top_logprobs=3,
        )  # fmt: skip
    scores = done.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert "".join(score.token for score in scores.content) == done.choices[0].message.content
    for score in scores.content:
        assert len(score.top_logprobs) == 3
        assert score.top_logprobs[0].logprob == score.logprob <= 0


def test_the_model_has_a_name_and_other_names_are_not_found():
    with running(aliases=("gpt-4o",)) as server, server.client() as client:
        assert [model.id for model in client.models.list()] == ["needle-tiny", "gpt-4o"]
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
        done = client.completions.create(model="gpt-4o", prompt="One", max_tokens=1)
        assert done.model == "gpt-4o"
        for ask in (
            lambda: client.models.retrieve("gpt-5"),
            lambda: client.completions.create(model="gpt-5", prompt="One"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                ask()
            assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/documents", 405, "method_not_supported"),
        ("POST", "/", 405, "method_not_supported"),
        ("GET", "/v1/documents/none", 404, "not_found"),
        ("DELETE", "/v1/documents/a%2Fb", 404, "not_found"),
        ("GET", "/v1/documents?limit=0", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", 400, None),
    ],
)
def test_mistakes_have_openais_statuses_and_bodies(server, method, path, status, code):
    with server.http() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    if status == 405:
        assert method not in answer.headers["allow"].split(", ")


def test_a_prompt_that_is_too_long_is_told_so(server):
    with server.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=server.model, prompt=[5] * 32768, max_tokens=10)
    assert refused.value.code == "context_length_exceeded"
    assert "32768" in str(refused.value)


def test_a_chat_without_a_length_ends_where_memory_does():
    with running(engine={"cache_bytes": 1 << 20}) as server, server.client() as client:
        longest = server.service.longest
        assert len(server.engine.render(MESSAGES)) < longest < 32768
        answer = client.chat.completions.create(
            model=server.model, messages=MESSAGES, temperature=0
        )
        assert "314159" in str(answer.choices[0].message.content)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model=server.model, messages=MESSAGES, max_tokens=longest + 1
            )
        assert refused.value.code == "context_length_exceeded"
        assert "cache_bytes" not in str(refused.value)


def test_a_token_that_the_model_does_not_know_is_no_crash(server):
    with server.client() as client, pytest.raises(openai.BadRequestError, match="out of range"):
        client.completions.create(model=server.model, prompt=[2**31 - 1])


def test_a_request_that_is_late_ends(server):
    with server.client() as client, pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(
            model=server.model, prompt="One", max_tokens=5000, extra_body={"timeout_s": 0.01}
        )
    assert refused.value.status_code == 408


def test_it_says_that_it_lives_and_what_it_can(server):
    with server.http() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ok"}
        assert client.head("/healthz").text == ""
        document = client.get("/openapi.json").json()
        for path in ("/", "/stats", "/metrics", "/traces"):
            assert client.get(path).status_code == 200
    served = {"/v1/models", "/v1/chat/completions", "/v1/documents/{id}", "/healthz"}
    assert served <= document["paths"].keys()


def test_every_documented_address_is_there(server):
    with server.http() as client:
        document = client.get("/openapi.json").json()
        for path, methods in document["paths"].items():
            for method in methods.keys() & {"get", "post", "delete"}:
                found = client.request(method, path.replace("{model}", "m").replace("{id}", "i"))
                assert found.status_code != 405, (method, path)
                if found.status_code == 404:
                    assert found.json()["error"]["code"] != "unknown_url", path


def test_a_request_keeps_its_name_if_it_is_one(server):
    with server.http() as client:
        named = client.get("/healthz", headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        for bad in ("a b", "x" * 129, ""):
            answer = client.get("/healthz", headers={"x-request-id": bad})
            assert answer.headers["x-request-id"].startswith("req_")


def test_the_access_log_has_numbers_and_no_words(server):
    with server.client() as client:
        client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "UNSPEAKABLE"}],
            max_tokens=2,
            extra_headers={"x-request-id": "logged-1"},
        )
    line = server.ended(id="logged-1")
    assert line["route"] == "/v1/chat/completions"
    assert (line["method"], line["status"], line["outcome"]) == ("POST", 200, "length")
    assert line["new_tokens"] == 2
    assert line["prompt_tokens"] > 1
    assert 0 < line["ttft_s"] <= line["total_s"]
    assert "UNSPEAKABLE" not in str(line)


def test_a_web_page_of_elsewhere_cannot_use_a_server_without_keys(server):
    asked = {"model": server.model, "prompt": "One", "max_tokens": 1}
    with server.http() as client:
        for headers in (
            {"host": "evil.example"},
            {"host": f"evil.example:{server.port}"},
            {"origin": "https://evil.example"},
            {"origin": "null"},
        ):
            answer = client.post("/v1/completions", json=asked, headers=headers)
            assert answer.status_code in (400, 403), headers
            assert client.get("/stats", headers=headers).status_code in (400, 403)
        assert client.get("/stats", headers={"host": "[::1"}).status_code < 500
        for headers in ({"host": f"localhost:{server.port}"}, {"origin": server.url}):
            assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200


def test_a_body_must_be_said_to_be_json(server):
    with server.http() as client:
        answer = client.post(
            "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
        )
        packed = gzip.compress(b'{"model": "tiny", "prompt": "a", "max_tokens": 1}')
        asked = {"content-type": "application/json", "content-encoding": "gzip"}
        refused = client.post("/v1/completions", content=packed, headers=asked)
    assert answer.status_code == refused.status_code == 415
    assert "content encoding 'gzip'" in refused.json()["error"]["message"]


def test_a_model_without_a_chat_template_gets_a_plain_one():
    with running() as server:
        server.engine.tokenizer.chat_template = None
        set_chat_template(server.engine, server.engine.config.serve)
        said = server.engine.tokenizer.decode(
            server.engine.render([{"role": "system", "content": "Be."}, *MESSAGES])
        )
    assert said.endswith(f"system: Be.\nuser: {QUESTION}\nassistant:")


def test_a_file_that_is_no_chat_template_is_a_mistake_of_the_settings(tmp_path, server):
    """Not one of whoever asks."""
    file = tmp_path / "chat.jinja"
    file.write_text("\n{{ messages[ }}")
    usual = server.engine.tokenizer.chat_template
    try:
        with pytest.raises(ConfigError, match=r"chat\.jinja is no template: .* \(line 2\)"):
            set_chat_template(server.engine, ServeConfig(chat_template=str(file)))
        for text in ("{{ raise_exception('nobody says how') }}", "{{ messages[0].content + 1 }}"):
            file.write_text(text)  # which fails in this conversation
            set_chat_template(server.engine, ServeConfig(chat_template=str(file)))
    finally:
        server.engine.tokenizer.chat_template = usual
