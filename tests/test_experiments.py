"The grid on this machine and on Ray, kills and interruptions, the store, and the claims."

import _thread
import hashlib
import itertools
import json
import os
import resource
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from steer_nb.data.examples import choice_example
from steer_nb.data.records import Task
from steer_nb.experiments import claims, gate, grid, intervals, runner, statistics, testbed
from steer_nb.experiments.grid import run_grid
from steer_nb.experiments.jobs import Arm, Experiment, Job, plan
from steer_nb.experiments.presets import preset
from steer_nb.experiments.runner import run_job, trained_folder
from steer_nb.experiments.store import ExperimentError, Spec, Store, records_of
from steer_nb.methods.registry import METHODS

STORES = Path(__file__).parent.parent / "nbs" / "store"
TASK = {
    "name": "listops",
    "length": 6,
    "depth": 1,
    "max_args": 4,
    "operators": ("FIRST", "LAST"),
    "n_train": 64,
    "n_validation": 20,
    "n_test": 40,
}
GRID = Experiment(
    "grid",
    ("tiny-llama",),
    {"listops": TASK},
    {
        "linear": Arm("post_block_linear", (1e-2, 3e-2), {"rank": 2}),
        "lora": Arm("lora", (1e-2,), {"rank": 2}),
        "joint": Arm("joint", (1e-2,), {"rank": 2, "weight_rank": 2}),
    },
    {"max_steps": 3, "batch_size": 16},
    sweep_seeds=(0, 1),
    seeds=(0, 1),
    widen=0,
)
LONG = replace(  # a job takes about a second, and one method fails
    GRID,
    arms={"linear": GRID.arms["linear"], "broken": Arm("lofit", (1e-2,), {"n_heads": 99})},
    training={"max_steps": 80, "epochs": 20, "batch_size": 16},
    sweep_seeds=(0,),
    seeds=(0,),
)
ENDLESS = replace(GRID, training={"epochs": 1000, "batch_size": 16})  # minutes a job


def outcome(store) -> dict:
    "The records, without what varies: times, memory, dates, and the note about resuming."
    varying = {"seconds", "memory", "date", "note"}
    return {
        (record["kind"], record["id"]): {
            key: value for key, value in record.items() if key not in varying
        }
        for record in Store(store).records()
    }


def lines(folder) -> list[tuple]:
    "Kind and id of every line of a store, repeated ones included."
    path = Store(folder).path
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [(record["kind"], record["id"]) for record in records]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Workers of Ray have one thread each; the same here gives the same bits."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The grid in one go, in this process."
    folder = tmp_path_factory.mktemp("whole")
    run_grid(GRID, folder, say=None)
    return folder


@pytest.fixture(scope="module")
def workers():
    "Two workers of a local Ray, which the grids of these tests share."
    os.environ.update(RAY_worker_niceness="0")  # else tests that run beside these starve them
    with ExitStack() as stack:
        for attempt in range(3):
            try:
                ray = stack.enter_context(grid.ray_workers(2))
                break
            except Exception as error:  # on a busy machine Ray gives up after 30 seconds
                if attempt == 2 or "timed out during startup" not in str(error):
                    raise
        yield ray


def descendants(pid: int) -> list[int]:
    "The process ids of all that a process started, directly or not."
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            own = [int(child) for child in thread.read_text().split()]
        except OSError:
            continue  # the thread has ended
        found += own + [one for child in own for one in descendants(child)]
    return found


def at_work(pid: int) -> list[int]:
    "The workers under a process that are doing a job; Ray writes it into their names."
    found = []
    for child in descendants(pid):
        try:
            name = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::_do"):
            found.append(child)
    return found


def training(folder) -> list[Path]:
    "The runs in a store's folder that are in the middle of their training."
    return [path for path in Path(folder).glob("trained/*") if not (path / "method").exists()]


def wait_until(happened, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


class DuringGrid(threading.Thread):
    "Wait until a run is being trained by a worker of Ray, then act, while `run_grid` runs."

    def __init__(self, folder, act):
        super().__init__(daemon=True)
        self.folder, self.act, self.acted = folder, act, []
        self.start()

    def run(self):
        wait_until(lambda: training(self.folder) and at_work(os.getpid()))
        time.sleep(0.1)  # some steps
        self.acted.append(self.act())


@contextmanager
def deadline(seconds: int):
    "Raise `TimeoutError` in the main thread after this time: a lost signal fails within it."

    def expire(*_):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kill_a_worker() -> int:
    pid = at_work(os.getpid())[0]
    os.kill(pid, signal.SIGKILL)
    return pid


# On Ray


def test_ctrl_c_lets_workers_end_their_step_and_write_a_checkpoint(workers, tmp_path):
    during = DuringGrid(tmp_path, _thread.interrupt_main)
    with deadline(60), pytest.raises(KeyboardInterrupt):
        run_grid(ENDLESS, tmp_path, processes=2, say=None)
    assert during.acted and not at_work(os.getpid())
    assert list(tmp_path.glob("trained/*/checkpoints/0*"))
    assert "run" not in {kind for kind, _ in lines(tmp_path)}
    with grid.only_driver(Store(tmp_path)):  # the lock is free
        pass


def test_the_job_of_a_killed_worker_is_done_again(workers, tmp_path):
    run_grid(LONG, tmp_path / "plain", say=None)
    folder, said = tmp_path / "killed", []
    during = DuringGrid(folder, kill_a_worker)
    run_grid(LONG, folder, processes=2, say=said.append)
    [pid] = during.acted
    assert pid not in descendants(os.getpid())
    assert outcome(folder) == outcome(tmp_path / "plain")
    assert len(set(lines(folder))) == len(lines(folder)) == len(said) + 1
    failed = [record for record in Store(folder).records() if record.get("status") == "failed"]
    assert [record["spec"]["method"] for record in failed] == ["lofit"]


def test_a_job_whose_worker_dies_each_time_is_recorded_as_failed(workers, tmp_path, monkeypatch):
    "To the driver it looks so; a real death is in the test above."
    tries = []

    def dead(task):
        tries.append(task)
        raise workers.exceptions.WorkerCrashedError()

    monkeypatch.setattr(workers, "get", dead)
    run_grid(GRID, tmp_path, processes=2, say=None)
    jobs = [record for record in Store(tmp_path).records() if "spec" in record]
    error = "WorkerCrashedError: its worker process died 3 times"
    assert {record["error"] for record in jobs} == {error} and len(tries) == 3 * len(jobs)
    assert plan(GRID, Store(tmp_path).records()) == []


def drive(folder: str, cluster: str) -> None:
    "In a child: the whole grid on the running Ray."
    torch.set_num_threads(1)
    run_grid(GRID, folder, cluster=cluster)


def test_a_killed_driver_resumes_from_the_store(whole, workers, tmp_path):
    "Its workers end with it, and the same call completes the grid with no job done twice."
    address = workers.get_runtime_context().gcs_address
    driver = children.start(drive, str(tmp_path), address)
    driver.wait_for(lambda: len(lines(tmp_path)) >= 3, timeout=180)
    driver.signal(signal.SIGKILL)
    assert driver.wait().returncode == -signal.SIGKILL
    wait_until(lambda: not at_work(os.getpid()))
    before = lines(tmp_path)
    assert plan(GRID, Store(tmp_path).records()) != []
    run_grid(GRID, tmp_path, cluster=address, say=None)
    after = lines(tmp_path)
    assert after[: len(before)] == before and len(set(after)) == len(after)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_missing_model_stops_the_grid(workers, tmp_path, processes):
    with pytest.raises(ValueError, match="^no model"):
        run_grid(replace(GRID, models=("tiny-lama",)), tmp_path, processes, say=None)
    assert {kind for kind, _ in lines(tmp_path)} == {"experiment"}


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ExperimentError, match=r"pip install steer_nb\[ray\]"):
        run_grid(GRID, tmp_path, processes=2)


def test_a_store_has_one_driver(tmp_path):
    with (
        grid.only_driver(Store(tmp_path)),
        pytest.raises(ExperimentError, match="another process is running jobs"),
    ):
        run_grid(GRID, tmp_path)


def test_a_grid_is_not_started_under_a_launcher(tmp_path, monkeypatch):
    class TwoProcesses:
        num_processes = 2

    monkeypatch.setattr(grid, "join_processes", TwoProcesses)
    for start in (run_grid, statistics.measure_costs):
        with pytest.raises(ExperimentError, match="without torchrun or accelerate launch"):
            start(GRID, tmp_path)
    with pytest.raises(ExperimentError, match="processes is 0"):
        run_grid(GRID, tmp_path, processes=0)


# The store


def fill(folder: str, room: int) -> None:
    "In a child: append records until files may not grow any more, as on a full disk."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = Store(folder)
    for number in range(3):
        store.append({"kind": "run", "id": str(number), "text": "x" * 200})
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        for number in range(3, 9):
            store.append({"kind": "run", "id": str(number), "text": "x" * 200})
    except ExperimentError as error:
        print(error)


@pytest.mark.parametrize("room", [900, 1500])
def test_a_full_disk_leaves_the_store_readable(tmp_path, room):
    "The write stops in the middle of a record."
    done = children.run(fill, str(tmp_path), room)
    assert done.returncode == 0 and "free some space" in done.stdout, done
    found = [record["id"] for record in Store(tmp_path).records()]
    assert found == [str(number) for number in range(len(found))] and 3 <= len(found) < 9
    Store(tmp_path).append({"kind": "run", "id": "later"})
    assert [record["id"] for record in Store(tmp_path).records()] == [*found, "later"]


def test_ids_are_the_same_in_every_process():
    "Those of the committed records were computed by other processes on other machines."
    for folder in ("testbed", "smollm2"):
        records = [record for record in Store(STORES / folder).records() if "spec" in record]
        assert len(records) > 100
        assert all(Spec(**record["spec"]).id == record["id"] for record in records)


def test_a_definition_may_grow_but_not_change(whole, tmp_path):
    before = Store(whole).path.read_bytes()
    for changed in (
        {"training": {"max_steps": 4, "batch_size": 16}},
        {"tasks": {"listops": {**TASK, "n_test": 30}}},
        {"arms": {**GRID.arms, "lora": Arm("lora", (1e-2,), {"rank": 4})}},
        {"arms": {**GRID.arms, "lora": Arm("lora", (1e-2, 2e-2), {"rank": 2})}},
        {"sweep_seeds": (0, 1, 2)},
        {"widen": 1},
        {"budgets": {"listops": {"max_steps": 4}}},
    ):
        with pytest.raises(ExperimentError, match="another experiment named 'grid'"):
            run_grid(replace(GRID, **changed), whole, say=None)
    assert Store(whole).path.read_bytes() == before
    copy = Store(tmp_path)
    copy.path.write_bytes(before)
    grown = replace(GRID, arms={**GRID.arms, "bitfit": Arm("bitfit", (1e-2,))})
    grid.check_definition(grown, copy)
    assert {job.spec.method for job in plan(grown, copy.records())} == {"bitfit"}


def test_what_failed_is_not_repeated_where_the_test_set_was_evaluated(whole):
    "Another rate could be selected, and the test set would be evaluated twice."
    records = Store(whole).records()
    tested = records_of(records, "test")
    sweep = next(
        record
        for record in records_of(records, "run").values()
        if record["spec"]["method"] == "post_block_linear" and record["id"] not in tested
    )

    class Changed(Store):
        def records(self):
            changed = [
                {**record, "status": "failed"} if record is sweep else record for record in records
            ]
            return [record for record in changed if record["kind"] in self.kinds]

    store = Changed(whole)
    store.kinds = {"run", "test"}
    assert grid.failures_to_repeat(GRID, store) == []
    store.kinds = {"run"}
    assert [record["id"] for record in grid.failures_to_repeat(GRID, store)] == [sweep["id"]]


# One job


def first_run(experiment: Experiment = GRID) -> Spec:
    return next(job.spec for job in plan(experiment, []) if job.kind == "run")


def test_a_test_without_its_training_trains_again(whole, tmp_path):
    tests = records_of(Store(whole).records(), "test")
    [before] = [
        record
        for record in tests.values()
        if record["spec"]["method"] == "joint" and record["spec"]["seed"] == 0
    ]
    record = run_job(Store(tmp_path), Job("test", Spec(**before["spec"])), GRID.batch_size)
    assert record["correct"] == before["correct"] and record["parts"] == before["parts"]
    assert not trained_folder(Store(tmp_path), first_run()).exists()


def interrupted_fit(own, passes: int):
    "`fit` that is interrupted in a forward pass of training, with a checkpoint after each step."

    def fit(method, *others, **folder):
        count = itertools.count()

        def interrupt(*_):
            if torch.is_grad_enabled() and next(count) == passes:
                raise KeyboardInterrupt

        method.model.register_forward_pre_hook(interrupt)
        return own(method, *others, **folder, checkpoint_every=0)

    return fit


def test_an_interrupted_training_resumes(tmp_path, monkeypatch):
    "Its record is that of an uninterrupted run, with a note."
    spec = replace(first_run(), training={"max_steps": 8, "batch_size": 4})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runner, "fit", interrupted_fit(runner.fit, 4))
        run_job(Store(tmp_path), Job("run", spec), 16)
    resumed, plain = (
        run_job(Store(folder), Job("run", spec), 16) for folder in (tmp_path, tmp_path / "plain")
    )
    assert (resumed["note"], plain["note"]) == ("resumed at step 4", "")
    assert (resumed["loss"], resumed["accuracy"]) == (plain["loss"], plain["accuracy"])


def test_out_of_memory_halves_the_batch_once(tmp_path, monkeypatch):
    spec, own, calls, room = first_run(), runner.fit, [], 8

    def fit(method, tokenizer, task, config, **folder):
        calls.append((config.batch_size, config.accumulation_steps))
        if config.batch_size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(method, tokenizer, task, config, **folder)

    monkeypatch.setattr(runner, "fit", fit)
    note = "out of memory with batch_size 16: trained with batch_size 8 and accumulation_steps 2"
    halved = run_job(Store(tmp_path), Job("run", spec), 16)
    assert calls == [(16, 1), (8, 2)] and (halved["status"], halved["note"]) == ("done", note)
    monkeypatch.setattr(runner, "fit", own)
    whole = run_job(Store(tmp_path / "whole"), Job("run", spec), 16)
    assert abs(halved["loss"] - whole["loss"]) < 1e-5  # the same steps, summed in another order

    killed = Store(tmp_path / "killed")  # in the middle of the training with half a batch
    monkeypatch.setattr(runner, "fit", interrupted_fit(fit, 5))
    with pytest.raises(KeyboardInterrupt):
        run_job(killed, Job("run", spec), 16)
    monkeypatch.setattr(runner, "fit", fit)
    calls.clear()
    resumed = run_job(killed, Job("run", spec), 16)
    assert resumed["note"] == f"{note}; resumed at step 2" and calls == [(8, 2)]
    assert resumed["loss"] == halved["loss"]

    room = 4
    calls.clear()
    record = run_job(Store(tmp_path / "never"), Job("run", spec), 16)
    assert calls == [(16, 1), (8, 2)] and "OutOfMemoryError" in record["error"]
    odd = replace(spec, training={**spec.training, "batch_size": 15})
    calls.clear()
    record = run_job(Store(tmp_path / "odd"), Job("run", odd), 16)
    assert calls == [(15, 1)] and record["status"] == "failed"  # two halves are not the whole


def test_no_space_for_what_was_trained_stops_the_grid(tmp_path):
    "A file in place of the folder: nothing can be written there, as on a full or read-only disk."
    (tmp_path / "trained").write_text("")
    with pytest.raises(ExperimentError, match="free some space"):
        run_grid(GRID, tmp_path, say=None)
    assert records_of(Store(tmp_path).records(), "run") == {}  # it counts against no rate
    (tmp_path / "trained").unlink()
    small = replace(GRID, arms={"lora": GRID.arms["lora"]})
    run_grid(small, tmp_path / "later", say=None)
    assert plan(small, Store(tmp_path / "later").records()) == []


@pytest.mark.slow
def test_every_method_works_in_a_grid(tmp_path):
    store = run_grid(preset("smoke"), tmp_path, say=None)
    records = [record for record in store.records() if record["kind"] != "experiment"]
    assert {record["spec"]["method"] for record in records} == {"zero_shot", *METHODS}
    assert [record for record in records if record["status"] != "done"] == []
    frame = statistics.table(preset("smoke"), store).frame
    assert frame.accuracy.notna().all() and (frame.seeds == "1").all()


# Statistics and claims


def coverage(seeds: int, spread: float, experiments: int) -> float:
    "How often the interval contains the true value, in experiments with known truth."
    chance, hits = np.random.default_rng(0), 0
    for number in range(experiments):
        difficulty = 0.1 + 0.8 * chance.beta(1.5, 0.5, 300)[None]
        rates = difficulty + chance.normal(0, spread, (seeds, 1))
        right = (chance.random((seeds, 300)) < rates).astype(float)
        low, high = intervals.percentile_interval(intervals.bootstrap_draws(right, number))
        hits += low <= 0.7 <= high
    return hits / experiments


def test_intervals_contain_the_truth_as_often_as_stated():
    "Three standard errors of 95 % in 100 experiments are 6.5 points."
    assert coverage(5, 0.03, 100) >= 0.885


@pytest.mark.slow
@pytest.mark.parametrize("seeds, spread", [(3, 0.0), (3, 0.03), (5, 0.03), (5, 0.0)])
def test_intervals_contain_the_truth_in_400_experiments(seeds, spread):
    "Three standard errors are 3.3 points; three seeds tell little about how much seeds differ."
    assert 0.90 <= coverage(seeds, spread, 400) <= 0.985


def test_a_claim_is_settled_on_the_pairs_that_exist(monkeypatch):
    "Of the kinds after the block and after the MLP this grid has one."
    arm = GRID.arms["linear"]
    arms = {"post_block_linear": arm, "mlp_linear": arm, "post_block_vector": arm}
    shares = {"post_block_linear": 3, "mlp_linear": 4}  # each third, each fourth answer is correct

    def made_up(experiment, records, model, task, arm):
        if arm not in shares:
            return None, []
        digits = "".join("1" if example % shares[arm] == 0 else "0" for example in range(40))
        return None, [{"correct": digits} for seed in experiment.seeds]

    monkeypatch.setattr(claims, "test_records", made_up)
    found = claims.claims(replace(GRID, arms=arms), "no such folder").frame
    row = found[found.says.str.startswith("after the block beats after the MLP")].iloc[0]
    assert row.difference == pytest.approx(14 / 40 - 10 / 40) and row.pairs == 1
    row = found[found.says.str.startswith("after the block beats the attention")].iloc[0]
    assert row.verdict == "no runs yet"


def test_trivial_rules_answer_from_the_prompt_or_the_most_frequent_answer():
    digits = [f" {digit}" for digit in range(10)]
    prompts = {"[MAX 3 7 ] =": 7, "[MIN 7 2 7 ] =": 7, "[LAST 4 [MIN 1 9 ] ] =": 1, "no digit": 0}
    test = tuple(
        replace(choice_example(prompt, digits, answer), id=str(answer) + prompt)
        for prompt, answer in prompts.items()
    )
    found = gate.trivial_rules(Task("toy", "choice", (), (), test, "generated", ""))
    assert {rule: right.tolist() for rule, right in found.items()} == {
        "majority": [1, 1, 0, 0],
        "first": [0, 1, 0, 0],
        "last": [1, 1, 0, 0],
        "most frequent token": [0, 1, 1, 0],  # ties: the first choice
        "copy": [0, 0, 1, 1],  # 3, 2, 1, and 0 where no choice occurs
        "outer operator, flat": [1, 0, 0, 0],
    }


def gated_records(right, best_step, experiment):
    "Tests of full fine-tuning, and of the model without training, which is never right."
    specs = [experiment.spec("tiny-llama", "listops", "full", 1e-3, seed) for seed in (0, 1)]
    runs = [
        {"kind": "run", "id": spec.id, "status": "done", "accuracy": 0.5, "loss": 1.0}
        | {"steps": 3, "best_step": best_step}
        for spec in specs
    ]
    untuned = experiment.spec("tiny-llama", "listops", "zero_shot", None, 0)
    digits = "".join(str(int(one)) for one in right)
    tests = [
        {"kind": "test", "id": spec.id, "status": "done", "spec": asdict(spec), "correct": digits}
        for spec in specs
    ]
    wrong = {**tests[0], "id": untuned.id, "spec": asdict(untuned), "correct": "0" * len(right)}
    return [*runs, *tests, wrong]


@pytest.mark.parametrize(
    "accuracy, best_step, passed",
    [(0.75, 2, True), (0.75, 3, False), (0.68, 2, False), (0.3, 2, False)],
)
def test_a_task_passes_the_gate_if_full_fine_tuning_beats_the_best_rule_and_has_converged(
    monkeypatch, accuracy, best_step, passed
):
    "The best rule has 0.5 of 1,000 examples; 0.68 is above it beyond any doubt, but not by 0.2."
    rule = (np.arange(1000) % 2).astype(float)
    right = rule.copy()
    right[np.flatnonzero(rule == 0)[: round((accuracy - 0.5) * 1000)]] = 1
    if accuracy < 0.5:
        right[:400] = 0
    monkeypatch.setattr(gate, "_rules", lambda arguments: {"odd": rule, "none": 0 * rule})
    experiment = replace(GRID, arms={"full": Arm("full", (1e-3,))}, gated=True)
    records = gated_records(right, best_step, experiment)
    found = gate.gate_record(experiment, records, "tiny-llama", "listops")
    assert (found["passed"], found["best"]) == (passed, "odd")
    assert found["rules"] == {"odd": 0.5, "none": 0.0, "untuned": 0.0}
    assert found["full"] == pytest.approx(right.mean()) and found["last"] == (best_step == 3)
    assert gate.gate_record(experiment, records[:-1], "tiny-llama", "listops") is None
    assert gate.gate_record(experiment, records[1:], "tiny-llama", "listops") is None
    with pytest.raises(ExperimentError, match="add the method 'full'"):
        replace(GRID, gated=True)


def test_tasks_that_do_not_pass_the_gate_are_left_out_of_a_comparison(monkeypatch):
    "On the first task the first method is better, on the second, which does not count, worse."
    arms = {"full": Arm("full", (1e-3,)), "linear": GRID.arms["linear"]}
    two = replace(GRID, arms=arms, tasks={"first": TASK, "second": {**TASK, "length": 7}})
    passed = {"first": True, "second": False}

    def made_up(experiment, records, model, task, arm):
        digits = "1" * 30 + "0" * 10 if (task == "first") == (arm == "linear") else "0" * 40
        return None, [{"correct": digits} for seed in experiment.seeds]

    monkeypatch.setattr(claims, "test_records", made_up)
    monkeypatch.setattr(
        claims, "gate_of", lambda experiment, records, model, task: {"passed": passed[task]}
    )
    better = claims.Claim("", "", ("linear",), ("full",))
    found = better.settle(two, "no such folder")
    assert (found.word, found.difference, found.pairs) == ("reproduced", 0.75, 1)
    passed["first"] = False
    found = better.settle(two, "no such folder")
    assert (found.word, found.difference, found.pairs) == (claims.NOT_TESTABLE, 0.0, 2)


def test_the_recovered_share_compares_the_same_seeds(monkeypatch):
    "The method has the seeds 1 and 2 of three; full fine-tuning is at its worst with seed 0."
    right = {"zero_shot": [20], "full": [40, 60, 80], "linear": [None, 40, 60]}
    experiment = replace(GRID, arms={"full": Arm("full", (1e-3,)), "linear": GRID.arms["linear"]})

    def made_up(experiment, records, model, task, arm):
        return None, [
            {
                "correct": "1" * count + "0" * (100 - count),
                "spec": {"seed": seed, "method": arm},
            }
            for seed, count in enumerate(right[arm])
            if count is not None
        ]

    monkeypatch.setattr(statistics, "test_records", made_up)
    tests = made_up(experiment, [], "m", "t", "linear")[1]
    found = statistics._recovered(experiment, [], "m", "t", tests)
    assert found["recovered"] == pytest.approx((50 - 20) / (70 - 20))


def test_a_gated_grid_trains_other_methods_only_where_the_gate_is_passed(tmp_path, monkeypatch):
    "A random model cannot pass; with a gate that is always passed, the other method runs too."
    arms = {"linear": GRID.arms["linear"], "full": Arm("full", (1e-3,))}
    small = replace(GRID, arms=arms, sweep_seeds=(0,), seeds=(0,), gated=True)
    said = []
    run_grid(small, tmp_path / "stopped", say=said.append)
    records = Store(tmp_path / "stopped").records()
    assert {one["spec"]["method"] for one in records if "spec" in one} == {"zero_shot", "full"}
    [kept] = [one for one in records if one["kind"] == "gate"]
    assert not kept["passed"] and set(kept["rules"]) >= {"majority", "first", "last", "untuned"}
    assert plan(small, records) == [] and sum("gate of" in line for line in said) == 1
    settled = claims.Claim("", "a", ("full",), ("full",)).settle(small, tmp_path / "stopped")
    assert settled.word == claims.NOT_TESTABLE

    monkeypatch.setattr(grid, "gate_record", lambda *_: {**kept, "passed": True})
    run_grid(small, tmp_path / "whole", say=None)
    methods = [
        one["spec"]["method"] for one in Store(tmp_path / "whole").records() if "spec" in one
    ]
    assert methods.index("post_block_linear") > max(
        place for place, name in enumerate(methods) if name == "full"
    )


def test_costs_are_measured_once_and_shown(whole, tmp_path, monkeypatch):
    "In the table they are in place of what the grid recorded."
    store, said = Store(tmp_path), []
    store.path.write_bytes(Store(whole).path.read_bytes())
    before = statistics.table(GRID, store).frame.set_index("arm")
    cost = {"seconds": 9999.0, "memory": 9999, "device": before.device["lora"]}
    monkeypatch.setattr(statistics, "_cost", lambda spec: cost)
    statistics.measure_costs(GRID, store, said.append)
    after = statistics.table(GRID, store).frame.set_index("arm")
    assert len(records_of(store.records(), "measurement")) == len(said) == 3
    for column in ("seconds", "memory"):
        assert (after.loc[list(GRID.arms), column] == 9999).all()
        assert (before.loc[list(GRID.arms), column] != 9999).all()
    others = ["seconds", "memory"]
    assert after.drop(columns=others).equals(before.drop(columns=others))
    statistics.measure_costs(GRID, store, said.append)
    assert said[3:] == said[:3] and plan(GRID, store.records()) == []


@pytest.mark.slow
def test_a_cost_is_measured_in_a_process_of_its_own(whole, tmp_path):
    store = Store(tmp_path)
    store.path.write_bytes(Store(whole).path.read_bytes())
    statistics.measure_costs(replace(GRID, arms={"lora": GRID.arms["lora"]}), store, None)
    [cost] = [record["values"] for record in records_of(store.records(), "measurement").values()]
    assert cost["seconds"] > 0 and 100 < cost["memory"] < 5000


def test_side_effects_are_in_test_records_and_can_be_added_to_earlier_ones(whole, tmp_path):
    "A store of schema 1 is read; training its runs once more gives the same numbers."
    tests = records_of(Store(whole).records(), "test").values()
    assert {"unrelated" in test for test in tests if test["spec"]["method"] != "zero_shot"} == {
        True
    }
    earlier, said = Store(tmp_path), []
    for record in Store(whole).records():
        record = {name: value for name, value in record.items() if name != "unrelated"}
        earlier.append(record | {"schema": 1})
    expected = statistics.table(GRID, whole).frame.set_index("arm")
    columns = ["kl", "loss_change", "agreement"]
    assert not set(columns) & set(statistics.table(GRID, earlier).frame)
    statistics.measure_side_effects(GRID, earlier, seeds=1, say=said.append)
    statistics.measure_side_effects(GRID, earlier, seeds=len(GRID.seeds), say=said.append)
    found = statistics.table(GRID, earlier).frame.set_index("arm")
    assert found[columns].equals(expected[columns]) and (found.kl[list(GRID.arms)] > 0).all()
    statistics.measure_side_effects(GRID, Store(whole), seeds=1, say=said.append)  # nothing to do
    assert len(said) == len(GRID.arms) * (1 + len(GRID.seeds))
    shown = statistics.table(GRID, earlier).markdown()
    assert "loss_change" in shown


# The testbed


def test_the_committed_runs_started_from_the_models_in_the_package():
    "The digest of a model's file is the revision in each of its records."
    runs = records_of(Store(STORES / "testbed").records(), "run").values()
    revisions = {(run["spec"]["model"], run["revision"]) for run in runs if run["status"] == "done"}
    models = {model for model, _ in revisions}
    assert "listops-0.9m" in models and len(revisions) == len(models)
    for model, revision in revisions:
        file = Path(testbed.__file__).parent / testbed.testbed_file(model)
        assert revision == hashlib.sha256(file.read_bytes()).hexdigest()
        assert testbed.load_testbed(model)[0].config._commit_hash == revision


def test_the_testbed_can_be_trained_and_has_the_shape_of_the_one_in_the_package(
    tmp_path, monkeypatch
):
    base = testbed.TESTBED_BASES["listops-0.9m"]
    short = {
        "task": {**base["task"], "n_train": 256, "n_validation": 20, "n_test": 1},
        "training": {**base["training"], "max_steps": 3},
    }
    monkeypatch.setitem(testbed.TESTBED_BASES, "listops-0.9m", short)
    testbed.train_testbed("listops-0.9m", tmp_path / "base.safetensors")
    package = Path(testbed.__file__).parent
    made, kept = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
        for path in (tmp_path / "base.safetensors", package / "listops_0.9m.safetensors")
    )
    assert made == kept


def test_a_spec_is_equal_to_the_one_read_from_its_record():
    spec = first_run()
    assert Spec(**json.loads(json.dumps(asdict(spec)))).id == spec.id
