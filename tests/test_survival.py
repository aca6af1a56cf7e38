"""Training that is killed, stopped, out of room or out of range: real processes, real signals, real limits.

The measure is always the same: what comes out after all of it is bit-equal to a training that nobody disturbed.
"""

import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import TOY

from steer_nb import checkpoints
from steer_nb.methods.registry import METHODS, apply_method
from steer_nb.training.checkpoints import Checkpoints
from steer_nb.training.config import CHECKPOINT_FOLDER, OutputError, TrainConfig, TrainError
from steer_nb.training.fit import fit
from steer_nb.training.run import Run

toy = {}
exec(TOY, toy)
tokenizer, task = toy["tokenizer"], toy["toy"]

TRAIN = (
    TOY
    + """
import json, os
from transformers import GPT2Config
from steer_nb.methods.registry import apply_method
folder, every = sys.argv[1], float(sys.argv[2])
warnings.simplefilter("always")
size = dict(vocab_size=len(tokenizer), n_embd=256, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(GPT2Config(**size)).eval()                       # it has dropout: random numbers matter
method = apply_method(model, "joint", weights="full", weight_layers=[1], weights_lr=0.1)
print("ready", flush=True)
run = fit(method, tokenizer, toy, TrainConfig(lr=1e-2, epochs=5, batch_size=4, evaluations_per_epoch=2), output=folder, checkpoint_every=every)
print(json.dumps({"stopped": run.stopped, "steps": run.steps, "resumed": run.resumed, "usable": not model.training and not any(p.grad is not None for p in model.parameters())}))
"""
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(TRAIN)
    return path


def start(script, folder, every=0.0, limit=None):
    "A training in a process of its own."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, script, folder, str(every)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def finish(process):
    "Its output and its errors; it has to end well."
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1]), errors


def results(folder):
    "What was trained, as bytes, and the curve."
    run = Run.load(folder / "run.json")
    return (
        {path.name: path.read_bytes() for path in (folder / "method").iterdir()},
        run.curve,
        run.validation,
        run.best_step,
    )


@pytest.fixture(scope="module")
def undisturbed(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    said, _ = finish(start(script, folder, every=60.0))
    assert said == {"stopped": None, "steps": 40, "resumed": [], "usable": True}
    assert sorted(path.name for path in folder.iterdir()) == [
        "method",
        "run.json",
    ]  # no checkpoints stay behind
    return results(folder)


def steps_on_disk(folder):
    return Checkpoints(folder / CHECKPOINT_FOLDER).numbers()


def being_written(folder):
    return any(name.startswith(".part-") for name in os.listdir(folder / CHECKPOINT_FOLDER))


def test_killed_ten_times(script, undisturbed, tmp_path):
    "Nine kills at random moments after the first checkpoint, and one while a checkpoint is being written."
    folder, chance, inside, kills, progress = tmp_path / "run", random.Random(0), 0, 0, [-1]
    while kills < 10:
        process = start(script, folder)
        process.stdout.readline()
        before = max(steps_on_disk(folder), default=-1)
        while max(steps_on_disk(folder), default=-1) <= before and process.poll() is None:
            time.sleep(0.002)  # at least one step further each time
        if kills == 4:
            while not being_written(folder) and process.poll() is None:
                pass
        else:
            time.sleep(chance.uniform(0, 0.15))
        assert process.poll() is None, "it was done before the kills were: make the training longer"
        process.kill()
        process.communicate()
        kills += 1
        inside += kills == 5 and being_written(folder)
        progress.append(max(steps_on_disk(folder)))
        assert not (folder / "run.json").exists()
    assert inside == 1, "the fifth kill was to come in the middle of a checkpoint"
    assert progress == sorted(progress) and progress[-1] > progress[1]
    said, errors = finish(start(script, folder))
    assert said["stopped"] is None and said["steps"] == 40 and len(said["resumed"]) == 10
    assert results(folder) == undisturbed
    assert sorted(path.name for path in folder.iterdir()) == ["method", "run.json"]
    assert Run.load(folder / "run.json").resumed == said["resumed"]


def kill_after(process, folder, step):
    while max(steps_on_disk(folder), default=-1) < step and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()


def test_a_truncated_checkpoint_falls_back_and_says_so(script, undisturbed, tmp_path):
    folder = tmp_path / "run"
    kill_after(start(script, folder), folder, 6)
    numbers = steps_on_disk(folder)
    path = folder / CHECKPOINT_FOLDER / f"{numbers[-1]:08d}" / checkpoints.TENSOR_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said, errors = finish(start(script, folder))
    assert f"{numbers[-1]:08d} is damaged" in errors and "the one before it is taken" in errors
    assert said["resumed"] == [numbers[-2]] and results(folder) == undisturbed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_and_the_next_call_goes_on(script, undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    process = start(script, folder, every=3600.0)
    process.stdout.readline()
    while not (folder / CHECKPOINT_FOLDER).exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.5)  # of some two seconds that it trains
    process.send_signal(getattr(signal, name))
    said, _ = finish(process)  # it ends by itself, well, and with a record
    assert said["stopped"] == name and 0 < said["steps"] < 40 and said["usable"]
    assert steps_on_disk(folder)[-1] == said["steps"] and not (folder / "run.json").exists()
    again, _ = finish(start(script, folder))
    assert again["resumed"] == [said["steps"]] and results(folder) == undisturbed


def test_interrupt_kernel_in_jupyter(tmp_path):
    "A real kernel, interrupted as the button does it: the cell ends well, and the next one has the record and a model to use."
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(
        kernel_name="python3",
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )

    def say(code, wait=True):
        message = client.execute(code)
        return client.get_shell_msg(timeout=240) if wait else message

    try:
        say(TOY + "model = tiny(); steer(model)")
        message = say(
            f"run = fit(model, tokenizer, toy, TrainConfig(lr=1e-3, epochs=5000, batch_size=4), output={str(tmp_path / 'run')!r})",
            wait=False,
        )
        while not (tmp_path / "run" / CHECKPOINT_FOLDER).exists():
            time.sleep(0.05)
        time.sleep(1)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != message:
            pass
        assert reply["content"]["status"] == "ok", reply["content"]
        reply = say(
            "assert run.stopped == 'SIGINT' and 0 < run.steps < run.planned and not model.training, run\nmodel(**tokenizer('max of 1 =', return_tensors='pt'))"
        )
        assert reply["content"]["status"] == "ok", reply["content"]
        assert (
            len(steps_on_disk(tmp_path / "run")) >= 1
            and not (tmp_path / "run" / "run.json").exists()
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_full_disk_stops_no_training(script, undisturbed, tmp_path):
    "A limit on the size of files stands for the full disk. Training goes on to its end; with room again, the last good checkpoint leads to the same result."
    folder = tmp_path / "run"
    kill_after(start(script, folder), folder, 3)
    before = steps_on_disk(folder)[-1]
    process = start(
        script, folder, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    output, errors = process.communicate(timeout=300)
    assert (
        process.returncode == 1 and errors.count("UserWarning: no checkpoint could be written") == 1
    )
    assert (
        "OutputError: the training is done and the model has its parameters, but they cannot be written"
        in errors
    )
    assert steps_on_disk(folder)[-1] == before and not (folder / "run.json").exists()
    finish(start(script, folder))
    assert results(folder) == undisturbed


# In one process


def tiny_method(name="post_block_linear", **options):
    return apply_method(toy["tiny"](), name, **options)


CONFIG = TrainConfig(lr=1e-2, epochs=2, batch_size=8)
LARGE = 0.5  # a rate at which training soon does harm


def break_after(model, passes):
    "Ctrl-C in the middle of a forward pass, after so many of them in training mode."
    seen = []

    def hook(module, args, output):
        seen.extend([1] * module.training)
        if len(seen) > passes:
            raise KeyboardInterrupt

    return model.get_input_embeddings().register_forward_hook(hook)


def state_of(method):
    return {
        name: parameter.detach().clone()
        for name, parameter in method.model.named_parameters()
        if parameter.requires_grad
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name, passes", [*((name, 3) for name in METHODS), ("lofit", 11)])
def test_every_method_goes_on(name, passes, tmp_path):
    "Also those that train in stages, draw random gates, or change the optimizer's memory. Eleven passes are within the second stage of LoFiT."
    reference = tiny_method(name)
    expected = fit(reference, tokenizer, task, CONFIG)
    broken = tiny_method(name)
    break_after(broken.model, passes)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, CONFIG, output=tmp_path / "run", checkpoint_every=0)
    again = tiny_method(name)
    run = fit(again, tokenizer, task, CONFIG, output=tmp_path / "run", checkpoint_every=0)
    assert (
        run.resumed == [passes % 8]
        and run.curve == expected.curve
        and run.validation == expected.validation
        and run.best_step == expected.best_step
    )
    assert same(state_of(again), state_of(reference)) and again.options == reference.options


def test_what_a_method_remembers_goes_on(tmp_path):
    "Joint training that projects once has done so before the break, and must not do it again."
    reference, broken, again = (tiny_method("joint", project="once", every=2) for _ in range(3))
    expected = fit(reference, tokenizer, task, CONFIG)
    break_after(broken.model, 4)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, CONFIG, output=tmp_path, checkpoint_every=0)
    run = fit(again, tokenizer, task, CONFIG, output=tmp_path)
    assert (
        run.resumed == [4]
        and run.curve == expected.curve
        and same(state_of(again), state_of(reference))
    )


def test_the_best_parameters_of_before_the_break_are_kept(tmp_path):
    "Validation is best before the break and never again: what was kept then has to come out of the checkpoint."
    config = replace(CONFIG, lr=LARGE, epochs=6, schedule="constant", evaluations_per_epoch=2)
    reference, broken, again = (tiny_method() for _ in range(3))
    expected = fit(reference, tokenizer, task, config)
    assert 0 < expected.best_step < 20 and expected.validation[-1]["loss"] > expected.best_loss
    break_after(broken.model, 20)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, config, output=tmp_path, checkpoint_every=0)
    run = fit(again, tokenizer, task, config, output=tmp_path)
    assert (
        run.resumed == [20]
        and run.best_step == expected.best_step
        and same(state_of(again), state_of(reference))
    )


def test_without_validation_the_last_state_goes_on(tmp_path):
    blind = replace(task, validation=())
    reference = tiny_method()
    expected = fit(reference, tokenizer, blind, CONFIG)
    broken = tiny_method()
    break_after(broken.model, 4)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, blind, CONFIG, output=tmp_path, checkpoint_every=0)
    again = tiny_method()
    assert fit(again, tokenizer, blind, CONFIG, output=tmp_path).curve == expected.curve and same(
        state_of(again), state_of(reference)
    )


@pytest.fixture
def unfinished(tmp_path):
    broken = tiny_method()
    break_after(broken.model, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, CONFIG, output=tmp_path / "run", checkpoint_every=0)
    return tmp_path / "run"


def test_another_training_is_refused_with_the_difference(unfinished):
    fewer = replace(task, train=task.train[1:])
    for change, words in (
        (
            lambda: fit(
                tiny_method(), tokenizer, task, replace(CONFIG, lr=2e-2), output=unfinished
            ),
            "config.lr was 0.01, now 0.02",
        ),
        (
            lambda: fit(tiny_method(rank=4), tokenizer, task, CONFIG, output=unfinished),
            "options.rank was 8, now 4",
        ),
        (
            lambda: fit(tiny_method("loreft"), tokenizer, task, CONFIG, output=unfinished),
            "method was 'post_block_linear', now 'loreft'",
        ),
        (lambda: fit(tiny_method(), tokenizer, fewer, CONFIG, output=unfinished), "examples was"),
        (
            lambda: fit(
                apply_method(toy["tiny"]("gpt2"), "post_block"),
                tokenizer,
                task,
                CONFIG,
                output=unfinished,
            ),
            "model was 'llama', now 'gpt2'",
        ),
    ):
        with pytest.raises(TrainError, match="unfinished training that is not the same") as error:
            change()
        assert words in str(error.value) and "restart=True" in str(error.value)
    other = tiny_method()
    other.model.model.embed_tokens.weight.data.mul_(1.1)
    with pytest.raises(TrainError, match="frozen weights was"):
        fit(other, tokenizer, task, CONFIG, output=unfinished)
    assert steps_on_disk(unfinished)[-1] == 3  # refusing has changed nothing
    run = fit(
        tiny_method(), tokenizer, task, replace(CONFIG, lr=2e-2), output=unfinished, restart=True
    )
    assert run.resumed == [] and run.steps == 8 and Run.load(unfinished / "run.json") == run
    with pytest.raises(TrainError, match="exists already"):
        fit(
            tiny_method(), tokenizer, task, CONFIG, output=unfinished, restart=True
        )  # a finished one is not thrown away


def test_overwrite_goes_on_with_the_same_and_throws_away_another(unfinished):
    "The command with --overwrite, too, is one that is given again after a kill."
    expected = fit(tiny_method(), tokenizer, task, CONFIG)
    run = fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished, overwrite=True)
    assert run.resumed == [3] and run.curve == expected.curve
    broken = (
        tiny_method()
    )  # the folder has a finished training now, and then an unfinished one beside it
    break_after(broken.model, 5)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, CONFIG, output=unfinished, overwrite=True, checkpoint_every=0)
    assert (
        fit(
            tiny_method(),
            tokenizer,
            task,
            replace(CONFIG, lr=2e-2),
            output=unfinished,
            overwrite=True,
        ).resumed
        == []
    )
    broken = tiny_method()
    break_after(broken.model, 5)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, task, CONFIG, output=unfinished, overwrite=True, checkpoint_every=0)
    assert fit(
        tiny_method(), tokenizer, task, CONFIG, output=unfinished, overwrite=True
    ).resumed == [5]


def test_killed_between_the_results_and_the_end(unfinished):
    "The results are written, the checkpoints still there: the same call ends what it began, and then the folder is like any other."
    run = fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished)
    before = {path.name: path.read_bytes() for path in (unfinished / "method").iterdir()}
    store = Checkpoints(unfinished / CHECKPOINT_FOLDER)
    own, Checkpoints.clear = Checkpoints.clear, lambda self: None
    try:
        fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished, overwrite=True)
    finally:
        Checkpoints.clear = own
    assert (unfinished / "run.json").exists() and store.numbers()
    again = fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished)
    assert again.resumed == [again.steps] and again.curve == run.curve and not store.folder.exists()
    assert {path.name: path.read_bytes() for path in (unfinished / "method").iterdir()} == before
    with pytest.raises(TrainError, match="exists already"):
        fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished)


def test_a_disk_that_fails_is_no_reason_to_begin_anew(unfinished, monkeypatch):
    "Also not with overwrite, which goes on with the same training."
    numbers = steps_on_disk(unfinished)

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "_sha256", fails)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="cannot be read .*Input/output error.*restart=True"):
            fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished, overwrite=overwrite)
    monkeypatch.undo()
    assert steps_on_disk(unfinished) == numbers
    assert fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished).resumed


def test_a_signal_in_the_last_step_acts_when_all_is_written(tmp_path):
    method, passes = tiny_method(), itertools.count(1)
    steps = fit(tiny_method(), tokenizer, task, CONFIG).steps
    batches = math.ceil(steps * CONFIG.accumulation_steps)

    def hook(*_):
        if torch.is_grad_enabled() and next(passes) == batches:
            os.kill(os.getpid(), signal.SIGINT)

    method.model.register_forward_pre_hook(hook)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(method, tokenizer, task, CONFIG, output=tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (
        sorted(path.name for path in (tmp_path / "run").iterdir()) == ["method", "run.json"]
        and Run.load(tmp_path / "run" / "run.json").stopped is None
    )


def test_logits_in_pieces_draw_the_same_random_numbers(monkeypatch):
    "A model that caps its logits is found out by a forward pass for nothing; random numbers go on as if it had not been made."
    from transformers import AutoModelForCausalLM, Gemma2Config

    from steer_nb import train

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        final_logit_softcapping=0.5,
        attention_dropout=0.5,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).train()
    batch = train.collate(
        tokenizer, [train.encode(tokenizer, example) for example in task.train[:8]]
    )
    monkeypatch.setattr(train, "LOGITS", 3 * len(tokenizer))
    losses = []
    for _ in range(2):  # the first finds out, the second knows
        torch.manual_seed(0)
        losses.append((float(train.completion_loss(model, batch)), float(torch.rand(1))))
    assert losses[0] == losses[1] and train._output_layer(model) in train._SHAPED


def test_another_version_is_said_and_goes_on(unfinished):
    path = (
        unfinished
        / CHECKPOINT_FOLDER
        / f"{steps_on_disk(unfinished)[-1]:08d}"
        / checkpoints.STATE_FILE
    )
    content = json.loads(path.read_text())
    content["record"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="began with torch 1.0"):
        run = fit(tiny_method(), tokenizer, task, CONFIG, output=unfinished)
    assert run.resumed == [3]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    method = tiny_method()
    before = state_of(method)
    for folder in (
        tmp_path / "file" / "run",
        Path("/proc/run") if sys.platform == "linux" else tmp_path / "file" / "run",
    ):
        with pytest.raises(TrainError, match="cannot write to"):
            fit(method, tokenizer, task, CONFIG, output=folder)
    assert same(before, state_of(method))


def test_the_record_names_the_commit_of_a_hub_model(tmp_path):
    "A cache folder laid out as the Hub's client does it, and nothing else of the Hub: an id without a revision is resolved to the commit."
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    snapshot = cache / "models--someone--tiny" / "snapshots" / commit
    toy["tiny"]().save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text(commit)
    code = (
        TOY
        + """
from steer_nb.data.models import load_model
model, tokenizer = load_model("someone/tiny")
steer(model)
print(fit(model, tokenizer, toy, TrainConfig(max_steps=2)).revision)
"""
    )
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert said.stdout.strip().splitlines()[-1:] == [commit], said.stderr[-2000:]
    assert fit(tiny_method(), tokenizer, task, replace(CONFIG, max_steps=1)).revision is None


def test_nothing_is_pickled(unfinished):
    for path in unfinished.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".safetensors"), path
    source = Path(checkpoints.__file__).parent
    for path in source.glob("*.py"):
        text = path.read_text()
        assert (
            "torch.load(" not in text and "import pickle" not in text and "torch.save(" not in text
        ), path


# Half precision


def overflow_at(model, steps):
    "The gradient of the last hidden state becomes infinite in these training passes (counted from 1), as an overflow makes it."
    seen = []

    def hook(module, args, output):
        if not module.training:
            return
        seen.append(1)
        if len(seen) in steps:
            output.register_hook(lambda gradient: gradient * float("inf"))

    return model.model.norm.register_forward_hook(hook)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_an_overflow_is_skipped_and_counted(precision):
    config = replace(CONFIG, precision=precision)
    method = tiny_method()
    overflow_at(method.model, (2, 5))
    states = []
    method.after_step = lambda step, *_: states.append(step)
    run = fit(method, tokenizer, task, config)
    assert (
        run.skipped == 2
        and run.steps == 6
        and run.planned == 8
        and [point["step"] for point in run.curve] == [1, 3, 4, 6, 7, 8]
        and states == [1, 3, 4, 6, 7, 8]
    )
    assert (
        all(parameter.isfinite().all() for parameter in method.model.parameters())
        and run.best_loss < run.validation[0]["loss"]
    )


def test_float16_learns_what_float32_learns():
    runs = [
        fit(tiny_method(), tokenizer, task, replace(CONFIG, precision=precision, epochs=4))
        for precision in ("float32", "float16")
    ]
    assert (
        runs[1].precision == "float16" and runs[0].curve != runs[1].curve and runs[1].skipped <= 2
    )
    assert all(
        abs(a["loss"] - b["loss"]) < 0.05 for a, b in zip(runs[0].validation, runs[1].validation)
    )  # 11 bits of about 2.8, over 16 steps


def test_an_overflow_too_large_for_the_scale_lowers_it():
    "A loss times 2^16 that float16 cannot hold: the scale is halved until it fits, by skipping steps."
    method = tiny_method()
    method.model.model.norm.register_forward_hook(
        lambda module, args, output: output * 64.0 if module.training else None
    )
    run = fit(method, tokenizer, task, replace(CONFIG, precision="float16", epochs=4))
    assert 0 < run.skipped < 10 and run.steps == 16 - run.skipped


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_ten_in_a_row_end_it_with_the_last_good_state(precision):
    config = replace(CONFIG, precision=precision, epochs=4)
    method, reference = tiny_method(), tiny_method()
    overflow_at(method.model, range(6, 99))
    with pytest.raises(
        TrainError,
        match="gradient is (inf|nan) at step 15, after 9 steps in a row that were skipped",
    ):
        fit(method, tokenizer, task, config)
    overflow_at(reference.model, range(6, 99))
    with pytest.raises(TrainError):
        fit(reference, tokenizer, task, config)
    assert same(state_of(method), state_of(reference)) and all(
        parameter.isfinite().all() for parameter in method.model.parameters()
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(state_of(method).values(), state_of(tiny_method()).values())
    )


def test_in_float32_it_is_an_error_at_once():
    method = tiny_method()
    overflow_at(method.model, (3,))
    with pytest.raises(TrainError, match="gradient is (inf|nan) at step 3:"):
        fit(method, tokenizer, task, CONFIG)
