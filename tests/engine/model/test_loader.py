"""What cannot be loaded is refused in one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import Engine
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.loader import _dtype, locate, pick_device, read_json, weight_files
from kvstore.identity import weights_digest
from native.folders import cache_folder
from tests.engine import oracle
from tests.engine.families import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    build("llama").save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(folder, match):
    with pytest.raises(ModelError, match=match) as caught:
        Engine.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture(folder):
    edit(folder, model_type="mamba")
    refuse(folder, "unknown architecture 'mamba': known are .*llama")


def test_a_quantized_checkpoint(folder):
    edit(folder, quantization_config={"quant_method": "awq"})
    refuse(folder, "quantized checkpoints .awq.")


def test_a_missing_shard(folder):
    next(folder.glob("*-00002-*.safetensors")).unlink()
    refuse(folder, "weights missing")


def test_no_weights_at_all(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refuse(folder, "weights missing: .* has no model.safetensors")


def test_a_tensor_that_is_not_there(folder):
    edit(folder, num_hidden_layers=4, layer_types=None)
    refuse(folder, "weights missing: .* lacks")


def test_a_torn_weight_file(folder):
    path = next(folder.glob("*-00001-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(folder, "cannot load")


def test_tensors_of_another_shape(folder):
    edit(folder, intermediate_size=96)
    refuse(folder, "cannot load")


def test_tensors_that_the_config_has_no_place_for(folder):
    edit(folder, num_hidden_layers=2)
    refuse(folder, "no place for")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"dtype": "float99"},
        {"quantization_config": "x"},
        {"transformers_weights": "other.safetensors"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_makes_no_sense(folder, change):
    edit(folder, **change)
    refuse(folder, "cannot load|not supported|no place")


@pytest.mark.parametrize("positions", [0, -1])
def test_a_model_without_positions(folder, positions):
    edit(folder, max_position_embeddings=positions)
    refuse(folder, "max_position_embeddings")


@pytest.mark.parametrize(
    "text", ["{", "[]", *(f'{{"eos_token_id": {x}}}' for x in ('"x"', "[[5]]", "5.5", "true"))]
)
def test_a_generation_config_that_makes_no_sense(folder, text):
    """Without it, or by such tokens, no answer would ever end."""
    (folder / "generation_config.json").write_text(text)
    refuse(folder, "generation_config.json: |eos_token_id must be")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "[]"},
        {"tokenizer.json": '{"version": "9.0", "added_tokens": [], "model": {"type": "new"}}'},
        {"tokenizer_config.json": '{"tokenizer_class": "Alien"}'},
        {"tokenizer_config.json": "5"},
    ],
)
def test_a_tokenizer_that_cannot_be_read(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    refuse(folder, "cannot load the tokenizer of")


def test_a_dtype_that_no_kv_has(folder):
    with pytest.raises(ModelError, match=r"float64 .*: load them with dtype bfloat16"):
        Engine.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("index", ["[1]", "{}", '{"weight_map": ["a"]}'])
def test_an_index_that_makes_no_sense(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    refuse(folder, "model.safetensors.index.json")


def test_only_the_files_that_are_loaded_count(folder, tmp_path):
    """A single file comes before shards, for transformers and so for the identity."""
    other = build("llama")
    other.model.layers[0].mlp.up_proj.weight.data += 0.1
    other.save_pretrained(tmp_path / "single")
    shards = weight_files(folder)
    shutil.copy(tmp_path / "single" / "model.safetensors", folder)
    (folder / "notes.safetensors").write_bytes(b"")
    assert len(shards) > 1
    assert weight_files(folder) == [folder / "model.safetensors"]
    with Engine.from_pretrained(folder) as engine:
        got = engine.generate([3, 4, 5], max_new_tokens=5)[0].tokens
    assert got == oracle.generate(other, [torch.tensor([3, 4, 5])], 5)[0]


def test_a_cache_folder_that_cannot_be_is_no_reason_to_fail(folder, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    with Engine.from_pretrained(folder) as engine:
        assert engine.identity.weights == weights_digest(weight_files(folder), cache=None)
    assert "hashed at every start" in caplog.text
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder().name.startswith("headrace-")


def test_no_config_and_no_folder(folder):
    (folder / "config.json").unlink()
    refuse(folder, "no model folder")
    with pytest.raises(ModelError, match="model not found"):
        locate("nobody/no-such-model")
    with pytest.raises(ModelError, match="model not found"):
        locate("no such//name")


def test_a_path_is_the_users_and_not_of_the_models_that_come_along(tmp_path, monkeypatch):
    work = tmp_path / "work"
    for folder in (work / "needle-tiny", tmp_path / "kvstore"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    for path in (".", "..", "../kvstore", "./needle-tiny", "../work/needle-tiny"):
        assert locate(path).resolve() == Path(path).resolve()
    assert (locate("needle-tiny") / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "cannot read")


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "auto", "mps"])
def test_devices_that_are_none(device):
    with pytest.raises(ModelError, match="device"):
        pick_device(device)


def test_a_gpu_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="no GPU"):
        pick_device("cuda")


def test_the_dtype_is_the_one_asked_for_else_one_the_cpu_can_compute():
    cpu = torch.device("cpu")
    assert _dtype(torch.bfloat16, {"dtype": "float32"}, cpu) == torch.bfloat16
    assert _dtype(None, {"dtype": "float16"}, cpu) == torch.float32
    assert _dtype(None, {"torch_dtype": "float32"}, cpu) == torch.float32
    assert _dtype(None, {"dtype": "float16"}, torch.device("cuda")) == torch.float16


def test_frequencies_that_depend_on_the_length_limit_the_positions():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with Engine(build("llama", rope_parameters=rope, max_position_embeddings=256)) as engine:
        assert engine.model.shape.max_positions == 256
    factors = [1.0 + i / 32 for i in range(32)]
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2 * f for f in factors],
        "original_max_position_embeddings": 128,
    }
    with Engine(build("llama", rope_parameters=longrope)) as engine:
        assert engine.model.shape.max_positions == 128


def test_files_are_utf_8_wherever_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "latin-1")
    for name, text in ("a.toml", 'tenant = "M\u00fcller"'), ("a.json", '{"tenant": "M\u00fcller"}'):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert EngineConfig.from_toml(tmp_path / "a.toml").tenant == "M\u00fcller"
    assert read_json(tmp_path / "a.json") == {"tenant": "M\u00fcller"}


def test_settings_from_toml(tmp_path):
    path = tmp_path / "headrace.toml"
    path.write_text('prefill_chunk = 256\n[store]\nhost_bytes = 1_000\ndisk_path = "kv"\n')
    config = EngineConfig.from_toml(path)
    assert (config.prefill_chunk, config.store.host_bytes) == (256, 1000)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prefil_chunk = 3", "prefil_chunk.*known settings: prefill_chunk, .*store.host_bytes"),
        ("[store]\nsize = 3", r"size.*\$.store"),
        ("prefill_chunk = 'a'", "int"),
        ("prefill_chunk = 0", "prefill_chunk must be from 1"),
        ("[store]\nhost_bytes = -1", "host_bytes"),
        ("= 3", "not TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, match):
    path = tmp_path / "headrace.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        EngineConfig.from_toml(path)


def test_a_toml_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        EngineConfig.from_toml(tmp_path / "none.toml")
