"""What EasySteer and vllm-lens make of an exported steering equals the steering.

Their equations are written again here, for plain hooks on the blocks of a model of transformers."""

import hashlib
import json
import sys
from base64 import b64decode
from contextlib import ExitStack
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch

from steer_nb.convert.easysteer import to_easysteer
from steer_nb.convert.projections import ConvertError
from steer_nb.convert.vllm_lens import to_vllm_lens
from steer_nb.core.adapters import ACTIVATIONS
from steer_nb.core.config import SteeringConfig
from steer_nb.core.passes import prompt_ends
from steer_nb.core.sites import blocks
from steer_nb.core.steering import steer
from steer_nb.testing.tiny_models import INPUT_IDS, tiny_model

CLOSE = 1e-5  # of a logit, float32: the products are computed in another order
PROMPT = 4  # tokens of the six of INPUT_IDS; the last two are generated ones
POSITIONS = ("all", "prompt", "completion", "last", "prefix:2", "suffix:3", "prefix:1+suffix:2")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def put(model, strength=-0.7, **options):
    "A steering with random parameters."
    steering = steer(model, SteeringConfig(rank=3, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in steering.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    steering.strength = strength
    return steering


def logits(model, change=None):
    "Logits, the output of each block changed by `change(layer, h)`, h of (batch, tokens, hidden)."
    with torch.no_grad(), ExitStack() as hooks:
        for layer, block in enumerate(blocks(model)):

            def hook(module, args, output, layer=layer):
                if change is None:
                    return output
                if isinstance(output, tuple):
                    return (change(layer, output[0]), *output[1:])
                return change(layer, output)

            hooks.callback(block.register_forward_hook(hook).remove)
        with prompt_ends(model, PROMPT):
            return model(input_ids=INPUT_IDS).logits


def apart(one, other):
    return (one - other).abs().max().item()


def array(entry):
    "A tensor of EasySteer's payload: float32, its shape beside it."
    return np.frombuffer(b64decode(entry["data"]), dtype=np.float32).reshape(entry["shape"])


def selected(where, tokens, prompt):
    "Which tokens an ApplySpec selects: the union of what its fields name."
    index, found = np.arange(tokens), np.zeros(tokens, dtype=bool)
    assert where and set(where) <= {"prompt", "generation", "prompt_window", "prompt_positions"}
    if where.get("prompt") == "all":
        found |= index < prompt
    if where.get("generation") == "all":
        found |= index >= prompt
    if "prompt_window" in where:
        start, stop = where["prompt_window"]
        found |= (index >= start) & (index < stop) & (index < prompt)
    for position in where.get("prompt_positions", ()):
        found |= (index == position + prompt) & (index < prompt)
    return torch.tensor(found)


def easysteer(spec):
    "EasySteer's change of the activations: the vectors of a layer in their order."
    assert spec["conflict"] == "sequential"

    def change(layer, h):
        for vector in spec["vectors"]:
            if layer not in vector["layers"]:
                continue
            parts = {
                name: torch.tensor(array(entry))
                for name, entry in vector["data"]["tensors"].items()
            }
            if vector["algorithm"] == "direct":
                new = h + parts[f"layer.{layer}"] * vector["scale"]
            else:
                assert vector["algorithm"] == "lm_steer" and len(vector["layers"]) == 1
                read = torch.matmul(h, parts["projector1"])
                new = h + vector["scale"] * torch.matmul(read, parts["projector2"].transpose(0, 1))
            tokens = selected(vector["apply"], h.shape[1], PROMPT)
            h = torch.where(tokens[None, :, None], new, h)
        return h

    return change


EASYSTEER = [dict(kind=kind) for kind in ("vector", "linear", "loreft", "direft", "full")]
EASYSTEER += [dict(kind="linear", bias=True)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "config", EASYSTEER, ids=lambda config: "-".join(map(str, config.values()))
)
def test_easysteer_gives_the_logits_of_the_steering(config, positions):
    model = tiny_model("llama")
    base = logits(model)
    steering = put(model, positions=positions, **config)
    wanted, spec = logits(model), to_easysteer(steering)
    steering.remove()
    found = logits(model, easysteer(json.loads(json.dumps(spec))))
    assert apart(wanted, base) > 1e-3
    assert apart(found, wanted) < CLOSE


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen3", "falcon", "granite"])
def test_both_in_other_architectures(model_type):
    model = tiny_model(model_type).eval()
    base = logits(model)
    steering = put(model, kind="loreft", layers=[1])
    wanted = logits(model)
    spec, extra = to_easysteer(steering), to_vllm_lens(steering)
    steering.remove()
    assert apart(wanted, base) > 1e-3
    assert apart(logits(model, easysteer(spec)), wanted) < CLOSE
    assert apart(logits(model, vllm_lens(extra)), wanted) < CLOSE


def test_positions_longer_than_the_prompt_are_the_prompt():
    for positions in ("prefix:9", "suffix:9"):
        steering = put(tiny_model("llama"), kind="vector", positions=positions)
        (vector,) = to_easysteer(steering)["vectors"]
        assert selected(vector["apply"], 6, PROMPT).tolist() == [True] * PROMPT + [False] * 2


def test_the_file_is_the_result_and_the_hash_is_that_of_easysteer(tmp_path):
    steering = put(tiny_model("llama"), kind="direft")
    spec = to_easysteer(steering, tmp_path / "deep" / "steering.json")
    assert json.loads((tmp_path / "deep" / "steering.json").read_text()) == spec
    assert [vector["algorithm"] for vector in spec["vectors"]] == ["lm_steer", "lm_steer", "direct"]
    hashes = set()
    for vector in spec["vectors"]:
        data = vector["data"]
        contents = hashlib.sha256()
        contents.update((data["kind"] + ":1").encode())
        for name, entry in sorted(data["tensors"].items()):
            for part in (
                name.encode(),
                str(tuple(entry["shape"])).encode(),
                array(entry).tobytes(),
            ):
                contents.update(part)
        assert data["sha256"] == contents.hexdigest()
        hashes.add(data["sha256"])
    assert len(hashes) == 3


def test_a_bias_of_zero_needs_no_second_vector():
    steering = put(tiny_model("llama"), kind="linear", bias=True, layers=[1])
    steering.adapters[next(iter(steering.adapters))].bias.data.zero_()
    assert [vector["algorithm"] for vector in to_easysteer(steering)["vectors"]] == ["lm_steer"]


def vllm_lens(extra):
    "What vllm-lens makes of the activations, one request for each row of the batch."

    def change(layer, h):
        rows = []
        for row in h:
            for part in extra.get("apply_steering_vectors", ()):
                assert part["norm_match"] is False
                if layer in part["layer_indices"]:
                    vector = array(part["activations"])[part["layer_indices"].index(layer)]
                    row = row + torch.tensor(vector) * part["scale"]
            for part in extra.get("apply_hooks", ()):
                if layer in part["layer_indices"]:
                    context = SimpleNamespace(layer_idx=layer, seq_len=len(row), saved={})
                    row = part["fn"](context, row)
            rows.append(row)
        return torch.stack(rows)

    return change


LENS = EASYSTEER + [dict(kind="nonlinear", activation=name) for name in ACTIVATIONS]
LENS += [dict(kind="nonlinear", bias=True, layers=[0])]


@pytest.mark.parametrize("config", LENS, ids=lambda config: "-".join(map(str, config.values())))
def test_vllm_lens_gives_the_logits_of_the_steering(config, monkeypatch):
    model = tiny_model("llama")
    base = logits(model)
    steering = put(model, **config)
    wanted, extra = logits(model), to_vllm_lens(steering)
    steering.remove()
    sent = cloudpickle.dumps(extra)
    with monkeypatch.context() as patch:  # the server has no steer_nb
        for name in [name for name in sys.modules if name.partition(".")[0] == "steer_nb"]:
            patch.setitem(sys.modules, name, None)
        extra = cloudpickle.loads(sent)
        found = logits(model, vllm_lens(extra))
    assert apart(wanted, base) > 1e-3
    assert apart(found, wanted) < CLOSE


def test_a_vector_for_vllm_lens_is_plain_json():
    extra = to_vllm_lens(put(tiny_model("llama"), kind="vector"))
    assert list(extra) == ["apply_steering_vectors"]
    assert json.loads(json.dumps(extra)) == extra


def test_a_hook_runs_in_half_precision_and_keeps_the_steering_unchanged():
    steering = put(tiny_model("llama"), kind="linear")
    before = [parameter.clone() for parameter in steering.parameters()]
    (part,) = to_vllm_lens(steering)["apply_hooks"]
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    context = SimpleNamespace(layer_idx=1)
    with torch.no_grad():
        first, second = part["fn"](context, h), part["fn"](context, h)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)
    assert all(
        torch.equal(one, other) for one, other in zip(before, steering.parameters(), strict=True)
    )


REFUSED = [
    (to_easysteer, dict(kind="nonlinear"), "nonlinear steering cannot.*vector, linear, loreft"),
    (to_easysteer, dict(kind="linear", site="mlp"), "'mlp' cannot become a SteeringSpec"),
    (to_vllm_lens, dict(kind="jola"), "jola steering cannot become a hook"),
    (to_vllm_lens, dict(kind="linear", site="attn"), "'attn' cannot become a hook"),
    (to_vllm_lens, dict(kind="vector", positions="last"), "'last' only, .* every token"),
]


@pytest.mark.parametrize("convert, config, message", REFUSED)
def test_what_cannot_be_exported_raises_an_error(convert, config, message):
    with pytest.raises(ConvertError, match=message):
        convert(put(tiny_model("llama"), **config))


@pytest.mark.parametrize("convert", [to_easysteer, to_vllm_lens])
def test_no_usable_steering_raises_an_error(convert, tmp_path):
    with pytest.raises(ConvertError, match="several residual streams"):
        convert(put(tiny_model("gemma3n_text"), kind="vector", layers=[1]))
    with pytest.raises(ConvertError, match="pass a steering"):
        convert("runs/sst2")
    steering = put(tiny_model("llama"), kind="vector")
    with steering.disabled(), pytest.raises(ConvertError, match="disabled"):
        convert(steering)
    next(steering.parameters()).data[0] = float("nan")
    with pytest.raises(ConvertError, match="not finite"):
        convert(steering)


def test_an_error_writes_no_file(tmp_path):
    with pytest.raises(ConvertError):
        to_easysteer(put(tiny_model("llama"), kind="nonlinear"), tmp_path / "steering.json")
    assert not list(tmp_path.iterdir())
