"What does not fit into the notebook of experiments: kills, several processes, a full disk, a GPU without room."

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from steer_nb import bench, experiments
from steer_nb.experiments.grid import do, run_grid
from steer_nb.experiments.jobs import Arm, Experiment, Job, plan
from steer_nb.experiments.presets import preset
from steer_nb.experiments.store import ExperimentError, Store
from steer_nb.experiments.testbed import load_bed

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
LONG = replace(
    GRID,
    arms={"linear": Arm("post_block_linear", (1e-2, 3e-2), {"rank": 2})},
    training={"epochs": 1000, "batch_size": 16},
)
FULL = replace(GRID, arms={"full": Arm("full", (1e-3,))}, sweep_seeds=(0,), seeds=(0,))
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[2])
import test_experiments
from steer_nb.experiments.grid import run_grid
grid = getattr(test_experiments, sys.argv[4] if len(sys.argv) > 4 else "GRID")
if __name__ == "__main__": run_grid(grid, sys.argv[1], processes=int(sys.argv[3]) if len(sys.argv) > 3 else 1)
"""
HERE = os.path.dirname(__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(store, *more, tmp_path, **how):
    script = tmp_path / "grid.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, script, store, HERE, *map(str, more)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **how,
    )


def outcome(store) -> dict:
    "What the records say, without times, memory and dates."
    varying = {
        "seconds",
        "memory",
        "date",
        "note",
    }  # the note tells of a training that was taken up again
    return {
        (r["kind"], r["id"]): {key: value for key, value in r.items() if key not in varying}
        for r in Store(store).records()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The grid in one go."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run_grid(GRID, folder, say=None)
    return folder


def test_a_killed_grid_goes_on_and_ends_the_same(whole, tmp_path):
    folder = tmp_path / "killed"
    for lines in (3, 6):  # killed twice, wherever it is then
        process = start(folder, tmp_path=tmp_path)
        while process.poll() is None and (
            not (folder / "runs.jsonl").exists()
            or (folder / "runs.jsonl").read_bytes().count(b"\n") < lines
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for claim in (folder / "claims").iterdir():
            os.utime(claim, (1, 1))  # a minute later
    assert plan(GRID, Store(folder).records()) != []
    process = start(folder, tmp_path=tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert outcome(folder) == outcome(whole) and plan(GRID, Store(folder).records()) == []


def test_two_processes_share_a_grid(whole, tmp_path):
    process = start(tmp_path / "shared", 2, tmp_path=tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    lines = [
        json.loads(line) for line in (tmp_path / "shared" / "runs.jsonl").read_text().splitlines()
    ]
    assert len({(line["kind"], line["id"]) for line in lines}) == len(lines), (
        "something was done twice"
    )
    assert {
        key: record.get("accuracy") for key, record in outcome(tmp_path / "shared").items()
    } == {key: record.get("accuracy") for key, record in outcome(whole).items()}
    assert not list((tmp_path / "shared" / "claims").iterdir())


def test_ctrl_c_in_a_terminal_lets_the_workers_end_their_step(tmp_path):
    "It reaches the parent and its workers at once. What was being trained has a checkpoint then, and the claims are free."
    process = start(
        tmp_path / "grid",
        2,
        "LONG",
        tmp_path=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell starts background jobs deaf to it
    while not list((tmp_path / "grid").glob("trained/*/checkpoints")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert list((tmp_path / "grid").glob("trained/*/checkpoints/0*")) and not list(
        (tmp_path / "grid" / "claims").iterdir()
    ), said


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_process_that_began_them(tmp_path, how):
    "Whoever stops a grid stops all of it: the workers end their step, write a checkpoint, and give their claims back."
    process = start(tmp_path / "grid", 2, "LONG", tmp_path=tmp_path, start_new_session=True)
    try:
        while (
            len(list((tmp_path / "grid").glob("trained/*/checkpoints"))) < 2
            and process.poll() is None
        ):
            time.sleep(0.01)
        process.send_signal(how)
        said, _ = process.communicate(
            timeout=60
        )  # the workers have its output open: it ends when they have ended
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == -how, said
    assert len(list((tmp_path / "grid").glob("trained/*/checkpoints/0*"))) == 2 and not list(
        (tmp_path / "grid" / "claims").iterdir()
    ), said


def test_a_launch_of_two_does_each_run_once_and_together(whole, tmp_path):
    script = tmp_path / "grid.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            tmp_path / "launch",
            HERE,
        ],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [
        json.loads(line) for line in (tmp_path / "launch" / "runs.jsonl").read_text().splitlines()
    ]
    assert len({(line["kind"], line["id"]) for line in lines}) == len(lines)
    runs = {line["id"]: line for line in lines if line["kind"] == "run"}
    assert all(line["status"] == "done" and line["processes"] == 2 for line in runs.values()), lines
    alone = {key[1]: record for key, record in outcome(whole).items() if key[0] == "run"}
    assert runs.keys() == alone.keys()
    assert all(
        abs(runs[key]["loss"] - alone[key]["loss"]) < 1e-4 for key in runs
    )  # sums in another order


def test_a_launch_of_two_that_share_the_model(tmp_path):
    "Full fine-tuning under FSDP2: what is kept is whole, and is tested like what one process trained."
    script = tmp_path / "grid.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            tmp_path / "shared",
            HERE,
            "1",
            "FULL",
        ],
        env={
            **ENVIRONMENT,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run_grid(FULL, tmp_path / "alone", say=None)
    shared, alone = outcome(tmp_path / "shared"), outcome(tmp_path / "alone")
    assert shared.keys() == alone.keys() and all(
        record["status"] == "done" for record in shared.values() if "status" in record
    ), shared
    kinds = {record["kind"]: (record, alone[key]) for key, record in shared.items()}
    assert (
        kinds["run"][0]["processes"] == 2
        and abs(kinds["run"][0]["loss"] - kinds["run"][1]["loss"]) < 1e-4
    )  # sums in another order
    assert kinds["test"][0]["correct"] == kinds["test"][1]["correct"]
    one, other = (
        next((tmp_path / name / "trained").rglob("*.safetensors")).stat().st_size
        for name in ("shared", "alone")
    )
    assert one == other


@pytest.mark.parametrize("room", [900, 1500])
def test_a_full_disk_leaves_the_store_readable(tmp_path, room):
    "A file-size limit is a full disk for one file: the write stops in the middle."
    code = f"""
import resource, signal, sys
from steer_nb.experiments.store import ExperimentError, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store({str(tmp_path)!r})
for number in range(3): store.append({{"kind": "run", "id": str(number), "text": "x" * 200}})
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    for number in range(3, 9): store.append({{"kind": "run", "id": str(number), "text": "x" * 200}})
except ExperimentError as error: print(error)
else: raise SystemExit("it was written")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "make room and start again" in done.stdout, (
        done.stdout + done.stderr
    )
    whole = Store(tmp_path).records()
    assert [record["id"] for record in whole] == [
        str(number) for number in range(len(whole))
    ] and 3 <= len(whole) < 9
    assert (tmp_path / "runs.jsonl").read_bytes().endswith(b"\n")
    Store(tmp_path).append({"kind": "run", "id": "later"})
    assert len(Store(tmp_path).records()) == len(whole) + 1


def test_ids_are_the_same_in_every_process():
    code = "from steer_nb.experiments import preset, plan; print([job.spec.id for job in plan(preset('smoke'), [])])"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(said) == 1 and len(said.pop()) > 100


def test_of_many_that_see_a_stale_claim_one_takes_it(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "claims").mkdir()
    for number in range(20):
        path = tmp_path / "claims" / f"run-{number}"
        path.touch()
        os.utime(path, (1, 1))
        with ThreadPoolExecutor(8) as pool:
            took = list(pool.map(lambda _: experiments._take(path, str(_), 60.0), range(8)))
        assert sum(took) == 1, took
    assert sorted(p.name for p in store.folder.joinpath("claims").iterdir()) == sorted(
        f"run-{number}" for number in range(20)
    )


def test_a_live_claim_is_respected_and_its_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "BEAT", 0.05)
    store = Store(tmp_path)
    with experiments.claimed(store, "a", stale=0.5) as mine:
        assert mine
        for _ in range(8):  # longer than it takes to go stale
            time.sleep(0.15)
            with experiments.claimed(store, "a", stale=0.5) as again:
                assert not again


def test_a_sleeper_touches_no_claim_that_another_has_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "BEAT", 3600.0)  # asleep
    store = Store(tmp_path)
    with experiments.claimed(store, "a") as first:
        assert first
        os.utime(tmp_path / "claims" / "a", (1, 1))  # for a long time
        second = experiments.claimed(store, "a")
        assert second.__enter__()
        before = (tmp_path / "claims" / "a").read_text()
    assert (
        tmp_path / "claims" / "a"
    ).read_text() == before  # the sleeper woke, and gave back nothing
    with experiments.claimed(store, "a") as third:
        assert not third
    second.__exit__(None, None, None)
    assert not (tmp_path / "claims" / "a").exists()


@pytest.mark.parametrize("seeds, spread", [(3, 0.0), (3, 0.03), (5, 0.03), (5, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, spread):
    "Of 400 experiments with known truth: right or wrong by the difficulty of the example and the luck of the seed. Three standard errors of 95 % are 3.3 points; below there is more room, for three seeds tell little of how much seeds differ."
    chance, hits = np.random.default_rng(0), 0
    for number in range(400):
        rates = 0.1 + 0.8 * chance.beta(1.5, 0.5, 300)[None] + chance.normal(0, spread, (seeds, 1))
        right = (chance.random((seeds, 300)) < rates).astype(float)
        low, high = experiments._interval(experiments._draws(right, number))
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 400 <= 0.985, hits / 400


def test_what_failed_is_not_done_again_where_test_was_scored(whole):
    "Another rate would be selected then, and test scored twice."
    records = Store(whole).records()
    sweep = next(
        r
        for r in records
        if r["kind"] == "run"
        and r["spec"]["method"] == "post_block_linear"
        and r["id"] not in {t["id"] for t in records if t["kind"] == "test"}
    )

    class Changed(Store):
        def records(self):
            return [
                {**r, "status": "failed"} if r["kind"] == "run" and r["id"] == sweep["id"] else r
                for r in records
                if keep(r)
            ]

    keep = lambda record: True
    assert experiments._may_be_done_again(GRID, Changed(whole)) == []
    keep = lambda record: record["kind"] != "test"
    assert [r["id"] for r in experiments._may_be_done_again(GRID, Changed(whole))] == [sweep["id"]]


def test_a_test_without_its_training_trains_again(whole, tmp_path):
    job = next(
        job
        for job in plan(GRID, [r for r in Store(whole).records() if r["kind"] != "test"])
        if job.kind == "test" and job.spec.method == "joint"
    )
    record = do(Store(tmp_path), job, GRID.batch_size)
    before = outcome(whole)["test", job.spec.id]
    assert record["correct"] == before["correct"] and record["parts"] == before["parts"]


def test_a_training_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    "Ctrl-C in the middle of a run, after the fourth of its steps; the record is that of a run in peace, and says what happened."
    spec = next(job.spec for job in plan(GRID, []) if job.kind == "run")
    spec, own = replace(spec, training={"max_steps": 8, "batch_size": 4}), experiments.fit

    def fit(method, *others, **folder):
        steps = iter(range(5))

        def count(*_):
            if torch.is_grad_enabled() and next(steps) == 4:
                raise KeyboardInterrupt

        method.model.register_forward_pre_hook(count)
        return own(method, *others, **folder, checkpoint_every=0)

    monkeypatch.setattr(experiments, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        do(Store(tmp_path), Job("run", spec), 16)
    monkeypatch.setattr(experiments, "fit", own)
    again, peace = (
        do(Store(folder), Job("run", spec), 16) for folder in (tmp_path, tmp_path / "peace")
    )
    assert (
        again["note"] == "taken up again at step 4"
        and peace["note"] == ""
        and again["loss"] == peace["loss"]
        and again["accuracy"] == peace["accuracy"]
    )


def test_no_room_for_what_was_trained_stops_the_grid_and_counts_against_no_rate(tmp_path):
    "A file where the folder of trained parameters should be: nothing can be written there, as on a full or read-only disk."
    (tmp_path / "trained").write_text("")
    with pytest.raises(ExperimentError, match="make room and start again"):
        run_grid(GRID, tmp_path, say=None)
    assert [record["kind"] for record in Store(tmp_path).records() if record["kind"] == "run"] == []
    assert not list((tmp_path / "claims").iterdir())
    (tmp_path / "trained").unlink()
    run_grid(GRID, tmp_path, say=None)
    assert plan(GRID, Store(tmp_path).records()) == [] and all(
        record["status"] == "done" for record in Store(tmp_path).records() if "status" in record
    )


def test_a_model_that_is_not_there_stops_the_grid(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        run_grid(replace(GRID, models=("tiny-lama",)), tmp_path, say=None)
    assert all(record["kind"] == "experiment" for record in Store(tmp_path).records())


def test_without_room_the_batch_is_halved_once(tmp_path, monkeypatch):
    spec = next(job.spec for job in plan(GRID, []) if job.kind == "run")
    own, calls = experiments.fit, []

    def fit(method, tokenizer, task, config, **folder):
        calls.append((config.batch_size, config.accumulation_steps))
        if config.batch_size > small:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(method, tokenizer, task, config, **folder)

    monkeypatch.setattr(experiments, "fit", fit)
    small = 8
    record = do(Store(tmp_path), Job("run", spec), 16)
    assert (
        calls == [(16, 1), (8, 2)]
        and record["status"] == "done"
        and record["note"] == "out of memory with batch_size 16: 8, and 2 passes a step"
    )
    monkeypatch.setattr(experiments, "fit", own)
    assert (
        abs(record["loss"] - do(Store(tmp_path / "whole"), Job("run", spec), 16)["loss"]) < 1e-5
    )  # the same steps, summed in another order
    monkeypatch.setattr(experiments, "fit", fit)

    def killed(
        *arguments, **folder
    ):  # with half the batch, and in the middle: it goes on with half the batch
        method, passes = arguments[0], itertools.count()

        def hook(*_):
            if torch.is_grad_enabled() and next(passes) == 5:
                raise KeyboardInterrupt

        method.model.register_forward_pre_hook(hook)
        return fit(*arguments, **folder, checkpoint_every=0)

    monkeypatch.setattr(experiments, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        do(Store(tmp_path / "killed"), Job("run", spec), 16)
    monkeypatch.setattr(experiments, "fit", fit)
    calls[:] = []
    assert do(Store(tmp_path / "killed"), Job("run", spec), 16)["note"] == record[
        "note"
    ] + "; taken up again at step 2" and calls == [(8, 2)]
    small, calls[:] = 4, []
    record = do(Store(tmp_path / "never"), Job("run", spec), 16)
    assert (
        calls == [(16, 1), (8, 2)]
        and record["status"] == "failed"
        and "OutOfMemoryError" in record["error"]
    )
    small, calls[:] = 0, []
    record = do(
        Store(tmp_path / "odd"),
        Job("run", replace(spec, training={**spec.training, "batch_size": 15})),
        16,
    )
    assert calls == [(15, 1)] and record["status"] == "failed"  # 7 and 7 would be another training


def test_a_definition_may_grow_but_not_change(whole):
    before = (whole / "runs.jsonl").read_bytes()
    for changed in (
        dict(training={"max_steps": 4, "batch_size": 16}),
        dict(tasks={"listops": {**TASK, "n_test": 30}}),
        dict(arms={**GRID.arms, "lora": Arm("lora", (1e-2,), {"rank": 4})}),
        dict(arms={**GRID.arms, "lora": Arm("lora", (1e-2, 2e-2), {"rank": 2})}),
        dict(sweep_seeds=(0, 1, 2)),
        dict(widen=1),
        dict(budgets={"listops": {"max_steps": 4}}),
    ):
        with pytest.raises(ExperimentError, match="another experiment named 'grid'"):
            run_grid(replace(GRID, **changed), whole, say=None)
    assert (whole / "runs.jsonl").read_bytes() == before
    grown = replace(GRID, arms={**GRID.arms, "bitfit": Arm("bitfit", (1e-2,))})
    store = Store(whole)
    experiments._check_definition(grown, store)
    assert {job.spec.method for job in plan(grown, store.records())} == {"bitfit"}


def test_smoke_has_every_method_and_none_fails(tmp_path):
    store = run_grid(preset("smoke"), tmp_path, say=None)
    records = [record for record in store.records() if record["kind"] != "experiment"]
    assert {record["spec"]["method"] for record in records} == {"zero_shot", *experiments.METHODS}
    assert [record for record in records if record["status"] != "done"] == []
    frame = experiments.table(preset("smoke"), store).frame
    assert frame.accuracy.notna().all() and (frame.seeds == "1").all()


def test_a_claim_is_settled_on_the_pairs_that_are_there(whole):
    "Of the three kinds after the block and after the MLP this grid has one."
    grid = replace(
        GRID,
        arms={
            "post_block_linear": GRID.arms["linear"],
            "mlp_linear": replace(GRID.arms["linear"], method="mlp_linear"),
            "post_block_vector": GRID.arms["lora"],
        },
    )
    made, tests = [], [record for record in Store(whole).records() if record["kind"] == "test"]
    for arm, share in (
        ("post_block_linear", 3),
        ("mlp_linear", 4),
    ):  # every third right, every fourth right
        for seed in grid.seeds:
            bits = "".join("1" if example % share == 0 else "0" for example in range(40))
            made.append({**tests[0], "arm": arm, "correct": bits, "seed": seed})
    found = []
    own = experiments._tests
    experiments._tests = lambda experiment, records, model, task, arm: (
        None,
        [record for record in made if record["arm"] == arm],
    )
    try:
        found = experiments.claims(grid, whole).frame
    finally:
        experiments._tests = own
    row = found[found.says.str.startswith("after the block beats after the MLP")].iloc[0]
    assert row.difference == pytest.approx(14 / 40 - 10 / 40) and row.pairs == 1
    assert (
        found[found.says.str.startswith("after the block beats the attention")].iloc[0].verdict
        == "no runs yet"
    )


def test_costs_are_those_of_an_undisturbed_run(whole, tmp_path):
    "One measurement an arm, kept, and shown in the table in place of what the grid noted."
    for record in Store(whole).records():
        Store(tmp_path).append(
            {**record, **{key: 9999 for key in ("seconds", "memory") if key in record}}
        )  # what the grid noted
    before, said = experiments.table(GRID, tmp_path).frame.set_index("arm"), []
    experiments.measure_costs(GRID, tmp_path, said.append)
    costs = {
        record["settings"]["spec"]: record["values"]
        for record in Store(tmp_path).records()
        if record["kind"] == "measurement"
    }
    assert len(costs) == len(said) == 3 and all(
        cost["seconds"] > 0 and 100 < cost["memory"] < 5000 for cost in costs.values()
    )
    after = experiments.table(GRID, tmp_path).frame.set_index("arm")
    for arm in GRID.arms:
        cost = costs[GRID.spec("tiny-llama", "listops", arm, after.lr[arm], 0).id]
        assert (
            (after.seconds[arm], after.memory[arm])
            == (cost["seconds"], cost["memory"])
            != (before.seconds[arm], before.memory[arm])
            == (9999, 9999)
        )
    assert after.drop(columns=["seconds", "memory"]).equals(
        before.drop(columns=["seconds", "memory"])
    )
    experiments.measure_costs(GRID, tmp_path, said.append)
    assert said[3:] == said[:3] and plan(GRID, Store(tmp_path).records()) == []


def test_the_committed_runs_began_from_the_model_in_the_package():
    "Another base would make other results: the file's digest is in every record."
    with open(
        os.path.join(os.path.dirname(experiments.__file__), "listops_llama.safetensors"), "rb"
    ) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert load_bed("listops-llama")[0].config._commit_hash == digest
    for name in ("listops", "listops-ranks"):
        records = Store(os.path.join(os.path.dirname(HERE), "nbs", "store", name)).records()
        assert {
            record["revision"]
            for record in records
            if record["kind"] == "run" and record["status"] == "done"
        } == {digest}


def test_the_base_can_be_trained_and_has_the_shape_of_the_one_in_the_package(tmp_path, monkeypatch):
    "Three steps of it; what is written is read as the package's file is."
    monkeypatch.setitem(
        experiments.BED, "training", {**experiments.BED["training"], "max_steps": 3}
    )
    experiments.train_listops_base(tmp_path / "base.safetensors")
    made, kept = (
        load_file(path)
        for path in (
            tmp_path / "base.safetensors",
            os.path.join(os.path.dirname(experiments.__file__), "listops_llama.safetensors"),
        )
    )
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()
    }


def test_the_command_line(tmp_path):
    def steer_nb(*arguments):
        return subprocess.run(
            [os.path.join(os.path.dirname(sys.executable), "steer_nb"), *map(str, arguments)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )

    done = steer_nb(
        "experiment",
        "smoke",
        "--store",
        tmp_path / "store",
        "--arms",
        "lora,post_block_linear",
        "--costs",
    )
    assert (
        done.returncode == 0
        and done.stdout.count(" MiB\n") == 2
        and "| tiny-llama | listops | test | post_block_linear |" in done.stdout
    ), done.stdout + done.stderr
    planned = steer_nb("experiment", "paper", "--dry-run")
    assert (
        planned.returncode == 0
        and "meta-llama/Meta-Llama-3-8B" in planned.stdout
        and "hours" in planned.stdout
    )
    wrong = steer_nb("experiment", "smok")
    assert wrong.returncode == 1 and "did you mean 'smoke'?" in wrong.stderr


def test_the_front_page_shows_what_the_store_says():
    "The README's verdicts and results are those of the committed runs: run nbs/index.ipynb and `make readme` after adding runs."
    top = os.path.dirname(HERE)
    with open(os.path.join(top, "README.md"), encoding="utf-8") as file:
        page = file.read()
    folder, experiment = os.path.join(top, "nbs", "store", "listops"), preset("listops")
    assert repr(experiments.claims(experiment, folder).settled()) in page
    assert experiments.table(experiment, folder).markdown() in page
    real = experiments.table(preset("small-cpu"), os.path.join(top, "nbs", "store", "small-cpu"))
    real = type(real)(real.frame[real.frame.accuracy.notna()], real.against)
    assert len(real.frame) and real.markdown() in page
    assert (
        repr(
            experiments.claims(
                preset("small-cpu"), os.path.join(top, "nbs", "store", "small-cpu")
            ).settled()
        )
        in page
    )
    assert (
        bench.markdown(
            bench.Bench.load(
                os.path.join(top, "nbs", "store", "bench", "smollm2-135m-sst2.json")
            ).targets
        )
        in page
    )
