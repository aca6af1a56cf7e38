"""One training by two real processes (gloo): the same result as by one, nothing twice, nothing lost when one of them dies, and FSDP2.

The processes get from the environment what a launcher gives them, so that nobody restarts or ends them but the test.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
from safetensors.torch import load_file
from test_train import TOY

from steer_nb.training.checkpoints import Checkpoints

WORKER = (
    TOY
    + """
import json, os, signal
from dataclasses import replace
from torch.distributed.tensor import DTensor
from steer_nb.evaluation.result import evaluate
from steer_nb.methods.registry import apply_method
asked = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
rank = int(os.environ.get("RANK", 0))
model = tiny().to(getattr(torch, asked.get("dtype", "float64")))
method = apply_method(model, asked["method"])
rows = []
method.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.extend(args[0].tolist()) if module.training else None)
print("ready", flush=True)
if rank == asked.get("signalled"):
    real = method.after_step
    def after_step(step, *rest):
        real(step, *rest)
        if step == 4: os.kill(os.getpid(), signal.SIGTERM)
    method.after_step = after_step
run = fit(method, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2, batch_size=4, accumulation_steps=2), output=asked["folder"] + asked.get("own", "") * rank, checkpoint_every=0)
said = {"rows": rows, "stopped": run.stopped, "resumed": run.resumed, "processes": run.processes, "curve": run.curve, "validation": run.validation,
        "spread": sum(isinstance(p, DTensor) for p in method.model.parameters()), "whole": sum(not isinstance(p, DTensor) for p in method.model.parameters())}
if asked.get("evaluate"):
    passes = []
    method.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    choices = replace(toy, metric="choice", max_new_tokens=None, extractor=None, train=(), validation=(), test=tuple(replace(e, completion=e.completion[:2], choices=tuple(f" {n}" for n in range(10)), answer=int(e.answer)) for e in toy.train))
    said["choices"] = evaluate(method, tokenizer, choices, batch_size=2).predictions
    said["passes"] = sum(passes)
    said["texts"] = evaluate(method, tokenizer, toy, "validation", batch_size=2).predictions
    if rank == asked.get("broken"): method.model.lm_head.weight.data.fill_(float("nan"))
    if "broken" in asked:
        try: evaluate(method, tokenizer, choices)
        except Exception as error: said["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(said), flush=True)
"""
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


def launch(worker, processes, folder, method="post_block_linear", fsdp=None, **asked):
    "So many processes that know of each other."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if fsdp:
        common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": fsdp}
    several = (
        [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
            for rank in range(processes)
        ]
        if processes > 1
        else [{}]
    )
    content = json.dumps({"folder": str(folder), "method": method, **asked})
    return [
        subprocess.Popen(
            [sys.executable, worker, content],
            env={**common, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in several
    ]


def finish(processes):
    "What each of them said at its end."
    said = []
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        said.append(json.loads(output.splitlines()[-1]))
    return said


def tensors(folder):
    "All that a method wrote."
    return {
        f"{path.name} {name}": tensor
        for path in sorted((folder / "method").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def gap(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def losses(said):
    return [point["loss"] for point in said["curve"] + said["validation"]]


@pytest.fixture(scope="module")
def alone(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    [said] = finish(launch(worker, 1, folder, evaluate=True))
    return said, tensors(folder)


def test_two_processes_are_one_with_the_same_batch(worker, alone, tmp_path):
    "The same adapter to 1e-6 (asked; in float64 it is rounding). Rank 1 gets a folder of its own, and writes nothing there."
    first, second = finish(
        launch(worker, 2, tmp_path / "run", own="-other", evaluate=True, broken=1)
    )
    assert first["processes"] == second["processes"] == 2 and not (tmp_path / "run-other").exists()
    assert gap(tensors(tmp_path / "run"), alone[1]) < 1e-6
    assert (
        max(abs(a - b) for a, b in zip(losses(first), losses(alone[0]), strict=True)) < 1e-9
        and first["curve"] == second["curve"]
    )
    # 29 examples in two epochs: each is seen twice by somebody. The last pass of an epoch has one example, and the idle process computes it, too, with weight zero.
    strip = lambda rows: Counter(tuple(token for token in row if token) for row in rows)
    one, together = strip(alone[0]["rows"]), strip(first["rows"]) + strip(second["rows"])
    assert (
        set(one.values()) == {2}
        and len(one) == 29
        and not one - together
        and sum((together - one).values()) == 2
    )
    assert all(
        half.total() < one.total() * 0.6 for half in (strip(first["rows"]), strip(second["rows"]))
    )
    # evaluation: every example once, in its order, and in both processes; each did about half
    for kind in ("choices", "texts"):
        for said in (first, second):
            assert [(r["id"], r["prediction"], r["correct"]) for r in said[kind]] == [
                (r["id"], r["prediction"], r["correct"]) for r in alone[0][kind]
            ]
    assert len(first["choices"]) == 29 and alone[0]["passes"] - first["passes"] in (13, 14)
    # the logits of rank 1 alone become NaN: both raise, and nobody waits for the other
    assert second["error"].startswith("EvaluateError: the model's logits are NaN") and first[
        "error"
    ].startswith("EvaluateError: another process failed: the model's logits are NaN")


def steps_on_disk(folder):
    return Checkpoints(folder / "checkpoints").numbers()


@pytest.mark.parametrize("fsdp", [None, "2"], ids=["ddp", "fsdp2"])
def test_a_dead_process_ends_the_run_and_the_next_goes_on(worker, alone, tmp_path, fsdp):
    "Rank 1 is killed in the middle. Rank 0 has to notice, without a launcher, within a minute."
    folder = tmp_path / "run"
    first, second = launch(worker, 2, folder, fsdp=fsdp)
    while max(steps_on_disk(folder), default=-1) < 3 and first.poll() is None:
        time.sleep(0.002)
    second.kill()
    assert first.wait(timeout=60) != 0, first.stdout.read()
    for process in (first, second):
        process.communicate()
    assert steps_on_disk(folder) and not (folder / "run.json").exists()
    for process in launch(
        worker, 2, folder, own="-other", fsdp=fsdp
    ):  # rank 1 sees another folder: neither begins
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "the processes see different checkpoints" in errors, (
            errors
        )
    again, _ = finish(launch(worker, 2, folder, fsdp=fsdp))
    assert len(again["resumed"]) == 1 and again["resumed"][0] >= 3
    assert (
        gap(tensors(folder), alone[1]) < 1e-6
        and max(abs(a - b) for a, b in zip(losses(again), losses(alone[0]), strict=True)) < 1e-9
    )


@pytest.mark.parametrize("method", ["post_block_linear", "lora", "full"])
def test_fsdp_trains_and_saves_whole(worker, tmp_path, method):
    "The model is spread over both; the signal reaches one of them only, both stop, and the next call goes on to the result of one process."
    [expected] = finish(launch(worker, 1, tmp_path / "alone", method))
    first, second = finish(launch(worker, 2, tmp_path / "run", method, fsdp="2", signalled=1))
    assert (
        first["stopped"] == second["stopped"] == "SIGTERM"
        and len(first["curve"]) == len(second["curve"]) == 4
    )
    assert steps_on_disk(tmp_path / "run")[-1] == 4
    first, second = finish(launch(worker, 2, tmp_path / "run", method, fsdp="2", evaluate=True))
    assert (
        first["resumed"] == [4]
        and first["spread"] > 0
        and (first["whole"] == 0) == (method == "full")
    )  # else this was plain data parallelism
    # LoRA's B starts at zero, so gradients of A are at first rounding alone, which AdamW divides by itself: hence 1e-6 and not 1e-12
    assert gap(tensors(tmp_path / "run"), tensors(tmp_path / "alone")) < 1e-6
    assert max(abs(a - b) for a, b in zip(losses(first), losses(expected), strict=True)) < 1e-9
    assert (
        [r["id"] for r in first["choices"]] == [r["id"] for r in second["choices"]]
        and len(first["choices"]) == 29
        and first["texts"] == second["texts"]
    )


def test_an_older_fsdp_is_refused(worker, tmp_path):
    for process in launch(worker, 2, tmp_path / "run", fsdp="1"):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "set fsdp_version to 2" in errors
