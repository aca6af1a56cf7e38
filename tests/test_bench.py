"""What does not fit into the notebook of bench: every contestant computes what it says, other processes, damaged records."""

import copy
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from steer_nb import bench as module
from steer_nb.core.config import SteeringConfig
from steer_nb.core.hooks import capture
from steer_nb.core.sites import blocks
from steer_nb.core.steering import steer
from steer_nb.experiments.bench import (
    AXES,
    CONTESTANTS,
    KINDS,
    ROUNDS,
    TARGETS,
    Bed,
    Bench,
    BenchError,
    bench,
    clock,
    costs,
    exponents,
    peak_memory,
    plain_wrapper,
    race,
    rotated,
)
from steer_nb.experiments.testbed import load_bed
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.training.loss import completion_loss

LISTOPS = {"name": "listops", "length": 12, "depth": 2, "max_args": 4}
SETTINGS = {
    "model": "tiny-llama",
    "task": LISTOPS,
    "n": 10,
    "n_test": 4,
    "batch_size": 4,
    "rank": 4,
    "seed": 0,
}
TRAINING = [
    name for name, one in CONTESTANTS.items() if one.kind == "training" and name != "pyreft_loreft"
]


def a_bed() -> Bed:
    "A bed that is ready for every contestant."
    bed = Bed(**SETTINGS)
    module._train_once(bed)
    return bed


@pytest.fixture(scope="module")
def bed():
    return a_bed()


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEER_NB_PYREFT_PYTHON", raising=False)
        return bench(**SETTINGS, repetitions=2, memory=False)


# Taking turns


def test_each_repetition_gives_each_a_turn_and_begins_one_later():
    assert [rotated(["a", "b", "c"], repetition) for repetition in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    told = []

    def prepare(name):
        told.append(f"prepare {name}")
        return lambda: told.append(name)

    seconds = race({name: lambda name=name: prepare(name) for name in ("a", "b")}, 3)
    assert told == [word for name in "abbaab" for word in (f"prepare {name}", name)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_what_comes_before_a_turn_is_not_timed(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))

    def prepare():
        for _ in range(10):
            next(now)
        return lambda: next(now)

    assert race({"a": prepare}, 2) == {
        "a": [2, 2]
    }  # the clock is read before and after, and once inside
    assert clock(lambda: 7.25) == 7.25


# The contestants


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "pyreft_loreft"])
def test_every_contestant_runs_and_leaves_the_model_as_it_was(bed, name):
    before = {key: tensor.clone() for key, tensor in module._bare(bed).state_dict().items()}
    CONTESTANTS[name].prepare(bed, name)()
    assert (
        "model.layers.0.steering.steer_default.adapter.up" in bed.model.state_dict()
    ) == name.endswith("_steered")
    after = module._bare(bed).state_dict()  # what comes next begins with taking the steering off
    assert before.keys() == after.keys() and all(
        torch.equal(tensor, after[key]) for key, tensor in before.items()
    )


def trained_by(bed, name):
    "The parameters that a contestant's turn moves, by name."
    models = []
    fresh = module._fresh
    module._fresh = lambda *args: models.append(fresh(*args)) or models[-1]
    try:
        turn = CONTESTANTS[name].prepare(bed, name)
    finally:
        module._fresh = fresh
    model = models[0]
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    turn()
    return {
        key
        for key, parameter in model.named_parameters()
        if not torch.equal(parameter, before[key])
    }, model


def test_each_trains_what_it_says(bed):
    layers = len(blocks(bed.model))
    for name, part, apart in (
        ("ours", "steering", "lora_"),
        ("trainer_lora", "lora_", "steering"),
        ("plain_wrapper", "up.weight", "lora_"),
    ):
        moved, model = trained_by(bed, name)
        assert (
            moved
            and all(part in key or "down" in key for key in moved)
            and not any(apart in key for key in moved)
        ), name
    moved, _ = trained_by(bed, "ours_quarter")
    assert moved and {key.split("layers.")[1].split(".")[0] for key in moved} == {
        str(layer) for layer in bed.quarter()
    } == {str(layers - 1)}
    moved, model = trained_by(bed, "trainer_full")
    assert moved == {key for key, _ in model.named_parameters()}
    for name in ("floor_forward", "floor", "floor_quarter"):
        assert trained_by(bed, name)[0] == set()


@pytest.mark.parametrize("name, layer", [("floor", 0), ("floor_quarter", 1)])
def test_a_floor_has_its_gradient_at_the_lowest_steered_block_and_nowhere_else(bed, name, layer):
    turn = CONTESTANTS[name].prepare(bed, name)
    turn()
    vector, parameters = turn.gradients
    assert vector.abs().sum() > 0 and all(gradient is None for gradient in parameters)
    model, batch = copy.deepcopy(bed.model).requires_grad_(False), bed.grouped[-1]
    steering = steer(model, SteeringConfig(kind="vector", layers=[layer]))
    completion_loss(model, batch).backward()
    expected = next(iter(steering.parameters())).grad
    assert torch.allclose(
        vector, expected, rtol=1e-4, atol=1e-6
    )  # the same gradient, computed by the steering


def test_the_plain_wrapper_starts_where_we_start_and_learns_the_same(bed):
    batch = module._arrival(bed)[0]
    steered, plain = (copy.deepcopy(bed.model).requires_grad_(False) for _ in range(2))
    steering = steer(steered, SteeringConfig(rank=4))
    plain = plain_wrapper(plain, 4)
    assert torch.allclose(plain(**batch).loss, bed.model(**batch).loss, rtol=1e-5, atol=0)
    for layer, adapter in enumerate(steering.adapters.values()):
        nn.init.normal_(adapter.up, std=0.2)
        for own, other in (
            (adapter.up, blocks(plain)[layer].up.weight),
            (adapter.down, blocks(plain)[layer].down.weight),
        ):
            other.data = own.data.clone()
    ours = completion_loss(steered, batch) / (batch["labels"] != -100).sum()
    theirs = plain(**batch).loss
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0) and not torch.allclose(
        theirs, bed.model(**batch).loss, rtol=1e-3, atol=0
    )
    ours.backward(), theirs.backward()
    for layer, adapter in enumerate(steering.adapters.values()):
        assert torch.allclose(
            adapter.up.grad, blocks(plain)[layer].up.weight.grad, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "gpt2"])
def test_the_plain_wrapper_fits_other_models(kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    assert torch.equal(plain_wrapper(model, 2)(input_ids=ids).logits, expected)


def test_decoding_repeats_the_same_tokens(bed):
    lengths = []

    def which(bed):
        return model

    model = copy.deepcopy(bed.model)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            (kwargs["input_ids"].shape[1], kwargs["past_key_values"].get_seq_length())
        ),
        with_kwargs=True,
    )
    turn = module._decode(bed, "decode_bare", which)
    turn()
    prompt = len(bed.encoded[0].input_ids)
    assert lengths == [(prompt, 0)] + 2 * [(1, prompt + step) for step in range(module.STEPS)]


def test_the_trained_steering_is_not_a_no_op(bed):
    ids = bed.grouped[0]["input_ids"]
    with torch.no_grad(), capture(bed.model) as before:
        bed.model(input_ids=ids)
    with torch.no_grad(), capture(bed.trained) as after:
        bed.trained(input_ids=ids)
    assert any(not torch.equal(before[site], after[site]) for site in before)
    assert not any(bed.trained.get_input_embeddings()._forward_pre_hooks) and not any(
        parameter.requires_grad for parameter in bed.trained.parameters()
    )


# The record


def test_one_run_measures_everything(measured):
    assert list(measured.seconds) == [name for name in CONTESTANTS if name != "pyreft_loreft"]
    assert {name: len(times) for name, times in measured.seconds.items()} == {
        name: 2 * ROUNDS[CONTESTANTS[name].kind] for name in measured.seconds
    }
    counts = measured.counts
    assert set(counts) == set(TRAINING)
    assert (
        counts["ours"]
        == counts["floor"]
        == counts["floor_forward"]
        == counts["ours_quarter"]
        == counts["floor_quarter"]
    )
    assert counts["plain_wrapper"] == counts["trainer_lora"] | {
        "tokens": counts["plain_wrapper"]["tokens"],
        "logits": counts["plain_wrapper"]["logits"],
    }
    assert measured.predictions["identical"] == measured.predictions["examples"] == 4
    assert (
        set(measured.saved) == {"ours", "ours_quarter", "trainer_lora", "trainer_full"}
        and measured.saved["ours"] > measured.adapter["bytes"]
    )
    assert "STEER_NB_PYREFT_PYTHON" in measured.notes[0]
    said = json.dumps(measured.machine)
    assert (
        os.uname().nodename not in said
        and os.getcwd() not in said
        and measured.machine["threads"] == torch.get_num_threads()
    )


def test_the_table_has_the_medians_of_the_raw_times(measured):
    raw = {
        "ours": [3.0, 1.0, 2.0],
        "trainer_lora": [8.0, 4.0, 6.0],
        "plain_wrapper": [3.0, 3.0, 3.0],
        "floor": [1.9, 2.1, 1.8],
        "decode_bare": [1.0, 1.0, 4.0, 2.0],
        "decode_steered": [2.0, 1.0, 1.0, 3.0],
    }
    made = Bench(
        **{
            **vars(measured),
            "seconds": raw,
            "units": {
                "ours": 10,
                "trainer_lora": 10,
                "plain_wrapper": 10,
                "floor": 10,
                "decode_bare": 8,
                "decode_steered": 8,
            },
        }
    )
    frame, targets = made.frame.set_index("contestant"), made.targets.set_index("target")
    assert frame.seconds.to_dict() == {
        "ours": 2.0,
        "trainer_lora": 6.0,
        "plain_wrapper": 3.0,
        "floor": 1.9,
        "decode_bare": 1.5,
        "decode_steered": 1.5,
    }
    assert (
        frame["per second"]["ours"] == 5
        and frame["× LoRA"]["ours"] == 3
        and frame["lowest"]["ours"] == 1
        and frame["highest"]["ours"] == 3
    )
    assert frame["× LoRA"].isna()["decode_bare"]
    assert (
        targets.measured["training, × plain wrapper"] == 1.5
        and targets.met["training, × plain wrapper"] is True
    )
    assert (
        targets.measured["training, × frozen floor"] == pytest.approx(0.9)
        and targets.measured["time of a steered decode step / unsteered"] == 1.25
    )  # of the pairs
    assert targets.met["time of the last quarter / its floor"] is None and len(targets) == len(
        TARGETS
    )


def test_a_record_comes_back_as_it_was(measured, tmp_path):
    path = measured.save(tmp_path / "new" / "bench.json")
    assert (
        Bench.load(path) == measured
        and Bench.load(path)._repr_markdown_() == measured._repr_markdown_()
    )
    content = json.loads(path.read_text())
    for damaged in (
        "[]",
        "{",
        json.dumps({**content, "schema": 2}),
        json.dumps({key: value for key, value in content.items() if key != "seconds"}),
    ):
        path.write_text(damaged)
        with pytest.raises(BenchError, match="bench.json"):
            Bench.load(path)


def test_only_some_contestants():
    threads = torch.get_num_threads()
    found = bench(**SETTINGS, repetitions=1, threads=1, only=["floor", "ours"], memory=False)
    assert (
        list(found.seconds) == ["ours", "floor"] and found.predictions is None and found.notes == []
    )
    assert (
        found.targets.set_index("target").met["training, × frozen floor"] in (True, False)
        and torch.get_num_threads() == threads
    )
    assert found.machine["threads"] == 1


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"only": ["our"]}, "did you mean 'ours'"),
        ({"only": ["trainer-lora"]}, "did you mean 'trainer_lora'"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_wrong_arguments(wrong, says):
    with pytest.raises(BenchError, match=says):
        bench(**{**SETTINGS, "memory": False, **wrong})


# Other processes


def test_memory_is_measured_in_a_process_of_its_own():
    hoard = torch.ones(60_000_000)  # 229 MiB that are not the contestant's
    assert 0 < peak_memory("ours", 1, **SETTINGS) < 100
    del hoard
    with pytest.raises(BenchError, match="did you mean 'ours'"):
        peak_memory("our", 1, **SETTINGS)
    with pytest.raises(BenchError, match="ours: its memory was not measured: .*no task 'listop'"):
        peak_memory("ours", 1, **{**SETTINGS, "task": "listop"})


def a_python(folder, script: str) -> str:
    "A program that stands in for the Python of pyreft's environment."
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


STAND_IN = """
import json, sys
from pathlib import Path
job = json.loads((Path(sys.argv[2]) / "job.json").read_text())
print("noise")
print("answer " + json.dumps({"loss": LOSS, "trained": 5, "versions": {"pyreft": "0"}}), flush=True)
for number, line in enumerate(sys.stdin):
    print("answer " + json.dumps({"memory": 17.0} if line.strip() == "memory" else {"seconds": 100.0 + number}), flush=True)
"""


def test_pyreft_times_itself_in_its_own_process(bed, tmp_path):
    loss = float(bed.model(**module._arrival(bed)[0]).loss.detach())
    options = {
        **SETTINGS,
        "only": ["pyreft_loreft", "trainer_lora"],
        "repetitions": 2,
        "memory": False,
    }
    found = bench(**options, pyreft_python=a_python(tmp_path, STAND_IN.replace("LOSS", str(loss))))
    assert found.seconds["pyreft_loreft"] == [
        102.0,
        103.0,
    ]  # the first turns were memory and warm-up
    assert "5 parameters" in found.notes[0]
    with pytest.raises(BenchError, match="pyreft has another model"):
        bench(**options, pyreft_python=a_python(tmp_path, STAND_IN.replace("LOSS", "9.0")))


@pytest.mark.parametrize(
    "script, says",
    [("raise ImportError('no pyreft here')", "no pyreft here"), ("", "without a word")],
)
def test_without_pyreft_there_is_a_note(tmp_path, script, says):
    found = bench(
        **SETTINGS,
        only=["pyreft_loreft", "floor"],
        repetitions=1,
        memory=False,
        pyreft_python=a_python(tmp_path, script),
    )
    assert list(found.seconds) == ["floor"] and says in found.notes[0]


@pytest.mark.skipif(
    "STEER_NB_PYREFT_PYTHON" not in os.environ,
    reason="needs pyreft 0.1.0 and transformers 4.45 in another environment",
)
def test_pyreft_itself():
    found = bench(**SETTINGS, only=["pyreft_loreft"], repetitions=2)
    assert (
        len(found.seconds["pyreft_loreft"]) == 2
        and found.memory["pyreft_loreft"] > 0
        and "pyreft 0.1.0" in found.notes[0]
    )


# Costs


def test_costs_are_measured_on_every_axis():
    config = load_bed("tiny-llama")[0].config
    rows = costs(
        config,
        {axis: values[:2] for axis, values in AXES.items()},
        {"layers": 2, "rank": 2, "length": 8, "batch": 2},
        repetitions=1,
    )
    assert [(row["axis"], row["value"]) for row in rows] == [
        (axis, value) for axis, values in AXES.items() for value in values[:2]
    ]
    assert list(exponents(rows).axis) == list(AXES) and config.num_hidden_layers == 2
    with pytest.raises(BenchError, match="did you mean 'length'"):
        costs(config, {"lenght": (1, 2)})


# The command


def test_the_command(tmp_path):
    program = [
        sys.executable,
        "-c",
        "from steer_nb.cli import main; main()",
        "bench",
        "--model",
        "tiny-llama",
        "--task",
        "listops",
        "--n",
        "4",
        "--n-test",
        "2",
        "--batch-size",
        "2",
        "--repetitions",
        "1",
        "--no-memory",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "STEER_NB_PYREFT_PYTHON"
    }

    def run(*words):
        return subprocess.run([*program, *words], capture_output=True, text=True, env=environment)

    done = run("--only", "ours,floor", "--output", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    assert (
        list(Bench.load(tmp_path / "bench.json").seconds) == ["ours", "floor"]
        and "training, × frozen floor" in done.stdout
    )
    done = run("--only", "ours,flor")
    assert (
        done.returncode == 1
        and "did you mean 'floor'" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_kinds_are_complete():
    assert {one.kind for one in CONTESTANTS.values()} == set(KINDS) == set(ROUNDS)
