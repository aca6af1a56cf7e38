"""Tokens that one process keeps in the cache folder for the next one."""

import json
import signal
from dataclasses import replace

import children
import pytest
import torch
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import ByT5Tokenizer

from steer_nb import TrainConfig, fit, load_records, steer
from steer_nb.data import tokens
from steer_nb.data.encoding import encode
from steer_nb.data.tokens import tokens_key
from steer_nb.testing.toy_task import toy_model, toy_task, toy_tokenizer
from steer_nb.training import method
from steer_nb.training.method import encode_split

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    "An empty cache folder, in which small splits are kept too."
    monkeypatch.setattr(tokens, "LARGE", 1)
    monkeypatch.setenv("STEER_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def rows(tmp_path):
    "A file of examples."
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"max of {n % 7} {n} =", "completion": f" {n % 7}"} for n in range(60)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def encode_and_report(rows, **large) -> None:
    "In a child: encode a split, and print how many examples were tokenised, and the tokens."
    tokens.LARGE, made = large.get("large", 1), []
    one = method.encode
    method.encode = lambda *args, **options: made.append(1) or one(*args, **options)
    split = encode_split(toy_model(), toy_tokenizer(), load_records(rows), "train")
    print(json.dumps([len(made), split.digest, [vars(one) for one in split]]))


def test_a_second_process_does_not_tokenise(rows, cache):
    first, second = (children.run(encode_and_report, rows) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    made, *expected = json.loads(first.stdout)
    assert made == len(expected[1]) > 40 and json.loads(second.stdout) == [0, *expected]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])  # damaged: made again
    for count in (made, 0):
        assert json.loads(children.run(encode_and_report, rows).stdout) == [count, *expected]
    rows.write_text(rows.read_text().replace('" 3"', '" 4"'))
    changed = json.loads(children.run(encode_and_report, rows).stdout)
    assert changed[0] > 0 and changed[1] != expected[0]


def test_processes_at_the_same_time(rows, cache):
    running = [children.start(encode_and_report, rows) for _ in range(4)]
    found = [json.loads(child.wait().stdout) for child in running]
    assert all(one[1:] == found[0][1:] for one in found) and len(list(cache.iterdir())) == 1
    assert json.loads(children.run(encode_and_report, rows).stdout) == [0, *found[0][1:]]


def other_vocabulary(tokenizer):
    tokenizer.add_tokens(["max of"])


def other_template(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(" {%", ", {%")


def other_end(tokenizer):
    tokenizer.eos_token = "<unk>"


@pytest.mark.parametrize("change", [other_vocabulary, other_template, other_end])
def test_another_tokenizer_is_noticed(change, cache):
    "After the files of the first one are there."
    model, task = toy_model(), replace(toy_task(metric="generate"), chat=True)

    def encoded(change) -> list:
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = TEMPLATE
        change(tokenizer)
        found = encode_split(model, tokenizer, task, "train")
        expected = [encode(tokenizer, one, chat=True, end_token=True) for one in task.train]
        assert list(found) == expected
        return expected

    assert encoded(lambda tokenizer: None) != encoded(change)
    assert len(list(cache.iterdir())) == 2


def test_other_options_and_examples_are_noticed(cache):
    model, task = toy_model(), toy_task()
    fewer = replace(task, train=task.train[1:])
    for one, options in ((task, [True]), (task, [None]), (fewer, [True])):
        found = encode_split(model, toy_tokenizer(), one, "train", *options)
        assert list(found) == [
            encode(toy_tokenizer(), example, end_token=options[0]) for example in one.train
        ]
    assert len(list(cache.iterdir())) == 3


class AtSpaces:
    "A part of a tokenizer, in Python."

    def pre_tokenize(self, text):
        text.split(lambda _, part: part.split(" ", "removed"))


def test_nothing_is_kept_where_the_tokens_may_change(cache, tmp_path, monkeypatch):
    "A list of examples, a slow tokenizer, a class or a part of one's own, today's date."
    model, task = toy_model(), toy_task()
    encode_split(model, toy_tokenizer(), replace(task, train=list(task.train)), "train")
    assert not cache.exists()
    dated, own = toy_tokenizer(), toy_tokenizer()
    dated.chat_template = "{{ strftime_now('%d') }}" + TEMPLATE
    own.__class__ = type("Own", (type(own),), {})
    python = toy_tokenizer()
    python.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(AtSpaces())
    assert len(encode_split(model, python, task, "train")) == len(task.train)
    assert not cache.exists()
    assert tokens_key(toy_tokenizer(), []) is not None
    assert all(tokens_key(one, []) is None for one in (ByT5Tokenizer(), dated, own))
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEER_NB_CACHE", str(tmp_path / "file"))  # cannot be written to
    assert len(encode_split(model, toy_tokenizer(), task, "train")) == len(task.train)


def train(rows, folder, stop: int | None) -> None:
    "In a child: a training that a signal ends after a step."
    tokens.LARGE = 1
    torch.manual_seed(0)
    model = toy_model()
    steer(model, rank=2)

    def on_step(point: dict) -> None:
        if point["step"] == stop:
            signal.raise_signal(signal.SIGTERM)

    config = TrainConfig(batch_size=4)
    run = fit(model, toy_tokenizer(), load_records(rows), config, folder, on_step=on_step)
    print(json.dumps([run.resumed, [point["loss"] for point in run.curve]]))


def test_a_checkpoint_resumes_with_tokens_from_a_file(rows, cache, tmp_path):
    "The losses are those of a training that tokenised, bit for bit."
    runs = ("whole", None), ("parts", 5), ("parts", None)
    done = [children.run(train, rows, tmp_path / folder, stop) for folder, stop in runs]
    assert [one.returncode for one in done] == [0, 0, 0], done[-1].stderr
    whole, stopped, resumed = (json.loads(one.stdout) for one in done)
    assert len(stopped[1]) == 5 and resumed == [[5], whole[1]]
    assert len(list(cache.iterdir())) == 2  # of the training and the validation examples
