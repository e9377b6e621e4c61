"""The engine as its users see it."""

import threading

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import AutoModelForCausalLM

from engine import Engine, EngineConfig, PromptError
from engine.blend.segments import ids_of
from engine.errors import ConfigError, EngineError, ModelError
from engine.request import listed
from kvstore.config import StoreConfig
from kvstore.errors import StoreError
from tests.engine import oracle
from tests.engine.families import build, prompt
from tests.engine.reader import settings
from tests.kvstore.stored import values_file

BIG = StoreConfig(host_bytes=1 << 26)


@pytest.fixture(scope="module")
def module():
    return build("llama")


@pytest.fixture
def engine(module):
    with Engine(module, config=EngineConfig(block_tokens=16, store=BIG)) as engine:
        yield engine


def tokens(engine, *prompts, **settings):
    return [c.tokens for c in engine.generate([p.tolist() for p in prompts], **settings)]


def test_logits_are_those_of_transformers_at_every_position(engine, module):
    text = prompt(150)
    want = oracle.logits(module, text)
    torch.testing.assert_close(engine.logits(text), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(engine.logits(text.tolist()), want, rtol=0, atol=1e-4)


def test_a_batch_answers_as_each_prompt_alone(engine, module):
    asked = [prompt(n) for n in (3, 90, 40)]
    together = tokens(engine, *asked, max_new_tokens=30)
    with Engine(module) as fresh:
        for one, got in zip(asked, together):
            oracle.assert_same_answer(module, one, got, tokens(fresh, one, max_new_tokens=30)[0])


def test_a_budget_for_one_request_at_a_time_changes_no_token(module):
    asked = [prompt(n) for n in (20, 70, 33)]
    one = EngineConfig(cache_bytes=80 * 3 * 2 * 2 * 64 * 4, block_tokens=16, store=BIG)
    with Engine(module, config=one) as small, Engine(module) as large:
        assert [len(group) for group in small.memory.groups(running(small, asked))] == [1, 1, 1]
        assert tokens(small, *asked, max_new_tokens=9) == tokens(large, *asked, max_new_tokens=9)
        with pytest.raises(PromptError, match="cache_bytes"):
            small.generate([prompt(90).tolist()], max_new_tokens=9)


def running(engine, prompts):
    from engine.sampling import Sampling

    return [engine.accept(p.tolist(), 9, Sampling()) for p in prompts]


def test_generated_tokens_are_reused_too(engine, module):
    first = prompt(50)
    (answer,) = tokens(engine, first, max_new_tokens=40)
    again = torch.tensor([*first.tolist(), *answer, 5])
    (done,) = engine.generate([again.tolist()], max_new_tokens=8)
    assert done.stats.cached_tokens == 80  # of 91: all whole blocks whose KV was computed
    with Engine(module) as fresh:
        oracle.assert_same_answer(
            module, again, done.tokens, tokens(fresh, again, max_new_tokens=8)[0]
        )


def test_the_whole_prompt_stored_still_leaves_a_token_to_compute(engine):
    text = prompt(64).tolist()
    first = engine.generate([text], max_new_tokens=3)[0]
    again = engine.generate([text], max_new_tokens=3)[0]
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 48)
    assert first.tokens == again.tokens


def test_what_came_from_disk_is_in_memory_afterwards(module, tmp_path):
    store = StoreConfig(host_bytes=1 << 26, disk_path=str(tmp_path / "s"), disk_bytes=1 << 26)
    config = EngineConfig(block_tokens=16, store=store)
    with Engine(module, config=config) as engine:
        engine.generate(prompt(100).tolist(), max_new_tokens=2)
    with Engine(module, config=config) as engine:
        reads = []
        for _ in range(2):
            done = engine.generate(prompt(100).tolist(), max_new_tokens=2)[0]
            assert done.stats.cached_tokens == 96
            reads.append(engine.stats().tiers["host"].reads)
        assert reads[0] == 0
        assert reads[1] >= 6


def test_a_lost_block_is_computed_again(engine, module, monkeypatch):
    """A block that was looked up but cannot be read costs time, not truth."""
    text = prompt(100)
    want = tokens(engine, text, max_new_tokens=12)
    read_many, lost = engine.store.read_many, []

    def lose_once(keys, layers, out):
        found = read_many(keys, layers, out)
        if not lost and layers.stop == 3:
            lost.append(keys[2])
            found[2] = None
        return found

    monkeypatch.setattr(engine.store, "read_many", lose_once)
    assert tokens(engine, text, max_new_tokens=12) == want
    assert lost
    monkeypatch.setattr(engine.store, "read_many", lambda keys, *_: [None] * len(keys))
    done = engine.generate([text.tolist()], max_new_tokens=12)[0]
    assert (done.tokens, done.stats.cached_tokens) == (want[0], 0)


def test_a_flipped_byte_on_disk_is_a_miss_and_the_answer_stays(module, tmp_path):
    text = prompt(120)
    with Engine(module, config=settings(tmp_path / "store")) as engine:
        want = tokens(engine, text, max_new_tokens=10)
    data = values_file(tmp_path / "store")
    raw = bytearray(data.read_bytes())
    keys = engine.plain.keys(text.tolist())
    for offset in range(raw.index(keys[3].digest), len(raw) - 1, 1 << 14):
        raw[offset] ^= 1
    data.write_bytes(raw)
    with Engine(module, config=settings(tmp_path / "store")) as engine:
        done = engine.generate([text.tolist()], max_new_tokens=10)[0]
        assert done.tokens == want[0]
        assert done.stats.cached_tokens < 112
        assert engine.stats().tiers["disk"].corrupt > 0


def test_two_threads_get_what_each_would_get_alone(engine, module):
    """From an empty store on, and one prompt is the start of the other."""
    asked = [prompt(150, seed=1), prompt(150, seed=1)[:90]]
    with Engine(module) as alone:
        want = [tokens(alone, one, max_new_tokens=25) for one in asked]
    got: dict[int, list] = {}

    def work(i):
        got[i] = [tokens(engine, asked[i], max_new_tokens=25) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [want[i]] * 3 for i in range(2)}


def test_a_stream_is_the_answer_in_steps_and_closing_it_frees_the_cache(engine):
    text = prompt(40).tolist()
    want = engine.generate([text], max_new_tokens=12)[0]
    events = list(engine.stream(text, max_new_tokens=12))
    assert [e.token for e in events] == want.tokens
    assert [e.completion is None for e in events] == [True] * 11 + [False]
    assert events[-1].completion.finish_reason == "length"
    stream = engine.stream(text, max_new_tokens=500)
    next(stream)
    stream.close()
    assert not engine.store._pins


def test_eos_ends_an_answer_and_is_its_last_token(module):
    with Engine(module) as engine:
        plain = tokens(engine, prompt(30), max_new_tokens=20)[0]
        at = next(i for i in range(3, 20) if plain[i] not in plain[:i])
    module.generation_config.eos_token_id = [plain[at], 10_000]
    try:
        with Engine(module) as engine:
            done = engine.generate([prompt(30).tolist()], max_new_tokens=20)[0]
    finally:
        module.generation_config.eos_token_id = None
    assert (done.tokens, done.finish_reason) == (plain[: at + 1], "stop")


def test_an_answer_ends_at_the_models_last_position(engine, module):
    limit = module.config.max_position_embeddings
    done = engine.generate([prompt(limit - 3).tolist()], max_new_tokens=50)[0]
    assert (len(done.tokens), done.finish_reason) == (4, "length")


def test_one_tenant_never_gets_what_another_stored(module, tmp_path):
    text = prompt(60).tolist()
    cached = {}
    for tenant in ("alice", "bob", "alice"):
        config = EngineConfig(
            block_tokens=16,
            tenant=tenant,
            store=StoreConfig(host_bytes=0, disk_path=str(tmp_path / "s"), disk_bytes=1 << 26),
        )
        with Engine(module, config=config) as engine:
            done = engine.generate([text], max_new_tokens=2)[0]
            cached.setdefault(tenant, []).append(done.stats.cached_tokens)
    assert cached == {"alice": [0, 48], "bob": [0]}


def test_changed_weights_or_dtype_never_get_what_was_stored(tmp_path):
    cached = []
    for change in ("", "weight", "dtype"):
        module = build("llama", dtype=torch.bfloat16 if change == "dtype" else torch.float32)
        if change == "weight":
            module.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
        with Engine(module, config=settings(tmp_path / "store")) as engine:
            done = engine.generate([prompt(60).tolist()], max_new_tokens=2)[0]
            cached.append(done.stats.cached_tokens)
    assert cached == [0, 0, 0]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ([[]], "empty"),
        ([[1, 211]], "211 is out of range"),
        ([[-1]], "-1 is out of range"),
        ([[5] * 1025], "1025 tokens, the model 1024 positions"),
        (["text"], "no tokenizer"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(engine, asked, what):
    with pytest.raises(PromptError, match=what):
        engine.generate(asked)


def test_bad_settings_of_a_request_are_refused(engine):
    with pytest.raises(PromptError, match="max_new_tokens"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(PromptError, match="stop strings need a tokenizer"):
        engine.generate([[1]], stop="x")
    with pytest.raises(PromptError, match="chat template"):
        engine.render([{"role": "user", "content": "hello"}])


def test_a_tier_smaller_than_one_block_is_refused(module, tmp_path):
    tiny = StoreConfig(host_bytes=1000)
    with pytest.raises(ConfigError, match=r"store\.host_bytes is 1000.*block_tokens"):
        Engine(module, config=EngineConfig(store=tiny))
    block = 64 * 3 * 2 * 2 * 64 * 4  # fits, but not with what the tier keeps beside it
    disk = StoreConfig(host_bytes=0, disk_path=str(tmp_path / "s"), disk_bytes=block)
    with pytest.raises(ConfigError, match=r"store\.disk_bytes"):
        Engine(module, config=EngineConfig(store=disk))


def test_a_batch_that_cannot_run_whole_does_not_run_at_all(module):
    room = EngineConfig(cache_bytes=100 * 3 * 2 * 2 * 64 * 4, block_tokens=16, store=BIG)
    with Engine(module, config=room) as engine:
        with pytest.raises(PromptError, match="cache_bytes"):
            engine.generate([prompt(40).tolist(), prompt(200).tolist()], max_new_tokens=4)
        assert engine.stats().tiers["host"].blocks == 0


def test_arrays_are_prompts_and_mixtures_are_refused(engine):
    want = engine.generate([5, 6, 7], max_new_tokens=3)[0].tokens
    assert engine.generate(torch.tensor([5, 6, 7]), max_new_tokens=3)[0].tokens == want
    assert engine.generate([torch.tensor([5, 6, 7]).tolist()], max_new_tokens=3)[0].tokens == want
    for bad in ([[1.7, 2.2]], [[5, "hello"]]):
        with pytest.raises((PromptError, TypeCheckError)):
            engine.generate(bad)
    with pytest.raises(PromptError, match="mixes"):
        listed([5, "hello", 7])
    with pytest.raises((PromptError, TypeCheckError)):
        ids_of([1.7])


def test_a_closed_engine_says_so(module):
    engine = Engine(module)
    engine.close()
    for call in (engine.generate, engine.stream, engine.logits):
        with pytest.raises(EngineError, match="closed"):
            call([1, 2, 3])


@pytest.mark.parametrize("after", [1, 7, 8])
def test_a_stream_says_that_its_engine_was_closed(module, tmp_path, after):
    store = StoreConfig(disk_path=str(tmp_path))
    with Engine(module, config=EngineConfig(store=store)) as engine:
        stream = engine.stream(prompt(100).tolist(), max_new_tokens=8)
        for _ in range(after):
            next(stream)
    if after < 8:
        with pytest.raises(EngineError, match="closed"):
            next(stream)
    stream.close()


def test_an_error_inside_is_not_hidden_by_one_at_the_end(module, monkeypatch, caplog):
    engine = Engine(module)
    monkeypatch.setattr(engine.store, "close", lambda: (_ for _ in ()).throw(StoreError("full")))
    with pytest.raises(KeyboardInterrupt), engine:
        raise KeyboardInterrupt
    assert "full" in caplog.text
    with pytest.raises(StoreError), engine:
        pass


def test_logits_that_are_not_finite_are_no_answer(module):
    with Engine(build("llama")) as engine:
        engine.model.module.lm_head.weight.data[3] = torch.nan
        with pytest.raises(ModelError, match="not finite"):
            engine.generate([1, 2, 3])


def test_adapters_are_refused():
    module = build("llama")
    module.peft_config = {"default": None}
    with pytest.raises(ModelError, match="adapters"):
        Engine(module)


def test_one_prompt_is_a_batch_of_one_and_none_is_none(engine):
    assert tokens(engine, prompt(9), max_new_tokens=2) == [
        engine.generate(prompt(9).tolist(), max_new_tokens=2)[0].tokens
    ]
    assert engine.generate([]) == []


def test_a_module_is_taken_as_it_is(module):
    with Engine.from_pretrained(module) as engine:
        assert engine.model.module is module
        assert engine.generate([[3, 4]], max_new_tokens=2)[0].text is None


def test_a_module_on_several_devices_or_quantized_is_refused_by_name():
    spread = build("llama")
    spread.lm_head.to("meta")
    with pytest.raises(ModelError, match="several devices"):
        Engine(spread)
    module = build("llama")
    module.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match=r"quantized checkpoints \(gptq\)"):
        Engine(module)


def test_an_engine_in_bf16_agrees_with_transformers_within_its_noise(tmp_path):
    """At most twice the error that torch itself makes in bf16 against fp32."""
    exact, narrow = build("llama"), build("llama", dtype=torch.bfloat16)
    text = prompt(200)
    want = oracle.logits(exact, text)
    theirs = (oracle.logits(narrow, text).float() - want).abs().max()
    with Engine(narrow) as engine:
        ours = (engine.logits(text).float() - want).abs().max()
    assert ours <= 2 * theirs


def test_sharded_checkpoints_load(tmp_path, module):
    module.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with Engine.from_pretrained(tmp_path / "model") as engine:
        got = engine.generate([prompt(20).tolist()], max_new_tokens=5)[0].tokens
    assert got == oracle.generate(again, [prompt(20)], 5)[0]
