"""The user's own data: chat templates of other models, each form trained, and the program."""

import copy
import json
import re
import warnings
from importlib.resources import files

import datasets
import pandas as pd
import pytest
import torch
from program import check, json_of, run
from transformers import PreTrainedTokenizerBase

from steer_nb.core.loading import load_steering
from steer_nb.core.steering import steer
from steer_nb.data.chat import apply_template, encode_conversation
from steer_nb.data.encoding import encode_prompt
from steer_nb.data.examples import TaskError
from steer_nb.data.models import load_model
from steer_nb.data.records import load_records
from steer_nb.evaluation.generation import generate_answers
from steer_nb.evaluation.result import evaluate
from steer_nb.experiments.grid import run_grid
from steer_nb.experiments.jobs import Arm, Experiment
from steer_nb.experiments.store import ExperimentError, Store
from steer_nb.experiments.testbed import load_testbed
from steer_nb.methods.registry import apply_method
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.testing.toy_task import word_tokenizer
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit

TALK = [
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris, of course."},
    {"role": "user", "content": "Of Spain?"},
    {"role": "assistant", "content": " Madrid\nis it. "},
]
MISTRAL = (  # the format of Mistral-7B-Instruct: a turn of the user between [INST] and [/INST]
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def smollm_tokenizer() -> PreTrainedTokenizerBase:
    return load_model("smollm2-135m")[1]


def with_template(tokenizer, template: str, eos: str | None = None):
    "A copy that uses the template, whose markers are special tokens as in the model's own."
    own = copy.deepcopy(tokenizer)
    markers = sorted(set(re.findall(r"<[|｜]?[\w▁/]+[|｜]?>|\[/?[A-Z_]+\]", template)))
    own.add_tokens(markers, special_tokens=True)
    if eos:
        own.eos_token = eos
    own.chat_template = template
    return own


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "llama3",
        "gemma",
        "gemma3",
        "qwen2_5",
        "qwen3_instruct_2507",
        "phi3",
        "phi3_5",
        "cohere",
        "lfm2",
    ],
)
def test_the_assistants_tokens_are_those_that_a_marked_template_gives(name, smollm_tokenizer):
    """The templates of the models' authors, against TRL's copies with marks: an independent mask.

    A marked template of Phi also trains the end of the sequence after the end of the turn."""
    found = encode_conversation(with_template(smollm_tokenizer, trl_template(name)), TALK)
    marked = with_template(smollm_tokenizer, trl_template(name))
    marked.chat_template = trl_template(f"{name}_training")
    ids, trained = encode_conversation(marked, TALK)
    length = len(found[0])
    assert found == (ids[:length], trained[:length])
    rest = marked.decode([token for token in ids[length:] if token != marked.eos_token_id])
    assert name.startswith("phi") or not rest
    assert not rest.strip()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5", "qwen3", "phi3"])
def test_training_reads_before_the_answer_what_generation_reads(name, smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, trl_template(name))
    ids, trained = encode_conversation(tokenizer, TALK, read_only=3)
    read = apply_template(tokenizer, TALK[:-1], reply=True)
    begin = trained.index(True)
    assert ids[:begin] == tokenizer(read, add_special_tokens=False).input_ids


def test_mistral_by_hand(smollm_tokenizer):
    tokenizer = with_template(smollm_tokenizer, MISTRAL, "</s>")
    ids, trained = encode_conversation(tokenizer, TALK[:2])
    parts = ["<|im_start|>[INST] The capital of France? [/INST]", " Paris, of course.</s>"]
    expected = [tokenizer(part, add_special_tokens=False).input_ids for part in parts]
    assert ids == expected[0] + expected[1]
    answers = [token for token, own in zip(ids, trained, strict=True) if own]
    assert tokenizer.decode(answers).strip() == "Paris, of course.</s>"


# A training for each form

WORDS = word_tokenizer([*"abcdefgh", "?", "user", ":", ";"])
TALKING = word_tokenizer([*"abcdefgh", "?", "user:", "assistant:", ";"])
TALKING.add_tokens([";"], special_tokens=True)
TALKING.chat_template = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} ; {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LETTERS = "abcdefgh"
PAIRS = [(f"{x} {y}", y) for x in LETTERS for y in LETTERS]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": y}]}
    for x, y in PAIRS
]
OPENAI = [
    {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y}]}
    for x, y in PAIRS
]
FORMS = {
    "prompt": [{"prompt": x, "completion": f" {y}"} for x, y in PAIRS],
    "instruction": [{"instruction": x, "input": "?", "output": y} for x, y in PAIRS],
    "question": [{"question": x, "answer": y} for x, y in PAIRS],
    "messages": OPENAI,
    "sharegpt": SHAREGPT,
    "text": [{"text": f"{x} {y}"} for x, y in PAIRS],
    "choice": [
        {"prompt": x, "choices": ["a", "b", y], "label": 2} for x, y in PAIRS[2:] if y > "b"
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_trained_and_evaluated(form):
    task = load_records(FORMS[form])
    model = tiny_model("llama")
    for tokenizer in (WORDS, TALKING) if form in ("instruction", "question") else (TALKING,):
        run = fit(model, tokenizer, task, TrainConfig(lr=3e-3, epochs=12))
        assert run.best_loss < 0.75 * run.validation[0]["loss"]
        result = evaluate(model, tokenizer, task)
        assert 0 <= result.interval[0] <= result.score <= result.interval[1]
        assert result.n == len(task.test)


def test_the_forms_of_conversations_are_the_same():
    assert load_records(OPENAI).fingerprint == load_records(SHAREGPT).fingerprint


def test_a_trained_answer_stops():
    "Without the end token in training the answer goes on; with it, it ends by itself."
    task = load_records(FORMS["prompt"])
    lengths = {}
    for end in (True, False):
        model = tiny_model("llama")
        fit(model, TALKING, task, TrainConfig(lr=3e-3, epochs=60, end_token=end))
        answers = generate_answers(model, TALKING, task.train, max_new_tokens=8)
        lengths[end] = [len(answer.split()) for answer in answers]
    assert lengths[True].count(1) > 0.8 * len(task.train)
    assert set(lengths[False]) == {8}


def test_every_source_gives_the_same_task(tmp_path):
    rows = [{"prompt": x, "completion": f" {y}"} for x, y in PAIRS]
    frame, dataset = pd.DataFrame(rows), datasets.Dataset.from_list(rows)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    frame.to_csv(tmp_path / "data.csv", index=False)
    frame.to_csv(tmp_path / "data.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    folder = tmp_path / "folder"
    folder.mkdir()
    lines.rename(folder / "train.jsonl")
    sources = [rows, iter(rows), frame, dataset, datasets.DatasetDict(train=dataset), folder]
    sources += sorted(tmp_path.glob("data.*")) + [str(tmp_path / "data.csv")]
    assert len(sources) == 11
    assert len({load_records(source).fingerprint for source in sources}) == 1


def test_numbers_and_text_in_one_column(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"question": "a", "answer": 4}\n{"question": "b", "answer": "four"}\n')
    task = load_records(path)
    examples = [*task.train, *task.validation, *task.test]
    assert sorted(one.answer for one in examples) == ["4", "four"]


def test_a_table_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "TABLE.CSV"
    rows = "".join(f"p{n},0{n}\n" for n in range(20))
    path.write_text(f'prompt,completion\n{rows}p20,\n"a, b","1\n2"\nc,NA\n')
    with pytest.warns(UserWarning, match="completion is missing"):
        task = load_records(path)
    answers = {one.prompt: one.completion for one in (*task.train, *task.validation, *task.test)}
    assert answers == {**{f"p{n}": f"0{n}" for n in range(20)}, "a, b": "1\n2", "c": "NA"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"prompt,completion\na, b,c\nd, e,f\n", "rows have more cells than the header"),
        (b"prompt,completion\na,b\nd, e,f\n", "Expected 2 fields in line 3, saw 3"),
        ("prompt,completion\nä,ö\n".encode("latin-1"), "can't decode byte"),
        (None, "there is no file"),
    ],
)
def test_tables_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(TaskError, match=message):
        load_records(tmp_path / "table.csv")


def test_a_relative_path_and_a_byte_order_mark(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{n}", "completion": str(n)} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(" \n" + json.dumps(rows), encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)
    first, second = load_records("a.jsonl"), load_records("b.json")
    monkeypatch.chdir("/")
    assert first.fingerprint == second.fingerprint


def test_a_text_that_no_cut_makes_short_enough(smollm_tokenizer):
    rows = [{"text": f"{n} two three"} for n in range(3)]
    limits = dict(tokenizer=smollm_tokenizer, max_length=1)
    with pytest.raises(TaskError, match="more than 1 token"):
        load_records(rows, **limits)


def test_a_method_on_own_data():
    method = apply_method(tiny_model("llama"), "lora", rank=2)
    run = fit(method, TALKING, load_records(FORMS["messages"]), TrainConfig(lr=1e-2, epochs=4))
    assert run.best_loss < run.validation[0]["loss"]


def test_positions_of_a_conversation():
    "A steering on completions acts from the first answer on, in training as in a forward pass."
    model = tiny_model("llama")
    steering = steer(model, kind="vector", positions="completion", layers=[0])
    for adapter in steering.adapters.values():
        torch.nn.init.ones_(adapter.vector)
    (example,) = load_records({"test": OPENAI[:1]}).test
    ids, trained = encode_conversation(TALKING, example.messages)
    prompt = encode_prompt(TALKING, example, chat=True)
    labels = [token if own else -100 for token, own in zip(ids, trained, strict=True)]
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
    with torch.no_grad():
        steered = model(**inputs).logits
        with steering.disabled():
            plain = model(**inputs).logits
    same = (steered == plain).all(dim=-1)[0].tolist()
    assert same == [n < len(prompt) for n in range(len(ids))]


# The program


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    "A file of sums in the symbols of the tiny model."
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"request": f"[MAX {a} {b} ] =", "reply": max(a, b)} for a in range(10) for b in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_train_and_evaluate_own_data(tiny, sums, tmp_path):
    own = "--model", tiny, "--data", sums, "--columns", "prompt=request,completion=reply"
    out = check("train", *own, "--epochs", 1, "--output", tmp_path / "run")
    assert "examples" in out and "saved in" in out
    record = json_of(tmp_path / "run" / "run.json")
    task = load_records(sums, columns={"prompt": "request", "completion": "reply"})
    assert record["fingerprint"] == task.fingerprint and record["task"] == "sums"
    steering = "--steering", tmp_path / "run"  # the folder inside is found
    result = tmp_path / "results" / "result.json"
    out = check("evaluate", *own, *steering, "--output", result)
    assert f"n = {len(task.test)}" in out and json_of(result)["fingerprint"] == task.fingerprint
    out = check("evaluate", *own, *steering, "--split", "all")
    assert "n = 100" in out and "'all'" in out
    load_steering(load_testbed("tiny-llama")[0], tmp_path / "run", check_base=False)
    out = check("evaluate", *own, "--metric", "perplexity")
    assert "perplexity" in out
    code, _, err = run("train", *own, "--output", tmp_path / "run")
    assert code == 1 and "pass --overwrite" in err
    check("train", *own, "--epochs", 1, "--output", tmp_path / "run", "--overwrite")


def test_a_method_on_own_data_in_the_program(tiny, sums, tmp_path):
    own = "--model", tiny, "--data", sums, "--columns", "prompt=request,completion=reply"
    check("train", *own, "--method", "lora", "--output", tmp_path / "run")
    lora = "--model", tiny, "--steering", tmp_path / "run"
    assert "n = " in check("evaluate", *own, *lora[2:])
    code, _, err = run("generate", "[MAX 1 2 ] =", *lora, "--strength", 2)
    assert code == 1 and "--strength needs a steering" in err


def test_distill_on_own_data(tiny, sums, tmp_path):
    columns = "prompt=request,completion=reply"
    words = "--data", sums, "--columns", columns, "--output", tmp_path / "out", "--n", 60
    out = check("distill", tiny, tiny, *words)
    assert "accuracy" in out and "saved in" in out


def test_a_grid_on_own_data(sums, tmp_path):
    columns = {"prompt": "request", "completion": "reply"}
    experiment = Experiment(
        "own",
        models=("tiny-llama",),
        tasks={"sums": {"records": str(sums), "columns": columns}},
        arms={"lora": Arm("lora", (1e-2,), {"rank": 2})},
        seeds=(0, 1),
        training={"max_steps": 2},
    )
    run_grid(experiment, tmp_path)
    records = Store(tmp_path).records()
    tests = [one for one in records if one["kind"] == "test" and one["status"] == "done"]
    fingerprint = load_records(sums, columns=columns).fingerprint
    assert {one["task"] for one in tests} == {fingerprint}  # the same split with both seeds


def test_a_grid_needs_a_metric_by_name(sums, tmp_path):
    task = {"records": str(sums), "columns": {"prompt": "request", "completion": "reply"}}
    arms = {"lora": Arm("lora", (1e-2,), {"rank": 2})}
    own = {"sums": {**task, "metric": lambda prediction, reference: 1.0}}
    experiment = Experiment(
        "own", models=("tiny-llama",), tasks=own, arms=arms, seeds=(0,), training={"max_steps": 2}
    )
    with pytest.raises(ExperimentError, match="stored as JSON .* a metric by its name"):
        run_grid(experiment, tmp_path)


def test_an_error_in_training_names_the_row(tmp_path):
    rows = [{"prompt": f"say {n}", "completion": "yes"} for n in range(20)]
    rows[11]["completion"] = "yes " * 4000
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_records({"train": tmp_path / "own.jsonl"})  # without a tokenizer: not measured
    model = tiny_model("llama")
    steer(model)
    tokenizer = word_tokenizer(["say", "yes", *map(str, range(20))])
    with pytest.raises(TaskError, match=r"\(row 12 of the data\) has \d+ tokens"):
        fit(model, tokenizer, task)


def test_chat_and_standard_input(sums, tmp_path, smollm_tokenizer):
    from typer.testing import CliRunner

    from steer_nb.cli.cli import app

    said = CliRunner().invoke(
        app, ["chat", "--tokens", "4", "--system", "Be brief."], input="Hello.\nAgain.\n\n"
    )
    assert said.exit_code == 0, said.stderr
    assert len(said.stdout.strip().splitlines()) >= 2
    words = ["generate", "-", "--tokens", "2"]
    piped = CliRunner().invoke(app, words, input="One, two, three,\n").stdout
    assert piped == check("generate", "One, two, three,", "--tokens", 2)


@pytest.mark.parametrize(
    "words, message",
    [
        ("train --output new --data DATA --task sst2", "use one of them"),
        ("train --output new --data DATA", "no known form has the columns request, reply"),
        ("train --output new --data DATA --columns prompt", "role=name"),
        (
            "train --output new --data DATA --columns reply=completion",
            "write 'completion': 'reply'",
        ),
        ("evaluate --metric exact", "needs --data"),
        ("evaluate --data nowhere.jsonl", "there is no file 'nowhere.jsonl'"),
        ("evaluate --output DATA/x.json", "cannot write to"),
        ("generate", "the prompt is empty"),
    ],
)
def test_errors_name_what_is_wrong(words, message, tiny, sums, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.replace("DATA", str(sums)).split()
    code, _, err = run(*words, *([""] if words == ["generate"] else []), "--model", tiny)
    assert code == 1 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_testbed_reads_the_sums(sums):
    "The tokens of the file are known to the tiny model, so what is above trains something."
    _, tokenizer = load_testbed("tiny-llama")
    task = load_records(sums, columns={"prompt": "request", "completion": "reply"})
    tokens = tokenizer(task.train[0].prompt).input_ids
    assert tokenizer.unk_token_id not in tokens


def test_a_metric_that_returns_no_number():
    model, tokenizer = load_testbed("tiny-llama")
    rows = [{"prompt": "[MAX 1 2 ] =", "completion": "2"}]
    task = load_records({"test": rows}, metric=lambda prediction, reference: "yes")
    with pytest.raises(TaskError, match="returned 'yes', not a number"):
        evaluate(model, tokenizer, task)


def test_an_answer_that_is_not_trained_is_named():
    rows = [{"text": f"review {n}", "label": n % 2} for n in range(20)]
    with pytest.warns(UserWarning, match="the column label is not used"):
        load_records(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_records(rows, columns={"prompt": "text"}, choices=["bad", "good"])
