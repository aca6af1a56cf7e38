"""A grid by two real processes (gloo) of which one has no room, or dies, or both fail alike: none waits for ever, and nothing false is recorded."""

import pytest
from test_processes import launch

from steer_nb.experiments.store import Store

WORKER = """
import json, os, sys
import torch
from transformers import logging
from steer_nb import experiments
from steer_nb.experiments.grid import run_grid
from steer_nb.experiments.jobs import Arm, Experiment
logging.disable_progress_bar()
asked = json.loads(sys.argv[1])
own = experiments.fit
def fit(method, tokenizer, task, config, **folder):
    "In the third pass both processes fail, or the second: without room, while its batch is larger than it may be; or for good."
    passes = []
    def hook(*_):
        passes.append(1)
        if len(passes) == 3 and method.name == asked.get("broken"): raise RuntimeError(f"a defect, seen by process {os.environ['RANK']}")
        if os.environ.get("RANK") != "1" or len(passes) < 3 or not torch.is_grad_enabled(): return
        if config.batch_size > asked.get("room", 16): raise torch.OutOfMemoryError("CUDA out of memory")
        if asked.get("dies"): os._exit(9)
    method.model.register_forward_pre_hook(hook)
    return own(method, tokenizer, task, config, **folder)
experiments.fit = fit
task = {"name": "listops", "length": 6, "depth": 1, "max_args": 4, "operators": ("FIRST", "LAST"), "n_train": 64, "n_validation": 20, "n_test": 40}
grid = Experiment("grid", ("tiny-llama",), {"listops": task}, {name: Arm(name, (1e-2,)) for name in asked.get("arms", ["post_block_linear"])}, {"max_steps": 4, "batch_size": 16}, sweep_seeds=(0,), seeds=(0,))
run_grid(grid, asked["folder"], say=None)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


def run(worker, folder, **asked):
    "Both exit statuses, and what both wrote to their errors."
    processes = launch(worker, 2, folder, **asked)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


def runs(folder):
    return [record for record in Store(folder).records() if record["kind"] == "run"]


def test_a_process_without_room_ends_the_launch_and_the_next_one_halves(worker, tmp_path):
    codes, errors = run(worker, tmp_path, room=8)
    assert (
        all(codes)
        and "has no room" in errors[1]
        and "its batch is halved" in errors[1]
        and "nothing is recorded" in errors[0]
    ), errors
    assert runs(tmp_path) == []
    codes, errors = run(worker, tmp_path, room=8)
    assert codes == [0, 0], errors
    [record] = runs(tmp_path)
    assert (
        record["status"] == "done"
        and record["processes"] == 2
        and record["note"].startswith("out of memory with batch_size 16: 8, and 2 passes a step")
    )


def test_without_room_for_half_a_batch_it_is_recorded_as_failed(worker, tmp_path):
    run(worker, tmp_path, room=4)
    codes, errors = run(worker, tmp_path, room=4)
    assert all(codes) and "recorded as failed" in errors[1], errors
    codes, errors = run(worker, tmp_path, room=4)  # nothing left to train, and the grid ends
    assert codes == [0, 0], errors
    [record] = runs(tmp_path)
    assert record["status"] == "failed" and "OutOfMemoryError" in record["error"]


def test_a_process_that_dies_counts_against_no_method(worker, tmp_path):
    codes, errors = run(worker, tmp_path, dies=True)
    assert codes[1] == 9 and codes[0] and "nothing is recorded" in errors[0], errors
    assert runs(tmp_path) == []
    codes, errors = run(worker, tmp_path)
    assert codes == [0, 0] and runs(tmp_path)[0]["status"] == "done", errors


def test_what_fails_alike_in_all_processes_is_recorded_and_the_grid_goes_on(worker, tmp_path):
    codes, errors = run(
        worker,
        tmp_path,
        broken="post_block_linear",
        arms=["post_block_linear", "post_block_vector"],
    )
    assert codes == [0, 0], errors
    records = {
        (record["kind"], record["spec"]["method"]): record
        for record in Store(tmp_path).records()
        if "spec" in record
    }
    assert (
        records["run", "post_block_linear"]["error"] == "RuntimeError: a defect, seen by process 0"
    )
    assert (
        records["test", "post_block_vector"]["status"] == "done"
        and ("test", "post_block_linear") not in records
    )
