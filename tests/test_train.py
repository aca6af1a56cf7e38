"What does not fit into the notebook of training: other processes, accelerate launch, a GPU."

import json
import os
import subprocess
import sys

import pytest
import torch

from steer_nb.methods.peft import lora_model
from steer_nb.training.config import TrainError

TOY = """
import random, sys, warnings
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from steer_nb.core.config import SteeringConfig
from steer_nb.core.steering import steer, steerings
from steer_nb.data.examples import Example, Task
from steer_nb.training.config import TrainConfig, TrainError
from steer_nb.training.fit import fit

words = [*"0123456789", "max", "of", "="]
backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}, "<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

def digits(count, split):
    chance, examples = random.Random(split), {}
    while len(examples) < count:
        asked = chance.choices(range(10), k=chance.randint(2, 6))
        prompt = f"max of {' '.join(map(str, asked))} ="
        completion = f" {max(asked)}" * chance.randint(1, 3)        # unequal numbers of labelled tokens
        examples[prompt] = Example(prompt, completion, (), str(max(asked)), id=f"{split} {prompt}")
    return tuple(examples.values())

toy = Task("digits", "generate", digits(29, "train"), digits(9, "validation"), digits(1, "test"), "generated", "digits",
           max_new_tokens=3, extractor=str.strip)

def tiny(kind="llama"):
    size = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=1)
    config = LlamaConfig(**size, intermediate_size=64) if kind == "llama" else GPT2Config(**size, n_positions=32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
"""

TRAIN = (
    TOY
    + """
import atexit, os
kind, dtype, folder = sys.argv[1:]
atexit.register(lambda: os.write(1, f"left alone: {not torch.distributed.is_initialized()}\\n".encode()))     # runs after what `fit` registers; in one piece, since two of them write at once
model = tiny(kind).to(getattr(torch, dtype))
attributes = set(vars(model))
steering = steer(model, SteeringConfig(rank=4, positions="prompt"))
steered = set(vars(model))
run = fit(model, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2, batch_size=4, accumulation_steps=2), output=folder)
assert type(model).__name__.endswith("ForCausalLM") or type(model).__name__ == "GPT2LMHeadModel"
assert set(vars(model)) == steered and not model.training
steering.remove()
assert set(vars(model)) == attributes
"""
)


def python(*arguments, **environment):
    "Python in a process of its own; one thread, so that a sum is always made in the same order."
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def outcome(folder):
    "The bytes of the trained steering, and what the record says about the numbers."
    record = json.loads((folder / "run.json").read_text())
    return (
        (folder / "steering" / "steering.safetensors").read_bytes(),
        record["curve"],
        record["validation"],
        record,
    )


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path / "train.py"


def test_two_processes_train_the_same_bits(script, tmp_path):
    "Also if a launcher's environment asks for another accumulation, which TrainConfig alone decides."
    python(script, "gpt2", "float32", tmp_path / "one")  # GPT-2 has dropout
    python(script, "gpt2", "float32", tmp_path / "two", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one[:3] == two[:3]
    assert one[3]["best_step"] > 0 and len(one[1]) == 8
    text = (tmp_path / "one" / "run.json").read_text()  # tells nothing of the machine but its kind
    assert (
        str(tmp_path) not in text
        and os.uname().nodename not in text
        and os.path.expanduser("~") not in text
    )


def test_two_processes_together_are_one(script, tmp_path):
    "In each epoch, and in validation, one pass has a single example: the other process has none."
    python(script, "llama", "float64", tmp_path / "alone")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    said = python(
        *launch,
        script,
        "llama",
        "float64",
        tmp_path / "together",
        ACCELERATE_USE_CPU="true",
        CUDA_VISIBLE_DEVICES="",
    ).stdout
    assert (
        said.count("left alone: True") == 2
    )  # else gloo's threads can abort a process that is done
    (_, curve, validation, _), (_, curve2, validation2, record) = (
        outcome(tmp_path / "alone"),
        outcome(tmp_path / "together"),
    )
    assert record["processes"] == 2
    assert [point["tokens"] for point in curve] == [point["tokens"] for point in curve2]
    for points, points2 in (
        (curve, curve2),
        (validation, validation2),
    ):  # float64, summed in another order
        assert all(abs(a["loss"] - b["loss"]) < 1e-9 for a, b in zip(points, points2, strict=True))


@pytest.mark.parametrize("targets", ["down_porj", ["q_proj", "down_porj"]])
def test_a_misspelt_target_is_refused_also_among_right_ones(targets):
    "PEFT alone trains q_proj then, and says nothing."
    space = {}
    exec(TOY, space)
    with pytest.raises(TrainError, match="no module 'down_porj'; did you mean 'down_proj'"):
        lora_model(space["tiny"](), 2, targets)
    assert lora_model(space["tiny"](), 2, ["q_proj", "model.layers.1.mlp.down_proj"]) is not None


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="only Linux lets a process forget its peak"
)
def test_the_peak_of_memory_is_of_this_run():
    "600 MiB that were there before and are gone do not count; the same that a run takes for a moment do."
    code = (
        TOY
        + """
def gone(): torch.ones(600 * 2 ** 18)
peaks = []
for during in (False, True):
    gone()
    model = tiny()
    steer(model, SteeringConfig(rank=4))
    if during: model.register_forward_pre_hook(lambda *_: gone())
    peaks.append(fit(model, tokenizer, toy, TrainConfig(max_steps=2)).peak_memory)
print(*peaks)
"""
    )
    before, during = map(float, python("-c", code, ACCELERATE_USE_CPU="true").stdout.split())
    assert 550 < during - before < 700, (before, during)


def test_a_launcher_with_another_precision(tmp_path):
    code = (
        TOY
        + """
model = tiny()
steer(model, SteeringConfig(rank=4))
before = set(vars(model))
run = fit(model, tokenizer, toy, TrainConfig(max_steps=2))
assert run.precision == "bfloat16" and set(vars(model)) == before and "forward" not in vars(model), set(vars(model)) ^ before
try: fit(model, tokenizer, toy, TrainConfig(precision="float32"))
except TrainError as error: print(error)
"""
    )
    printed = python("-c", code, ACCELERATE_MIXED_PRECISION="bf16").stdout
    assert "mixed_precision='bf16'" in printed and "precision='float32'" in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    code = (
        TOY
        + """
model = tiny()
steering = steer(model, SteeringConfig(rank=4))
first = fit(model, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2))
again_model = tiny()
steer(again_model, SteeringConfig(rank=4))
again = fit(again_model, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2))
assert first.curve == again.curve and first.validation == again.validation
assert first.precision == ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
assert 0 < first.peak_memory < 1000 and model.device.type == "cuda" and "forward" not in vars(model)
assert not torch.are_deterministic_algorithms_enabled()
"""
    )
    python("-c", code)
