"Training compared with independent computations, and the contents of its record."

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from children import run
from torch.nn import functional as F
from toy import tiny, tokenizer, toy

from steer_nb.core.config import SteeringConfig
from steer_nb.core.steering import steer
from steer_nb.data.encoding import collate, encode
from steer_nb.methods.peft import lora_model
from steer_nb.training.config import TrainConfig, TrainError, learning_rates
from steer_nb.training.fit import fit
from steer_nb.training.method import Group, Method
from steer_nb.training.plan import Plan

UNSEEN = replace(toy, validation=())
LENGTHS = [len(encode(tokenizer, example).input_ids) for example in toy.train]


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def mean_loss(model, indices):
    "The mean over labelled tokens, one example at a time, by plain PyTorch."
    losses = []
    for index in indices:
        batch = collate(tokenizer, [encode(tokenizer, toy.train[index])])
        logits, labels = model(batch["input_ids"]).logits[0, :-1], batch["labels"][0, 1:]
        losses.append(F.cross_entropy(logits, labels, reduction="none")[labels != -100])
    return torch.cat(losses).mean()


class Odd(Method):
    "A method that uses everything: two groups, a window, a penalty, two stages, a clamp."

    def stages(self):
        yield
        self.model.model.norm.weight.data.mul_(2)
        yield

    def groups(self):
        mlps = [p for name, p in self.model.named_parameters() if "mlp" in name]
        others = [p for name, p in self.model.named_parameters() if "mlp" not in name]
        return [Group(mlps, window=(0.5, 1.0), schedule="constant"), Group(others, lr=0.5)]

    def penalty(self):
        return 0.01 * sum(p.square().sum() for p in self.model.parameters())

    def after_step(self, step, ends_epoch, optimizer):
        for parameter in self.model.parameters():
            parameter.clamp_(-0.05 * step, 0.05 * step)


def test_a_method_that_uses_everything_equals_a_loop_by_hand():
    "In float64, where only rounding differs; AdamW can multiply it by its step of 3e-3."
    config = TrainConfig(lr=3e-3, batch_size=8, weight_decay=0.1, max_grad_norm=0.15)
    method = Odd(tiny().double())
    record = fit(method, tokenizer, UNSEEN, config)

    model, losses, norms = tiny().double().train(), [], []
    plan = Plan(LENGTHS, config)
    rates = learning_rates(config, len(plan))
    assert len(plan) == 4
    for stage in range(2):
        if stage:
            model.model.norm.weight.data.mul_(2)
        mlps = [p for name, p in model.named_parameters() if "mlp" in name]
        others = [p for name, p in model.named_parameters() if "mlp" not in name]
        first, second = (torch.optim.AdamW(group, weight_decay=0.1) for group in (others, mlps))
        for step, rate in zip(plan, rates, strict=True):
            loss = mean_loss(model, step.examples)
            (loss + 0.01 * sum(p.square().sum() for p in model.parameters())).backward()
            if step.number <= 2:
                for parameter in mlps:
                    parameter.grad = None
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.15)
            first.param_groups[0]["lr"], second.param_groups[0]["lr"] = rate / 2, 3e-3
            first.step()
            if step.number > 2:
                second.step()
            model.zero_grad()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.05 * step.number, 0.05 * step.number)
            if stage:
                losses.append(float(loss.detach()))
                norms.append(float(norm))
    for name, own in (("loss", losses), ("grad_norm", norms)):
        recorded = [point[name] for point in record.curve]
        assert torch.allclose(torch.tensor(recorded), torch.tensor(own), rtol=0, atol=1e-7), name
    assert max(norms) > 0.15 > min(norms)  # clipping had something to do
    assert torch.allclose(flat(method.model), flat(model), rtol=0, atol=1e-7)


def test_all_parameters_are_trained_with_a_warning_only():
    "A model as it is, is probably one whose steering was forgotten."
    once = TrainConfig(lr=1e-3, max_steps=1)
    with pytest.warns(UserWarning, match=r"call steer\(model\) first"):
        fit(tiny(), tokenizer, UNSEEN, once)
    model = tiny()
    steer(model)
    for meant in (Method(tiny()), model):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fit(meant, tokenizer, UNSEEN, once)
    with pytest.raises(TrainError, match="fit needs a task, not str: use `load_records`"):
        fit(model, tokenizer, "my.jsonl")


def test_accumulation_changes_memory_only():
    "Completions have unequal lengths: averaging the means of the passes would be something else."
    ends, curves = {}, {}
    passes = {
        "8 × 1": {"batch_size": 8},
        "2 × 4": {"batch_size": 2, "accumulation_steps": 4},
        "tokens": {"batch_size": 8, "batch_tokens": 40},
        "3 × 3": {"batch_size": 3, "accumulation_steps": 3},
    }
    for name, options in passes.items():
        model = tiny().double()
        curves[name] = fit(model, tokenizer, toy, TrainConfig(lr=1e-3, **options)).curve
        ends[name] = flat(model)
    for name in ("2 × 4", "tokens"):
        for a, b in zip(curves["8 × 1"], curves[name], strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-12 and a["tokens"] == b["tokens"]
        # AdamW divides by the size of the gradient: rounding errors of tiny ones become 1e-9.
        assert torch.allclose(ends["8 × 1"], ends[name], rtol=0, atol=1e-9)
    assert not torch.allclose(ends["8 × 1"], ends["3 × 3"], rtol=0, atol=1e-6)
    assert len({point["tokens"] for point in curves["8 × 1"]}) > 1


def test_the_seed_decides_and_the_callers_random_numbers_continue():
    ends = []
    for seed in (0, 0, 1):
        model = tiny("gpt2")  # it has dropout
        steering = steer(model, SteeringConfig(rank=4))
        torch.manual_seed(len(ends))
        expected = torch.rand(3)
        torch.manual_seed(len(ends))
        record = fit(model, tokenizer, toy, TrainConfig(lr=1e-2, seed=seed, max_steps=4))
        assert torch.equal(torch.rand(3), expected)
        ends.append((record.curve, torch.cat([p.flatten() for p in steering.parameters()])))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    assert not torch.equal(ends[0][1], ends[2][1])


def test_half_precision_is_close():
    "Of losses of about 2.8: bfloat16 has 8 bits, float16 11."
    runs = {}
    for name in ("float32", "bfloat16", "float16"):
        model = tiny()
        steer(model, SteeringConfig(rank=4))
        config = TrainConfig(lr=3e-2, epochs=3, batch_size=8, precision=name)
        runs[name] = fit(model, tokenizer, toy, config)
        assert runs[name].precision == name
        assert all(p.dtype == torch.float32 for p in model.parameters())
    for name in ("bfloat16", "float16"):
        assert runs[name].curve != runs["float32"].curve and runs[name].skipped <= 2
        for a, b in zip(runs[name].validation, runs["float32"].validation, strict=True):
            assert abs(a["loss"] - b["loss"]) < 0.05


@pytest.mark.parametrize("targets", ["down_porj", ["q_proj", "down_porj"]])
def test_a_misspelt_target_is_an_error_also_among_right_ones(targets):
    "PEFT alone trains q_proj then, without a warning."
    with pytest.raises(TrainError, match="no module 'down_porj'; did you mean 'down_proj'"):
        lora_model(tiny(), 2, targets)
    assert lora_model(tiny(), 2, ["q_proj", "model.layers.1.mlp.down_proj"]) is not None


def train_gpt2(folder):
    model = tiny("gpt2")  # it has dropout
    attributes = set(vars(model))
    steering = steer(model, SteeringConfig(rank=4, positions="prompt"))
    steered = set(vars(model))
    config = TrainConfig(lr=1e-2, epochs=2, batch_size=4, accumulation_steps=2)
    fit(model, tokenizer, toy, config, output=folder)
    assert set(vars(model)) == steered and not model.training
    steering.remove()
    assert set(vars(model)) == attributes


def test_another_process_trains_the_same_bits(tmp_path):
    "Also if a launcher's environment asks for another accumulation: TrainConfig alone decides it."
    for name, environment in (
        ("one", {}),
        ("two", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
    ):
        done = run(train_gpt2, tmp_path / name, environment=environment)
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    tensors = [(folder / "steering" / "steering.safetensors").read_bytes() for folder in (one, two)]
    records = [json.loads((folder / "run.json").read_text()) for folder in (one, two)]
    assert tensors[0] == tensors[1] and records[0]["curve"] == records[1]["curve"]
    assert records[0]["validation"] == records[1]["validation"]
    assert records[0]["best_step"] > 0 and len(records[0]["curve"]) == 8
    text = (one / "run.json").read_text()  # has nothing of the machine but its kind
    for private in (str(tmp_path), os.uname().nodename, os.path.expanduser("~")):
        assert private not in text


def allocate():
    torch.ones(600 * 2**18)


def print_peaks():
    for during in (False, True):
        allocate()
        model = tiny()
        steer(model, SteeringConfig(rank=4))
        if during:
            model.register_forward_pre_hook(lambda *_: allocate())
        print(fit(model, tokenizer, toy, TrainConfig(max_steps=2)).peak_memory)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="only Linux can reset a process's peak"
)
def test_the_peak_of_memory_is_of_this_run():
    "600 MiB that were freed before do not count; the same that the run uses for a moment do."
    done = run(print_peaks)
    assert done.returncode == 0, done.stderr
    before, during = map(float, done.stdout.split())
    assert 550 < during - before < 700, (before, during)


def train_under_bf16():
    model = tiny()
    steer(model, SteeringConfig(rank=4))
    before = set(vars(model))
    record = fit(model, tokenizer, toy, TrainConfig(max_steps=2))
    assert record.precision == "bfloat16"
    assert set(vars(model)) == before and "forward" not in vars(model)
    with pytest.raises(TrainError, match="mixed_precision='bf16'.*precision='float32'"):
        fit(model, tokenizer, toy, TrainConfig(precision="float32"))


def test_a_launcher_with_another_precision():
    done = run(train_under_bf16, environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert done.returncode == 0, done.stderr


def train_on_gpu():
    runs = []
    for _ in range(2):
        model = tiny()
        steer(model, SteeringConfig(rank=4))
        runs.append(fit(model, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2)))
        assert model.device.type == "cuda" and "forward" not in vars(model)
    first, again = runs
    assert first.curve == again.curve and first.validation == again.validation
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert first.precision == ("bfloat16" if native else "float32")
    assert 0 < first.peak_memory < 1000
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    done = run(train_on_gpu)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_real_launcher(tmp_path):
    "Two processes of torchrun end without an abort of gloo's threads, and train as one."
    program = "import sys; from test_train import train_gpt2; train_gpt2(sys.argv[1])"
    (tmp_path / "train.py").write_text(program)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, tmp_path / "train.py", tmp_path / "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


# Trackers


def test_tensorboard_has_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, model = [], tiny()
    config = TrainConfig(lr=1e-2, epochs=2, batch_size=8, log_with="tensorboard")
    run = fit(model, tokenizer, toy, config, output=tmp_path / "run", on_step=seen.append)
    assert [{k: v for k, v in one.items() if k != "validation_loss"} for one in seen] == run.curve
    validated = {one["step"]: one["loss"] for one in run.validation if one["step"]}
    assert {
        one["step"]: one["validation_loss"] for one in seen if "validation_loss" in one
    } == validated
    folder = tmp_path / "run" / "logs" / "steer_nb"
    events = EventAccumulator(str(folder)).Reload()
    for name, of_step in (
        ("loss", {one["step"]: one["loss"] for one in run.curve}),
        ("validation_loss", validated),
    ):
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(of_step, rel=1e-6)  # TensorBoard keeps float32


def test_a_tracker_is_finished_when_a_training_fails(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    finished, finish = [], TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda one: finished.append(finish(one)))

    def fail(point):
        raise RuntimeError("no more")

    config = TrainConfig(lr=1e-2, batch_size=8, log_with="tensorboard")
    with pytest.raises(RuntimeError, match="no more"):
        fit(tiny(), tokenizer, toy, config, output=tmp_path / "run", on_step=fail)
    assert finished == [None]


def test_a_tracker_that_is_not_installed(tmp_path):
    with pytest.raises(TrainError, match="mlflow is not installed"):
        fit(tiny(), tokenizer, toy, TrainConfig(log_with="mlflow"), output=tmp_path / "run")
    with pytest.raises(TrainError, match="did you mean 'tensorboard'"):
        TrainConfig(log_with="tensorbord")
