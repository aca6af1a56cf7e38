"""What the notebooks of the benchmark do not show: every contestant computes what it claims, other
processes, damaged records."""

import copy
import gc
import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steer_nb.core.config import SteeringConfig
from steer_nb.core.hooks import capture
from steer_nb.core.sites import blocks
from steer_nb.core.steering import steer
from steer_nb.experiments import contestants, pyreft_process, timing
from steer_nb.experiments.bench import bench
from steer_nb.experiments.bench_record import TARGETS, Bench
from steer_nb.experiments.contestants import CONTESTANTS, KINDS, ROUNDS, peak_memory
from steer_nb.experiments.testbed import load_testbed
from steer_nb.experiments.timing import (
    AXES,
    BenchError,
    clock,
    costs,
    exponents,
    race,
    rotated,
)
from steer_nb.experiments.turns import STEPS, DecodeTurn, plain_wrapper, train_once
from steer_nb.experiments.workload import Workload
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
HERE = [name for name in CONTESTANTS if name != "pyreft_loreft"]  # in this process
TRAINING = [name for name in HERE if CONTESTANTS[name].kind == "training"]


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    "`clock` collects garbage before each turn: leave out the objects of the imported libraries."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def workload():
    "A workload that is ready for every contestant."
    made = Workload(**SETTINGS)
    train_once(made)
    return made


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEER_NB_PYREFT_PYTHON", raising=False)
        patch.setitem(ROUNDS, "forward", 3)
        patch.setitem(ROUNDS, "decode", 4)
        patch.setitem(ROUNDS, "rows", 1)
        return bench(**SETTINGS, repetitions=2, memory=False)


# Taking turns


def test_each_repetition_gives_each_contestant_a_turn_and_begins_one_later():
    assert [rotated(["a", "b", "c"], repetition) for repetition in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    calls = []

    def prepare(name):
        calls.append(f"prepare {name}")
        return lambda: calls.append(name)

    seconds = race({name: lambda name=name: prepare(name) for name in ("a", "b")}, 3)
    assert calls == [word for name in "abbaab" for word in (f"prepare {name}", name)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_preparation_of_a_turn_is_not_timed(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))

    def prepare():
        for _ in range(10):
            next(now)
        return lambda: next(now)

    # the clock is read before and after, and once by the turn
    assert race({"a": prepare}, 2) == {"a": [2, 2]}
    assert clock(lambda: 7.25) == 7.25


# The contestants


@pytest.mark.parametrize("name", HERE)
def test_every_contestant_runs_and_leaves_the_model_unchanged(workload, name):
    before = {key: tensor.clone() for key, tensor in workload.bare_model().state_dict().items()}
    CONTESTANTS[name].prepare(workload, name)()
    steered = any("steer_default" in key for key in workload.model.state_dict())
    assert steered == name.endswith("_steered")
    after = workload.bare_model().state_dict()  # the next preparation removes the steering
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def trained_by(workload, name):
    "The names of the parameters that a contestant's turn changes, and its model."
    turn = CONTESTANTS[name].prepare(workload, name)
    model = turn.method.model if hasattr(turn, "method") else turn.model
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    turn()
    after = dict(model.named_parameters())
    return {key for key in after if not torch.equal(after[key], before[key])}, model


@pytest.mark.parametrize(
    "name, parts",
    [
        ("ours", ("steering",)),
        ("trainer_lora", ("lora_",)),
        ("plain_wrapper", ("up.weight", "down.weight")),
    ],
)
def test_each_trains_its_own_parameters(workload, name, parts):
    changed, _ = trained_by(workload, name)
    assert changed and all(any(part in key for part in parts) for key in changed)


def test_what_the_other_contestants_train(workload):
    changed, _ = trained_by(workload, "ours_quarter")
    layers = {key.split("layers.")[1].split(".")[0] for key in changed}
    assert layers == {str(layer) for layer in workload.quarter()}
    assert workload.quarter() == [len(blocks(workload.model)) - 1]
    changed, model = trained_by(workload, "trainer_full")
    assert changed == {key for key, _ in model.named_parameters()}
    for name in ("floor_forward", "floor", "floor_quarter"):
        assert trained_by(workload, name)[0] == set()


@pytest.mark.parametrize("name, layer", [("floor", 0), ("floor_quarter", 1)])
def test_a_lower_bound_has_its_only_gradient_at_the_lowest_steered_block(workload, name, layer):
    turn = CONTESTANTS[name].prepare(workload, name)
    turn()
    assert turn.gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in turn.model.parameters())
    # the same gradient, computed by a steering
    model = copy.deepcopy(workload.bare_model()).requires_grad_(False)
    steering = steer(model, SteeringConfig(kind="vector", layers=[layer]))
    completion_loss(model, workload.grouped[-1]).backward()
    expected = next(iter(steering.parameters())).grad
    assert torch.allclose(turn.gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_plain_wrapper_has_our_loss_and_our_gradients(workload):
    batch, model = workload.arrival_batches()[0], workload.bare_model()
    steered, plain = (copy.deepcopy(model).requires_grad_(False) for _ in range(2))
    steering = steer(steered, SteeringConfig(rank=4))
    plain = plain_wrapper(plain, 4)
    unsteered = model(**batch).loss
    assert torch.allclose(plain(**batch).loss, unsteered, rtol=1e-5, atol=0)
    for layer, adapter in enumerate(steering.adapters.values()):
        nn.init.normal_(adapter.up, std=0.2)
        blocks(plain)[layer].up.weight.data = adapter.up.data.clone()
        blocks(plain)[layer].down.weight.data = adapter.down.data.clone()
    ours = completion_loss(steered, batch) / (batch["labels"] != -100).sum()
    theirs = plain(**batch).loss
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0)
    assert not torch.allclose(theirs, unsteered, rtol=1e-3, atol=0)
    ours.backward()
    theirs.backward()
    for layer, adapter in enumerate(steering.adapters.values()):
        other = blocks(plain)[layer].up.weight.grad
        assert torch.allclose(adapter.up.grad, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "gpt2"])
def test_the_plain_wrapper_fits_other_models(kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    assert torch.equal(plain_wrapper(model, 2)(input_ids=ids).logits, expected)


def test_decoding_repeats_the_same_tokens(workload):
    model, lengths = copy.deepcopy(workload.bare_model()), []

    def note(module, args, kwargs):
        seen = kwargs["past_key_values"].get_seq_length()
        lengths.append((kwargs["input_ids"].shape[1], seen))

    model.register_forward_pre_hook(note, with_kwargs=True)
    DecodeTurn(workload, "decode_bare", lambda workload: model)()
    prompt = len(workload.encoded[0].input_ids)
    assert lengths == [(prompt, 0)] + 2 * [(1, prompt + step) for step in range(STEPS)]


def test_the_trained_steering_changes_activations(workload):
    ids = workload.grouped[0]["input_ids"]
    with torch.no_grad(), capture(workload.bare_model()) as before:
        workload.model(input_ids=ids)
    with torch.no_grad(), capture(workload.trained) as after:
        workload.trained(input_ids=ids)
    assert any(not torch.equal(before[site], after[site]) for site in before)
    assert not workload.trained.get_input_embeddings()._forward_pre_hooks
    assert not any(parameter.requires_grad for parameter in workload.trained.parameters())


# The record


def test_one_run_measures_everything(measured):
    assert list(measured.seconds) == HERE
    turns = {"training": 2, "forward": 6, "decode": 8, "rows": 2, "evaluation": 2}
    for name, times in measured.seconds.items():
        assert len(times) == turns[CONTESTANTS[name].kind], name
    counts = measured.counts
    assert set(counts) == set(TRAINING)
    for name in ("floor", "floor_forward", "ours_quarter", "floor_quarter"):
        assert counts[name] == counts["ours"]
    for name in (
        "plain_wrapper",
        "trainer_lora",
        "trainer_ours",
        "trainer_full",
    ):  # logits of all tokens
        assert counts[name]["logits"] == counts[name]["tokens"] > counts["ours"]["logits"]
    assert measured.predictions["identical"] == measured.predictions["examples"] == 4
    assert set(measured.saved) == {
        *("ours", "ours_quarter", "trainer_lora", "trainer_ours", "trainer_full")
    }
    assert measured.saved["ours"] > measured.adapter["bytes"]
    assert "STEER_NB_PYREFT_PYTHON" in measured.notes[0]
    described = json.dumps(measured.machine)
    assert os.uname().nodename not in described and os.getcwd() not in described
    assert measured.machine["threads"] == torch.get_num_threads()


def test_the_table_has_the_medians_of_the_raw_times(measured):
    raw = {
        "ours": [3.0, 1.0, 2.0],
        "trainer_lora": [8.0, 4.0, 6.0],
        "plain_wrapper": [3.0, 3.0, 3.0],
        "floor": [1.9, 2.1, 1.8],
        "decode_bare": [1.0, 1.0, 4.0, 2.0],
        "decode_steered": [2.0, 1.0, 1.0, 3.0],
    }
    units = {name: 8 if name.startswith("decode") else 10 for name in raw}
    made = Bench(**{**vars(measured), "seconds": raw, "units": units})
    frame, targets = made.frame.set_index("contestant"), made.targets.set_index("target")
    assert frame.seconds.to_dict() == {
        "ours": 2.0,
        "trainer_lora": 6.0,
        "plain_wrapper": 3.0,
        "floor": 1.9,
        "decode_bare": 1.5,
        "decode_steered": 1.5,
    }
    ours = frame.loc["ours"]
    assert (ours["per second"], ours["× LoRA"], ours.lowest, ours.highest) == (5, 3, 1, 3)
    assert frame["× LoRA"].isna()["decode_bare"]
    assert targets.measured["training, × plain wrapper"] == 1.5
    assert targets.met["training, × plain wrapper"] is True
    assert targets.measured["training, × lower bound"] == pytest.approx(0.9)
    # the median of the ratios of pairs
    assert targets.measured["time of a steered decode step / unsteered"] == 1.25
    assert targets.met["time of the last quarter / its lower bound"] is None
    assert len(targets) == len(TARGETS)


def test_a_record_is_loaded_as_it_was_saved(measured, tmp_path):
    path = measured.save(tmp_path / "new" / "bench.json")
    assert Bench.load(path) == measured
    assert Bench.load(path)._repr_markdown_() == measured._repr_markdown_()
    content = json.loads(path.read_text())
    without_seconds = {key: value for key, value in content.items() if key != "seconds"}
    for damaged in ("[]", "{", {**content, "schema": 2}, without_seconds):
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        with pytest.raises(BenchError, match="bench.json"):
            Bench.load(path)


def test_only_some_contestants():
    threads = torch.get_num_threads()
    found = bench(**SETTINGS, repetitions=1, threads=1, only=["floor", "ours"], memory=False)
    assert list(found.seconds) == ["ours", "floor"]
    assert found.predictions is None and found.notes == []
    assert found.targets.set_index("target").met["training, × lower bound"] in (True, False)
    assert torch.get_num_threads() == threads and found.machine["threads"] == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"only": ["our"]}, "did you mean 'ours'"),
        ({"only": ["trainer-lora"]}, "did you mean 'trainer_lora'"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(BenchError, match=message):
        bench(**{**SETTINGS, "memory": False, **wrong})


# Other processes


def test_memory_is_measured_in_a_process_of_its_own():
    hoard = torch.ones(60_000_000)  # 229 MiB that the contestant does not use
    assert 0 < peak_memory("ours", 1, **SETTINGS) < 100
    del hoard


def a_python(folder, script: str) -> str:
    "A program in place of another Python."
    path = folder / "python"
    path.write_text(f"#!{sys.executable} -S\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_process_without_an_answer_is_an_error(tmp_path, monkeypatch):
    python = a_python(tmp_path, "raise ValueError('no task')")
    monkeypatch.setattr(contestants.sys, "executable", python)
    with pytest.raises(BenchError, match="ours: its memory was not measured: .*no task"):
        peak_memory("ours", 1, **SETTINGS)
    with pytest.raises(BenchError, match="did you mean 'ours'"):
        peak_memory("our", 1, **SETTINGS)


@pytest.mark.parametrize(("holes", "threshold"), [(True, 0), (False, 2**17)])
def test_without_holes_glibc_returns_large_blocks_at_once(tmp_path, monkeypatch, holes, threshold):
    script = "import os; print('answer', os.environ.get('MALLOC_MMAP_THRESHOLD_', 0))"
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(contestants.sys, "executable", a_python(tmp_path, script))
    assert peak_memory("ours", 1, holes, **SETTINGS) == threshold


STAND_IN = """
import json, sys
from pathlib import Path
job = json.loads((Path(sys.argv[2]) / "job.json").read_text())
about = {"loss": LOSS, "trained": 5, "versions": {"pyreft": "0"}}
print("noise")
print("answer " + json.dumps(about), flush=True)
for number, line in enumerate(sys.stdin):
    memory = line.strip() == "memory"
    content = {"memory": 17.0} if memory else {"seconds": 100.0 + number}
    print("answer " + json.dumps(content), flush=True)
"""


def test_pyreft_times_itself_in_its_own_process(workload, tmp_path):
    loss = float(workload.bare_model()(**workload.arrival_batches()[0]).loss.detach())
    only = ["pyreft_loreft", "floor_forward"]
    options = {**SETTINGS, "only": only, "repetitions": 2, "memory": False}
    found = bench(**options, pyreft_python=a_python(tmp_path, STAND_IN.replace("LOSS", str(loss))))
    # the first two requests are memory and warm-up
    assert found.seconds["pyreft_loreft"] == [102.0, 103.0]
    assert "5 parameters" in found.notes[0]
    with pytest.raises(BenchError, match="pyreft has another model"):
        bench(**options, pyreft_python=a_python(tmp_path, STAND_IN.replace("LOSS", "9.0")))


@pytest.mark.parametrize(
    "script, message",
    [("raise ImportError('no pyreft here')", "no pyreft here"), ("", "no error was printed")],
)
def test_without_pyreft_there_is_a_note(tmp_path, script, message):
    found = bench(
        **SETTINGS,
        only=["pyreft_loreft", "floor_forward"],
        repetitions=1,
        memory=False,
        pyreft_python=a_python(tmp_path, script),
    )
    assert list(found.seconds) == ["floor_forward"] and message in found.notes[0]


class Shifted(nn.Module):
    "A stand-in for pyreft's model: one vector is added to the embeddings."

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model.requires_grad_(False), config
        self.vector = nn.Parameter(torch.zeros(model.config.hidden_size))

    def set_device(self, device):
        self.to(device)

    def forward(self, inputs, unit_locations, labels):
        embedded = self.model.get_input_embeddings()(inputs["input_ids"]) + self.vector
        mask = inputs["attention_mask"]
        return None, self.model(inputs_embeds=embedded, attention_mask=mask, labels=labels)


def test_the_program_for_pyreft(workload, tmp_path, monkeypatch, capsys):
    "It reports the model's loss, and trains the batches of the job at each request."
    made = []
    pyreft = SimpleNamespace(
        LoreftIntervention=lambda **options: options,
        ReftConfig=lambda representations: representations,
        get_reft_model=lambda *args, set_device: made.append(Shifted(*args)) or made[0],
    )
    monkeypatch.setitem(sys.modules, "pyreft", pyreft)
    model = workload.bare_model()
    model.save_pretrained(tmp_path / "model")
    batches = [
        {key: tensor.tolist() for key, tensor in batch.items()}
        for batch in workload.arrival_batches()
    ]
    job = {"batches": batches, "longest": batches[:1], "rank": 4, "lr": 0.1, "threads": 1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    pyreft_process.main(tmp_path, ["memory\n", "turn\n"])
    lines = capsys.readouterr().out.splitlines()
    about, memory, turn = (json.loads(line.removeprefix("answer ")) for line in lines)
    expected = model(**workload.arrival_batches()[0]).loss.item()
    assert about["loss"] == pytest.approx(expected, rel=1e-5)
    assert about["trained"] == model.config.hidden_size
    assert memory["memory"] >= 0 and turn["seconds"] > 0
    assert [row["layer"] for row in made[0].config] == list(range(len(blocks(model))))
    assert made[0].vector.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.skipif(
    "STEER_NB_PYREFT_PYTHON" not in os.environ,
    reason="needs pyreft 0.1.0 and transformers 4.45 in another environment",
)
def test_pyreft_itself():
    python = os.environ["STEER_NB_PYREFT_PYTHON"]
    found = bench(**SETTINGS, only=["pyreft_loreft"], repetitions=2, pyreft_python=python)
    assert len(found.seconds["pyreft_loreft"]) == 2 and found.memory["pyreft_loreft"] > 0
    assert "pyreft 0.1.0" in found.notes[0]


# Costs


def test_costs_are_measured_on_every_axis():
    config = load_testbed("tiny-llama")[0].config
    axes = {axis: values[:2] for axis, values in AXES.items()}
    usual = {"layers": 2, "rank": 2, "length": 8, "batch": 2}
    rows = costs(config, axes, usual, repetitions=1)
    expected = [(axis, value) for axis, values in axes.items() for value in values]
    assert [(row["axis"], row["value"]) for row in rows] == expected
    assert list(exponents(rows).axis) == list(AXES) and config.num_hidden_layers == 2
    with pytest.raises(BenchError, match="did you mean 'length'"):
        costs(config, {"lenght": (1, 2)})


# The command


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from steer_nb.cli.cli import app

    sizes = ["--n", "4", "--n-test", "2", "--batch-size", "2", "--repetitions", "1", "--no-memory"]
    words = ["bench", "--model", "tiny-llama", "--task", "listops", *sizes]
    output = str(tmp_path / "bench.json")
    done = CliRunner().invoke(app, [*words, "--only", "ours,floor", "--output", output])
    assert done.exit_code == 0, done.output
    assert list(Bench.load(output).seconds) == ["ours", "floor"]
    assert "training, × lower bound" in done.stdout


def test_kinds_are_complete():
    assert {one.kind for one in CONTESTANTS.values()} == set(KINDS) == set(ROUNDS)
