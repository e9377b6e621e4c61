"""A LoRA adapter answers as PEFT does, and shares KV with nobody."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import Engine
from engine.cli import main
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.adapter import CONFIG, WEIGHTS
from kvstore.block import BlockKey
from kvstore.config import StoreConfig
from tests.engine import oracle
from tests.engine.families import build, prompt

pytestmark = pytest.mark.filterwarnings(  # of PEFT: its use of transformers; a head that was tied
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*tie_word_embeddings:UserWarning"
)
PROMPT = prompt(40)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 24}}
KINDS = {
    "plain": ("llama", dict(r=4, lora_alpha=8, target_modules=ATTENTION)),
    "patterns": ("llama", dict(r=4, lora_alpha=6, target_modules=ATTENTION, **PATTERNS)),
    "rslora": ("qwen3", dict(r=4, use_rslora=True, target_modules=["k_proj", "down_proj"])),
    "dora": ("llama-bias", dict(r=4, use_dora=True, target_modules=[*ATTENTION, "up_proj"])),
    "fused": ("phi3-partial", dict(r=4, target_modules=["qkv_proj", "gate_up_proj"])),
    "all": ("gemma2", dict(r=4, target_modules="all-linear")),
    "some-layers": ("olmo2", dict(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2])),
    "shared-kv": ("gemma3n", dict(r=4, target_modules=["q_proj", "k_proj", "linear_left"])),
    "tied-head": ("gemma3", dict(r=4, target_modules=["v_proj", "lm_head"])),
}


def save_adapter(base, folder, seed, *, dtype=None, config=None, embeddings=False, **settings):
    """An adapter with random weights of a size that changes every answer."""
    torch.manual_seed(seed)
    made = config or LoraConfig(**settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
            elif "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.rand_like(weight))
    model.to(dtype).save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of saved models, by family."""
    saved = {}

    def base(family):
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp("base") / family
            build(family).save_pretrained(saved[family])
        return saved[family]

    return base


@pytest.fixture(scope="module")
def llama(bases):
    return bases("llama")


@pytest.fixture(scope="module")
def two(llama, tmp_path_factory):
    """Two adapters of the same kind, with other weights."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = KINDS["plain"][1]
    return [save_adapter(llama, folder / str(seed), seed, **settings) for seed in (1, 2)]


@pytest.fixture
def adapter(two, tmp_path):
    return shutil.copytree(two[0], tmp_path / "adapter")


def peft(base, adapter, dtype=torch.float32):
    """By its eager attention: with SDPA, transformers 5.17 leaves out a cap of scores."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter).eval()


def answer(engine, tokens=PROMPT, count=8):
    return engine.generate([tokens.tolist()], max_new_tokens=count)[0]


def own_keys(engine):
    owner = dict(identity=engine.identity, tenant=engine.config.tenant.encode())
    return {key.digest for key in BlockKey.chain(PROMPT.tolist(), size=8, **owner)}


def edit(adapter, **changes):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def refuse(base, adapter, match):
    with pytest.raises(ModelError, match=match) as caught:
        Engine.from_pretrained(base, adapter=adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logits_equal_pefts(kind, bases, tmp_path):
    family, settings = KINDS[kind]
    base = bases(family)
    save_adapter(base, tmp_path / "a", 5, **settings)
    theirs = peft(base, tmp_path / "a")
    [expected] = oracle.generate(theirs, [PROMPT], 8)
    with Engine.from_pretrained(base, adapter=tmp_path / "a") as engine:
        oracle.assert_same_answer(theirs, PROMPT, answer(engine).tokens, expected)
        wanted = oracle.logits(theirs, PROMPT)
        torch.testing.assert_close(engine.logits(PROMPT), wanted, rtol=1e-4, atol=1e-3)
    with Engine.from_pretrained(base) as plain:
        assert (plain.logits(PROMPT) - wanted).abs().max() > 0.5, "the adapter changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_and_their_model_share_no_kv(llama, two, dtype, tmp_path):
    """One folder on disk for three engines, one after the other, and all again."""
    store = StoreConfig(disk_path=str(tmp_path / "kv"))
    config = EngineConfig(block_tokens=8, store=store)
    keys, answers, again = [], [], []
    for adapter in (None, *two):
        with Engine.from_pretrained(llama, config, adapter=adapter, dtype=dtype) as engine:
            keys.append(own_keys(engine))
            answers.append(answer(engine))
            weights = engine.identity.weights
    for adapter in (None, *two):
        with Engine.from_pretrained(llama, config, adapter=adapter, dtype=dtype) as engine:
            again.append(answer(engine))
            assert engine.identity.weights == weights, "those of the model, without adapters"
            blocks = engine.stats().tiers["disk"].blocks
    assert all(found.stats.cached_tokens == 0 for found in answers)
    assert all(found.stats.cached_tokens == 32 for found in again)
    assert [found.tokens for found in again] == [found.tokens for found in answers]
    assert len(set().union(*keys)) == 3 * len(keys[0])
    assert blocks == 3 * ((len(PROMPT) + 7) // 8)
    noise = oracle.TOLERANCE if dtype == torch.float32 else 0.05
    for adapter, found in zip(two, answers[1:]):
        theirs = peft(llama, adapter, dtype)
        [expected] = oracle.generate(theirs, [PROMPT], 8)
        oracle.assert_same_answer(theirs, PROMPT, found.tokens, expected, tie=noise)
        assert found.tokens != answers[0].tokens


def test_the_same_adapter_in_another_folder_is_the_same(llama, two, adapter):
    digests = []
    for folder in (two[0], adapter):
        with Engine.from_pretrained(llama, adapter=folder) as engine:
            digests.append(engine.identity.digest)
    edit(adapter, lora_alpha=9)
    with Engine.from_pretrained(llama, adapter=adapter) as engine:
        assert digests[0] == digests[1] != engine.identity.digest


def test_weights_in_another_dtype_are_widened_before_they_are_merged(llama, tmp_path):
    folder = save_adapter(llama, tmp_path / "a", 3, dtype=torch.bfloat16, **KINDS["plain"][1])
    wanted = oracle.logits(peft(llama, folder), PROMPT)
    with Engine.from_pretrained(llama, adapter=folder) as engine:
        torch.testing.assert_close(engine.logits(PROMPT), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bias": "all"}, "not supported: bias = all"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]; merge it"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying = True"),
        ({"a_setting_to_come": 1}, "a_setting_to_come = 1"),
        ({"peft_type": "IA3"}, "IA3 adapter: only LORA"),
        ({"r": "four"}, "cannot read .*adapter_config.json"),
        ({"r": 8}, r"k_proj.lora_A.weight is \[4, 96\].* \(rank 8\) need \[8, 96\]"),
        ({"use_dora": True}, "lacks lora_magnitude_vector of model.layers.0"),
        ({"target_modules": ["q_proj", "up_proj"]}, "lacks the tensors of up_proj"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(llama, adapter, changes, match):
    edit(adapter, **changes)
    refuse(llama, adapter, match)


def test_another_kind_of_adapter(llama, tmp_path):
    kind = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    refuse(llama, save_adapter(llama, tmp_path / "a", 1, config=kind), "only LORA is supported")


def test_embeddings_in_an_adapter(llama, tmp_path):
    """PEFT saves them beside an adapter of the head, changed or not."""
    save_adapter(llama, tmp_path / "a", 1, embeddings=True, target_modules=["lm_head"])
    refuse(llama, tmp_path / "a", "unknown use: .*lm_head.base_layer.weight; merge it")


def test_an_adapter_of_another_model(bases, adapter):
    refuse(bases("llama-mqa-128"), adapter, "does not fit: .* this model .* need")
    refuse(bases("phi3-partial"), adapter, "another model: this one has no layer .*k_proj")


@pytest.mark.parametrize("module", ["embed_tokens", "layers.0.input_layernorm"])
def test_a_layer_that_is_not_linear(llama, adapter, module):
    def change(tensors):
        for kind in ("lora_A", "lora_B"):
            tensors[f"base_model.model.model.{module}.{kind}.weight"] = torch.ones(4, 4)

    edit_tensors(adapter, change)
    refuse(llama, adapter, f"changes model.{module}, a .*: only linear layers")


def test_a_tensor_too_many_or_too_few(llama, adapter):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({"x.modules": torch.ones(1)}))
    refuse(llama, adapter, "tensor of unknown use: x.modules")
    edit_tensors(adapter, lambda tensors: (tensors.pop("x.modules"), tensors.pop(name)))
    refuse(llama, adapter, "lacks lora_B.weight of model.layers.0.self_attn.q_proj")
    edit_tensors(adapter, lambda tensors: tensors.clear())
    refuse(llama, adapter, "is empty")


def test_weights_that_are_not_finite(llama, adapter):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors[name].fill_(torch.nan))
    refuse(llama, adapter, "layer 1 is not reproduced")


def test_damaged_and_missing_files(llama, adapter):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-100])
    refuse(llama, adapter, "cannot read .*adapter_model.safetensors")
    (adapter / WEIGHTS).unlink()
    refuse(llama, adapter, "weights missing: .* has no adapter_model.safetensors")
    (adapter / CONFIG).write_text("{")
    refuse(llama, adapter, "cannot read .*adapter_config.json")
    (adapter / CONFIG).unlink()
    refuse(llama, adapter, "is no adapter folder: it has no adapter_config.json")
    refuse(llama, "no such//adapter", "adapter not found")


def test_an_adapter_is_no_model_and_a_loaded_module_takes_none(adapter):
    with pytest.raises(ModelError, match="holds an adapter: load the model"):
        Engine.from_pretrained(adapter)
    with pytest.raises(ModelError, match="needs a model folder"):
        Engine.from_pretrained(build("llama"), adapter=adapter)


def test_on_the_command_line(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = save_adapter("models/needle-tiny", tmp_path / "a", 1, **KINDS["plain"][1])
    ask = ["generate", "The key of", "--max-new-tokens", "4", "--json", "--dtype", "float32"]
    texts = []
    for adapter in ([], ["--adapter", str(folder)], ["--adapter", str(folder)]):
        assert main([*ask, *adapter]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] != texts[1] == texts[2]
    assert main([*ask, "--adapter", str(two[0])]) == 1
    assert "headrace: the adapter does not fit" in capsys.readouterr().err
