"""Training that is killed, stopped, out of disk or out of range, by real signals and limits.

The measure is always the same: the final parameters are bit-identical to an uninterrupted run.
"""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import run, start
from toy import tiny, tokenizer, toy

from steer_nb.data.models import load_model
from steer_nb.methods.registry import METHODS, apply_method
from steer_nb.training import checkpoints, loss
from steer_nb.training.checkpoints import Checkpoints
from steer_nb.training.config import (
    CHECKPOINT_FOLDER,
    LOCK,
    OutputError,
    TrainConfig,
    TrainError,
    check_output,
)
from steer_nb.training.fit import fit
from steer_nb.training.run import Run

STEPS = 40


def train(folder, every, limit=None):
    "A training of `STEPS` steps, in a child process; prints JSON at its end."
    warnings.simplefilter("always")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    model = tiny("gpt2", n_embd=128)  # it has dropout, so random numbers matter
    method = apply_method(model, "joint", weights="full", weight_layers=[1], weights_lr=0.1)
    config = TrainConfig(lr=1e-2, epochs=5, batch_size=4, evaluations_per_epoch=2)
    print("ready")
    record = fit(method, tokenizer, toy, config, output=folder, checkpoint_every=every)
    gradients = any(parameter.grad is not None for parameter in model.parameters())
    said = {"stopped": record.stopped, "steps": record.steps, "resumed": record.resumed}
    print(json.dumps({**said, "usable": not model.training and not gradients}))


def launch(folder, every=0.0, limit=None):
    environment = {"ACCELERATE_USE_CPU": "true"}
    return start(train, str(folder), every, limit, environment=environment)


def finish(child):
    "What it printed, and its errors; it must end without one."
    done = child.wait()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def results(folder):
    "What was trained, as bytes, and the curve."
    record = Run.load(folder / "run.json")
    files = {path.name: path.read_bytes() for path in (folder / "method").iterdir()}
    return files, record.curve, record.validation, record.best_step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    said, _ = finish(launch(folder, every=60.0))
    assert said == {"stopped": None, "steps": STEPS, "resumed": [], "usable": True}
    assert sorted(path.name for path in folder.iterdir()) == ["method", "run.json"]
    return results(folder)


def steps_on_disk(folder):
    return Checkpoints(folder / CHECKPOINT_FOLDER).numbers()


def newest_step(folder):
    return max(steps_on_disk(folder), default=-1)


def being_written(folder):
    return any(name.startswith(".part-") for name in os.listdir(folder / CHECKPOINT_FOLDER))


def kill_after(folder, step):
    "Start a training, and kill it when it has a checkpoint of this step."
    child = launch(folder)
    child.wait_for(lambda: newest_step(folder) >= step)
    child.kill()
    child.wait()


def test_two_trainings_in_one_folder(uninterrupted, tmp_path):
    "The second says so at its start, and the first one's results are not touched."
    folder = tmp_path / "run"
    first = launch(folder)
    first.wait_for(lambda: newest_step(folder) >= 2)
    second = launch(folder).wait()
    assert first.running(), "it ended before the second began: make the training longer"
    assert second.returncode != 0 and "another process trains with the output" in second.stderr
    finish(first)
    assert results(folder) == uninterrupted
    again = launch(folder).wait()  # complete: a third needs overwrite
    assert "exists already" in again.stderr and results(folder) == uninterrupted


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, uninterrupted, tmp_path):
    "Kills at random moments, each at least a step after the last, and one during a write."
    folder, chance, progress = tmp_path / "run", random.Random(0), [-1]
    for number in range(kills):
        child = launch(folder)
        before = newest_step(folder)
        child.wait_for(lambda before=before: newest_step(folder) > before)
        if number == 1:
            while not being_written(folder):
                assert child.running()
        else:
            time.sleep(chance.uniform(0, 0.1))
        assert child.running(), "it ended before it was killed: make the training longer"
        child.kill()
        child.wait()
        assert number != 1 or being_written(folder), "the second kill was to interrupt a write"
        progress.append(newest_step(folder))
        assert not (folder / "run.json").exists()
    assert progress == sorted(progress) and progress[-1] > progress[1]
    said, _ = finish(launch(folder))
    assert said["stopped"] is None and said["steps"] == STEPS and len(said["resumed"]) == kills
    assert results(folder) == uninterrupted
    assert sorted(path.name for path in folder.iterdir()) == ["method", "run.json"]
    assert Run.load(folder / "run.json").resumed == said["resumed"]


def test_a_truncated_checkpoint_is_skipped_with_a_warning(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    kill_after(folder, 6)
    numbers = steps_on_disk(folder)
    path = folder / CHECKPOINT_FOLDER / f"{numbers[-1]:08d}" / checkpoints.TENSOR_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said, errors = finish(launch(folder))
    assert f"{numbers[-1]:08d} is damaged" in errors and "the one before it is used" in errors
    assert said["resumed"] == [numbers[-2]] and results(folder) == uninterrupted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_and_the_next_call_resumes(uninterrupted, tmp_path, name):
    folder = tmp_path / "run"
    child = launch(folder, every=3600.0)
    child.wait_for((folder / CHECKPOINT_FOLDER).exists)
    time.sleep(0.2)
    child.signal(getattr(signal, name))
    said, _ = finish(child)  # it ends by itself, without an error
    assert said["stopped"] == name and 0 <= said["steps"] < STEPS and said["usable"]
    assert newest_step(folder) == said["steps"] and not (folder / "run.json").exists()
    again, _ = finish(launch(folder))
    assert again["resumed"] == [said["steps"]] and results(folder) == uninterrupted


def test_a_full_disk_is_a_warning_until_the_results_are_written(uninterrupted, tmp_path):
    "A limit on the size of files is a full disk to the process that has it."
    folder = tmp_path / "run"
    kill_after(folder, 3)
    before = newest_step(folder)
    done = launch(folder, limit=20_000).wait()
    assert done.returncode == 1
    assert done.stderr.count("UserWarning: no checkpoint could be written") == 1
    assert "OutputError: the training is complete and the model has its parameters" in done.stderr
    assert newest_step(folder) == before and not (folder / "run.json").exists()
    finish(launch(folder))
    assert results(folder) == uninterrupted


def write_checkpoints(folder):
    "Write checkpoints until killed; all tensors of one have its number."
    store = Checkpoints(folder)
    print("ready")
    for number in itertools.count(max(store.numbers(), default=0) + 1):
        store.save(number, {"weight": torch.full((200_000,), float(number))}, {"number": number})


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_complete_checkpoints(kills, tmp_path):
    newest = []
    for number in range(kills):
        child = start(write_checkpoints, str(tmp_path))
        child.wait_for(lambda child=child: "ready" in child.output())
        time.sleep(0.02 + 0.037 * (number % 6))
        child.kill()
        child.wait()
        found = Checkpoints(tmp_path).newest()
        if found is not None:
            assert found.record["number"] == found.number
            assert torch.equal(found.tensors["weight"], torch.full((200_000,), float(found.number)))
        newest.append(found.number if found else 0)
    assert newest == sorted(newest) and newest[-1] > 0


@pytest.mark.slow
def test_interrupt_kernel_in_jupyter(tmp_path):
    "A real kernel is interrupted as by the button: the cell ends, and the next one runs."
    from jupyter_client.manager import start_new_kernel

    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)

    def answer(message):
        while (reply := client.get_shell_msg(timeout=240))["parent_header"]["msg_id"] != message:
            pass
        assert reply["content"]["status"] == "ok", reply["content"]

    try:
        setup = "from toy import *\nfrom steer_nb import TrainConfig, fit, steer"
        answer(client.execute(f"{setup}\nmodel = tiny(); steering = steer(model)"))
        config = "TrainConfig(lr=1e-3, epochs=5000, batch_size=4)"
        output = str(tmp_path / "run")
        call = f"run = fit(model, tokenizer, toy, {config}, output={output!r})"
        message = client.execute(call)
        while not (tmp_path / "run" / CHECKPOINT_FOLDER).exists():
            time.sleep(0.05)
        time.sleep(1)
        manager.interrupt_kernel()
        answer(message)
        check = "assert run.stopped == 'SIGINT' and 0 < run.steps < run.planned, run"
        use = "model(**tokenizer('max of 1 =', return_tensors='pt'))"
        answer(client.execute(f"{check}\nassert not model.training\n{use}"))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert steps_on_disk(tmp_path / "run") and not (tmp_path / "run" / "run.json").exists()


# In this process


def tiny_method(name="post_block_linear", **options):
    return apply_method(tiny(), name, **options)


CONFIG = TrainConfig(lr=1e-2, epochs=2, batch_size=8)


def break_after(method, passes):
    "KeyboardInterrupt in the middle of a forward pass, after so many of them in training mode."
    seen = []

    def hook(module, args, output):
        seen.extend([1] * module.training)
        if len(seen) > passes:
            raise KeyboardInterrupt

    method.model.get_input_embeddings().register_forward_hook(hook)
    return method


def interrupt(method, passes, task=toy, config=CONFIG, **options):
    "Interrupt a training after so many passes, with a checkpoint after each step."
    with pytest.raises(KeyboardInterrupt):
        broken = break_after(method, passes)
        fit(broken, tokenizer, task, config, checkpoint_every=0, **options)


def state_of(method):
    parameters = method.model.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_resume(make, passes, task=toy, config=CONFIG, folder=None):
    "Resumed after an interruption, it equals an uninterrupted one. Returns record and method."
    reference, again = make(), make()
    expected = fit(reference, tokenizer, task, config)
    interrupt(make(), passes, task, config, output=folder)
    record = fit(again, tokenizer, task, config, output=folder, checkpoint_every=0)
    assert record.resumed == [passes % expected.planned]
    assert record.curve == expected.curve and record.validation == expected.validation
    assert record.best_step == expected.best_step
    assert same(state_of(again), state_of(reference)) and again.options == reference.options
    return record, again


MECHANISMS = {
    "post_block_linear": "plain",
    "lora": "adapters of PEFT",
    "jola": "random gates, a penalty",
    "joint": "two groups, a projection after each step",
    "lofit": "two stages",
}


@pytest.mark.parametrize(
    "name, passes",
    [
        *((name, 3) for name in MECHANISMS),
        ("lofit", 11),  # in the second stage
        *(
            pytest.param(name, 3, marks=pytest.mark.slow)
            for name in METHODS
            if name not in MECHANISMS
        ),
    ],
)
def test_every_mechanism_resumes(name, passes, tmp_path):
    check_resume(lambda: tiny_method(name), passes, folder=tmp_path)


def test_what_a_method_remembers_is_restored(tmp_path):
    "Joint training that projects once has done so before the break, and must not do it again."
    check_resume(lambda: tiny_method("joint", project="once", every=2), 4, folder=tmp_path)


def test_groups_that_are_not_trained_yet_resume(tmp_path):
    "The optimizer has no state for the steering at the break, and must not begin one early."
    make = lambda: tiny_method("joint", activations_window=(0.5, 1.0), project="never")  # noqa: E731
    check_resume(make, 3, folder=tmp_path)


def test_the_best_parameters_of_before_the_break_are_kept(tmp_path):
    "Validation is best before the break and never again."
    config = replace(CONFIG, lr=0.5, epochs=6, schedule="constant", evaluations_per_epoch=2)
    record, _ = check_resume(tiny_method, 20, config=config, folder=tmp_path)
    assert 0 < record.best_step < 20 and record.validation[-1]["loss"] > record.best_loss


def test_without_validation_the_last_state_resumes(tmp_path):
    check_resume(tiny_method, 4, replace(toy, validation=()), folder=tmp_path)


@pytest.mark.parametrize("validation", [toy.validation, ()], ids=["best", "last finite"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_after_an_error_the_model_has_the_best_parameters(validation, value):
    """The sixth pass gives a loss that is not finite: as if training had ended after step 4.

    Without validation, the parameters after step 5 have never had a finite loss."""
    task = replace(toy, validation=validation)
    config = replace(CONFIG, schedule="constant", warmup_ratio=0)
    broken, expected = tiny_method(), tiny_method()
    passes = []

    def hook(module, args, output):
        passes.extend([1] * module.training)
        return output * float(value) if module.training and len(passes) >= 6 else None

    handle = broken.model.model.norm.register_forward_hook(hook)
    with pytest.raises(TrainError, match="loss is (nan|inf) at step 6: .* parameters from after"):
        fit(broken, tokenizer, task, config)
    handle.remove()
    fit(expected, tokenizer, task, replace(config, max_steps=4))
    assert same(state_of(broken), state_of(expected)) and not broken.model.training
    assert all(parameter.grad is None for parameter in broken.model.parameters())


def test_a_model_that_is_not_finite_is_an_error_before_training():
    method = tiny_method()
    method.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainError, match="validation loss is nan at step 0.*before training"):
        fit(method, tokenizer, toy)


@pytest.fixture
def unfinished(tmp_path):
    interrupt(tiny_method(), 3, output=tmp_path / "run")
    return tmp_path / "run"


def test_another_process_creates_the_checkpoints_while_this_one_looks(tmp_path, monkeypatch):
    "Under a launcher: the first process takes the lock between two looks of the second."
    folder, listdir = tmp_path / "run", os.listdir

    def then_created(path):
        names = listdir(path)
        (folder / "checkpoints").mkdir(exist_ok=True)
        return names

    folder.mkdir()
    monkeypatch.setattr(os, "listdir", then_created)
    assert check_output(folder, overwrite=False) == folder


def test_another_training_is_an_error_with_the_difference(unfinished):
    fewer, faster = replace(toy, train=toy.train[1:]), replace(CONFIG, lr=2e-2)
    gpt2 = apply_method(tiny("gpt2"), "post_block")
    other = tiny_method()
    other.model.model.embed_tokens.weight.data.mul_(1.1)
    for method, task, config, words in (
        (tiny_method(), toy, faster, "config.lr was 0.01, now 0.02"),
        (tiny_method(rank=4), toy, CONFIG, "options.rank was 8, now 4"),
        (tiny_method("loreft"), toy, CONFIG, "method was 'post_block_linear', now 'loreft'"),
        (tiny_method(), fewer, CONFIG, "examples was"),
        (gpt2, toy, CONFIG, "model was 'llama', now 'gpt2'"),
        (other, toy, CONFIG, "frozen weights was"),
    ):
        with pytest.raises(TrainError, match="unfinished training that is not the same") as error:
            fit(method, tokenizer, task, config, output=unfinished)
        assert words in str(error.value) and "restart=True" in str(error.value)
    assert newest_step(unfinished) == 3  # nothing has changed
    record = fit(tiny_method(), tokenizer, toy, faster, output=unfinished, restart=True)
    assert record.resumed == [] and record.steps == 8
    assert Run.load(unfinished / "run.json") == record
    with pytest.raises(TrainError, match="exists already"):  # restart deletes no results
        fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished, restart=True)


def test_overwrite_resumes_the_same_and_deletes_another(unfinished):
    "A command with --overwrite is one that is rerun after a kill, too."
    options = {"output": unfinished, "overwrite": True}
    assert fit(tiny_method(), tokenizer, toy, CONFIG, **options).resumed == [3]
    interrupt(tiny_method(), 5, **options)  # now the folder has results and checkpoints
    other = replace(CONFIG, lr=2e-2)
    assert fit(tiny_method(), tokenizer, toy, other, **options).resumed == []
    interrupt(tiny_method(), 5, **options)
    assert fit(tiny_method(), tokenizer, toy, CONFIG, **options).resumed == [5]


def test_killed_between_the_results_and_the_end(unfinished, monkeypatch):
    "The results are written, the checkpoints still there: the same call completes it."
    record = fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished)
    before = results(unfinished)
    store = Checkpoints(unfinished / CHECKPOINT_FOLDER)
    monkeypatch.setattr(Checkpoints, "clear", lambda self: None)
    fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished, overwrite=True)
    monkeypatch.undo()
    assert (unfinished / "run.json").exists() and store.numbers()
    again = fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished)
    assert again.resumed == [again.steps] and again.curve == record.curve
    assert not store.folder.exists() and results(unfinished) == before
    with pytest.raises(TrainError, match="exists already"):
        fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished)


@pytest.mark.parametrize("reader", ["file_sha256", "read_json"])
def test_a_disk_that_fails_does_not_start_the_training_again(unfinished, monkeypatch, reader):
    "Also not with overwrite, which resumes the same training."
    numbers = steps_on_disk(unfinished)

    def fails(path, *args):
        try:
            raise OSError(5, "Input/output error")
        except OSError as error:
            if reader == "read_json":  # it raises its own error from the disk's
                raise TrainError("cannot be read as JSON") from error
            raise

    monkeypatch.setattr(checkpoints, reader, fails)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="cannot be read .*Input/output error.*restart=True"):
            fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished, overwrite=overwrite)
    monkeypatch.undo()
    assert steps_on_disk(unfinished) == numbers
    assert fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished).resumed


def test_a_signal_in_the_last_step_acts_when_the_results_are_written(tmp_path):
    method, passes = tiny_method(), itertools.count(1)

    def hook(*_):
        if torch.is_grad_enabled() and next(passes) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    method.model.register_forward_pre_hook(hook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(method, tokenizer, toy, CONFIG, output=tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["method", "run.json"]
    record = Run.load(tmp_path / "run" / "run.json")
    assert record.stopped is None and record.steps == record.planned == 8


def test_the_loss_in_pieces_resumes(tmp_path, monkeypatch):
    "Pieces are computed again in the backward pass, and draw no random numbers."
    monkeypatch.setattr(loss, "LOGITS", 3 * len(tokenizer))
    check_resume(lambda: apply_method(tiny("gpt2"), "lora"), 3, folder=tmp_path)


def test_another_version_is_a_warning(unfinished):
    path = unfinished / CHECKPOINT_FOLDER / f"{newest_step(unfinished):08d}"
    content = json.loads((path / checkpoints.STATE_FILE).read_text())
    content["record"]["versions"]["torch"] = "1.0"
    (path / checkpoints.STATE_FILE).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="began with torch 1.0"):
        record = fit(tiny_method(), tokenizer, toy, CONFIG, output=unfinished)
    assert record.resumed == [3]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    method = tiny_method()
    before = state_of(method)
    places = [tmp_path / "file" / "run", *([Path("/proc/run")] if sys.platform == "linux" else [])]
    for folder in places:
        with pytest.raises(TrainError, match="cannot write to"):
            fit(method, tokenizer, toy, CONFIG, output=folder)
    assert same(before, state_of(method))


def train_a_hub_model(cache):
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_CACHE = cache
    model, its_tokenizer = load_model("someone/tiny")
    print(fit(apply_method(model, "post_block"), its_tokenizer, toy, CONFIG).revision)


def test_the_record_has_the_commit_of_a_hub_model(tmp_path):
    "A cache laid out as the Hub's client does it: an id without a revision becomes its commit."
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    tiny().save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(commit)
    done = run(train_a_hub_model, str(tmp_path))
    assert done.stdout.strip().splitlines()[-1:] == [commit], done.stderr
    assert fit(tiny_method(), tokenizer, toy, replace(CONFIG, max_steps=1)).revision is None


def test_nothing_is_pickled(unfinished):
    for path in unfinished.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors") or path.name == LOCK, path
    for path in Path(checkpoints.__file__).parents[1].rglob("*.py"):
        text = path.read_text()
        for call in ("torch.load(", "import pickle", "torch.save("):
            assert call not in text, path


# Half precision


def overflow_at(method, steps):
    "The gradient of the last hidden state becomes infinite in these passes, as by an overflow."
    seen = []

    def hook(module, args, output):
        if module.training:
            seen.append(1)
            if len(seen) in steps:
                output.register_hook(lambda gradient: gradient * float("inf"))

    method.model.model.norm.register_forward_hook(hook)
    return method


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_an_overflow_is_skipped_and_counted(precision):
    method, steps = overflow_at(tiny_method(), (2, 5)), []
    method.after_step = lambda step, *_: steps.append(step)
    record = fit(method, tokenizer, toy, replace(CONFIG, precision=precision))
    assert (record.skipped, record.steps, record.planned) == (2, 6, 8)
    assert [point["step"] for point in record.curve] == [1, 3, 4, 6, 7, 8] == steps
    assert all(parameter.isfinite().all() for parameter in method.model.parameters())
    assert record.best_loss < record.validation[0]["loss"]


def test_a_skipped_first_step_resumes(tmp_path):
    "The optimizer has no state at the break; the scale of float16 is restored."
    make = lambda: overflow_at(tiny_method(), (1,))  # noqa: E731
    config = replace(CONFIG, precision="float16")
    reference, again = make(), tiny_method()  # resumed, it makes no first step
    expected = fit(reference, tokenizer, toy, config)
    interrupt(make(), 1, config=config, output=tmp_path)
    record = fit(again, tokenizer, toy, config, output=tmp_path)
    assert record.resumed == [1] and record.skipped == expected.skipped == 1
    assert record.curve == expected.curve and same(state_of(again), state_of(reference))


def test_an_overflow_too_large_for_the_scale_lowers_it():
    "A loss times 2^16 that float16 cannot hold: the scale is halved until it fits."
    method = tiny_method()
    method.model.model.norm.register_forward_hook(
        lambda module, args, output: output * 64.0 if module.training else None
    )
    record = fit(method, tokenizer, toy, replace(CONFIG, precision="float16", epochs=4))
    assert 0 < record.skipped < 10 and record.steps == 16 - record.skipped


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_ten_overflows_in_a_row_are_an_error(precision):
    config = replace(CONFIG, precision=precision, epochs=4)
    method = overflow_at(tiny_method(), range(6, 99))
    message = "gradient is (inf|nan) at step 15, after 9 skipped steps in a row"
    with pytest.raises(TrainError, match=message):
        fit(method, tokenizer, toy, config)
    trained = state_of(method)
    assert all(parameter.isfinite().all() for parameter in trained.values())
    assert not same(trained, state_of(tiny_method()))


def test_in_float32_an_overflow_is_an_error_at_once():
    with pytest.raises(TrainError, match="gradient is (inf|nan) at step 3:"):
        fit(overflow_at(tiny_method(), (3,)), tokenizer, toy, CONFIG)
