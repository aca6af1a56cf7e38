"""Data that need not fit into memory: the same training as from a list, in bounded memory."""

import gc
import json
import pickle
import random
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import children
import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from steer_nb.core.steering import steer
from steer_nb.data import encoding
from steer_nb.data.encoding import encode, encode_examples
from steer_nb.data.examples import TaskError
from steer_nb.data.records import Task, load_records
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.testing.toy_task import word_tokenizer
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit
from steer_nb.training.run import Run, resident_memory

LETTERS = "abcdefgh"
SPLITS = ("train", "validation", "test")
CONFIG = TrainConfig(lr=1e-2, batch_size=8, validation_share=None)
CHANCE = random.Random(0)
WORDS = [" ".join(CHANCE.choices(LETTERS, k=CHANCE.randint(6, 12))) for _ in range(80)]
PAIRS = [{"prompt": words, "completion": f" {words[0]}"} for words in WORDS]
BOOKS = [{"text": words} for words in WORDS]
TALKS = [
    {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": words[0]}]}
    for words in WORDS
]
ROWS = {"prompt": PAIRS, "text": BOOKS, "messages": TALKS}
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} ; {% endfor %}"


@pytest.fixture(autouse=True)
def few_tokens_are_kept(monkeypatch):
    "So that the examples of small files are encoded again and again too."
    monkeypatch.setattr(encoding, "KEPT", 20)


def new_tokenizer():
    "Another one each time: encoded examples are cached by tokenizer."
    tokenizer = word_tokenizer([*LETTERS, "user", "assistant", ";"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def stored(rows: list[dict], kind: str, folder: Path):
    "The rows as a source of another kind."
    frame, path = pd.DataFrame(rows), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        return datasets.Dataset.from_list(rows).save_to_disk(path) or datasets.load_from_disk(path)
    return path


def trained(source, **options) -> tuple[Task, Run, dict]:
    "The task, the record and the trained parameters."
    tokenizer = new_tokenizer()
    task = load_records(source, tokenizer=tokenizer, max_length=32, name="rows")
    model = tiny_model("llama")
    steer(model, rank=2)
    run = fit(model, tokenizer, task, CONFIG, **options)
    return task, run, {name: one for name, one in model.named_parameters() if one.requires_grad}


def assert_same(one: tuple, other: tuple) -> None:
    for split in SPLITS:
        assert list(getattr(one[0], split)) == list(getattr(other[0], split))
    assert one[0].fingerprint == other[0].fingerprint and one[0].report == other[0].report
    assert one[1].curve == other[1].curve and one[1].validation == other[1].validation
    assert one[2].keys() == other[2].keys() and one[2]
    assert all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())


@pytest.mark.parametrize(
    "form, kind",
    [
        *[("prompt", kind) for kind in ("jsonl", "csv", "parquet", "arrow")],
        ("text", "jsonl"),
        ("messages", "parquet"),
    ],
)
def test_a_file_is_trained_as_its_rows_are(form, kind, tmp_path):
    assert_same(trained(ROWS[form]), trained(stored(ROWS[form], kind, tmp_path)))


def test_what_is_kept_in_memory_changes_no_number(monkeypatch):
    again = trained(PAIRS)
    monkeypatch.setattr(encoding, "KEPT", 10**6)
    assert_same(again, trained(PAIRS))


def test_a_training_on_a_list_is_resumed_on_the_file(tmp_path):
    def interrupt(point):
        if point["step"] == 5:
            raise KeyboardInterrupt

    path = stored(PAIRS, "jsonl", tmp_path)
    call = {"output": tmp_path / "run", "checkpoint_every": 0}
    with pytest.raises(KeyboardInterrupt):
        trained(PAIRS, on_step=interrupt, **call)
    resumed = trained(path, **call)
    assert resumed[1].resumed == [4]
    assert_same(trained(PAIRS), resumed)
    with pytest.raises(KeyboardInterrupt):
        trained(PAIRS, on_step=interrupt, output=tmp_path / "other", checkpoint_every=0)
    longer = stored([*PAIRS, {"prompt": "h h a", "completion": " b"}], "jsonl", tmp_path)
    with pytest.raises(Exception, match="examples"):
        trained(longer, output=tmp_path / "other", checkpoint_every=0)


def test_pieces_copies_and_bad_rows_of_a_file(tmp_path):
    "The same from a file as from a list; a long text is whole in its pieces."
    tokenizer = new_tokenizer()
    long = [{"text": f"{' '.join(CHANCE.choices(LETTERS, k=100))}"} for _ in range(20)]
    rows = [*BOOKS, *BOOKS[:7], {"text": ""}, {"text": None}, *long]
    tasks = []
    for source in (rows, stored(rows, "jsonl", tmp_path)):
        with pytest.warns(UserWarning) as caught:
            tasks.append(load_records(source, tokenizer=tokenizer, max_length=32, name="rows"))
        messages = [str(one.message) for one in caught]
        assert len(messages) == 3
        assert any("copy of another row (first: train row" in message for message in messages)
        assert "1 row left out: text is missing (first: train row 89)" in messages
    assert tasks[0].report == tasks[1].report and tasks[0].fingerprint == tasks[1].fingerprint
    pieces = [one.completion for split in SPLITS for one in getattr(tasks[1], split)]
    joined = "".join(piece.replace(" ", "") for piece in pieces)
    assert all(row["text"].replace(" ", "") in joined for row in long)


def test_a_streamed_task_in_another_process_or_a_slice(tmp_path):
    task = load_records(stored(PAIRS, "jsonl", tmp_path))
    first = task.train[0]
    assert list(pickle.loads(pickle.dumps(task.train))) == list(task.train)
    assert list(task.train[3:9:2]) == list(task.train)[3:9:2] and task.train[-1] in task.train
    with pytest.raises(IndexError):
        task.train[len(task.train)]
    assert list(task.train.ids) == [one.id for one in task.train]
    with pytest.raises(TaskError, match="an id twice"):
        Task("twice", "exact", task.train, task.train[:3], (first,), "records", "a copy")


@pytest.mark.parametrize("change", ["another answer", "no JSON", "shorter"])
def test_a_file_that_changes_is_an_error(change, tmp_path):
    path = stored(PAIRS, "jsonl", tmp_path)
    task = load_records(path)
    text = path.read_text()
    if change == "another answer":
        text = text.replace('"completion": " ', '"completion": "  ')
    path.write_text({"no JSON": "x" * len(text), "shorter": ""}.get(change, text))
    with pytest.raises(TaskError, match="has changed since load_records read it"):
        fit(tiny_model("llama"), new_tokenizer(), task, TrainConfig(max_steps=1))


def test_the_encoded_examples_of_a_split():
    task, tokenizer = load_records(PAIRS), new_tokenizer()
    split = encode_examples(partial(encode, tokenizer, end_token=True), task.train)
    assert 0 < len(split.kept) < len(split)
    one_by_one = [encode(tokenizer, one, end_token=True) for one in task.train]
    assert list(split) == one_by_one and list(split.take([5, 50])) == [
        one_by_one[n] for n in (5, 50)
    ]
    assert split.lengths.tolist() == [len(one.input_ids) for one in one_by_one]


def test_cached_examples_keep_no_tokenizer():
    tokenizer = new_tokenizer()
    fit(tiny_model("llama"), tokenizer, load_records(PAIRS), TrainConfig(max_steps=1))
    known = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert known() is None


# Memory

LONG = ["".join(random.Random(word).choices(LETTERS, k=400)) for word in LETTERS]


def write_rows(path: Path, megabytes: int) -> int:
    "A file of rows of 8 kB, all different; returns their number."
    chance, count = random.Random(0), megabytes * 125
    rows = (
        {"prompt": f"{n} {' '.join(chance.choices(LONG, k=19))}", "completion": " a b"}
        for n in range(count)
    )
    if path.suffix == ".jsonl":
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        pd.DataFrame(rows).to_parquet(path, row_group_size=100)
    return count


def train_in_little_memory(small: Path, large: Path) -> None:
    "Print by how many MiB the memory grows that this process alone has, at most."
    datasets.config.HF_DATASETS_CACHE = large.parent
    encoding.KEPT, tokenizer = 1000, word_tokenizer([*LETTERS, *LONG])
    model, peak, ended = tiny_model("llama"), [0.0], threading.Event()
    steer(model, rank=2)

    def watch():
        while not ended.is_set():
            peak[0] = max(peak[0], resident_memory("RssAnon"))
            time.sleep(0.002)

    def train(path) -> Run:
        return fit(model, tokenizer, load_records(path), TrainConfig(max_steps=3))

    train(small)
    before = resident_memory("RssAnon")
    thread = threading.Thread(target=watch)
    thread.start()
    run = train(large)
    ended.set()
    thread.join()
    print(run.examples["train"], peak[0] - before)


@pytest.mark.parametrize(
    "kind, megabytes",
    [
        ("jsonl", 24),
        ("parquet", 24),
        pytest.param("jsonl", 1024, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(resident_memory("RssAnon") is None, reason="measured on Linux")
def test_memory_does_not_grow_with_the_file(kind, megabytes, tmp_path):
    "A row of 8 kB takes at most 150 bytes; 16 MiB are left for the rows that are read at once."
    files = [tmp_path / f"{name}.{kind}" for name in ("small", "large")]
    write_rows(files[0], 2)
    count = write_rows(files[1], megabytes)
    if kind == "parquet":  # `datasets` converts it once, and Arrow reads ahead while it does
        children.run(train_in_little_memory, *files, timeout=1200)
    done = children.run(train_in_little_memory, *files, timeout=1200)
    assert done.returncode == 0, done.stderr
    trained, growth = map(float, done.stdout.split())
    assert abs(trained - 0.8 * count) < 4 * np.sqrt(0.16 * count)
    assert growth < 16 + 150 * count / 2**20
