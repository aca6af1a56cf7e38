"""lm-evaluation-harness on steered models: the same answers as `evaluate`, from Python and from the
program, for every kind of position and of request."""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions

import datasets
import fake_hub
import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from repository import ROOT
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer_nb import (
    Example,
    SteerError,
    Task,
    evaluate,
    load_model,
    load_steering,
    steer,
    steerings,
    tiny_model,
    to_lm_eval_task,
)
from steer_nb.evaluation.choices import choice_scores
from steer_nb.evaluation.generation import generate_answers
from steer_nb.integrations.lm_eval import SteeredHFLM
from steer_nb.testing.toy_task import word_tokenizer

WORDS = [f"w{number}" for number in range(97)]  # with three special tokens, the tiny vocabulary
TEMPLATE = (
    "{% for message in messages %}w90 {{ message.content }} w91 {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)
POSITIONS = ("all", "last", "prompt", "completion", "suffix:2", "prefix:1+suffix:1")
NATS = 1e-4  # float32, log-likelihoods up to 50 nats, in batches of other shapes


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    "The copies that `datasets` makes go to a temporary folder."
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def words(count: int, seed: int) -> str:
    drawn = torch.randint(90, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[number] for number in drawn)


def choice_task(chat: bool = False) -> Task:
    "Prompts of 3 to 14 words; two to four choices of one to three words, the last one longer."
    examples = []
    for n in range(30):
        length = 1 + n % 3
        choices = [f" {words(length, 100 * n + k)}" for k in range(1 + n % 3)]
        choices = (*choices, f" {words(length + n % 2, 100 * n + 50)}")
        answer = n % 2
        prompt = words(3 + n % 12, n)
        examples.append(Example(prompt, choices[answer], choices, answer, id=f"e{n}"))
    return Task(
        "words", "choice", (), (), tuple(examples), source="generated", note="words", chat=chat
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A folder with `choice_task` as a task of lm_eval."
    folder = tmp_path_factory.mktemp("tasks")
    to_lm_eval_task(choice_task(), folder)
    return folder


def randomize(steering, size: float = 0.5):
    "The steering with large random parameters."
    generator = torch.Generator().manual_seed(0)
    for parameter in steering.parameters():
        parameter.data.normal_(std=size, generator=generator)
    return steering


def steered_model(positions: str = "all"):
    model = tiny_model("llama", max_position_embeddings=256)
    randomize(steer(model, rank=2, positions=positions))
    return model


def harness(model, folder, *tasks, **options):
    "The result of lm_eval on tasks in a folder."
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(list(tasks))
    return lm_eval.evaluate(model, loaded, bootstrap_iters=0, **options)


def answered(samples: list[dict]) -> list[list[float]]:
    "The log-likelihoods of the choices of each example, in the order of the examples."
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[float(score) for score, _ in sample["filtered_resps"]] for sample in ordered]


def assert_same(samples, accuracy, result, tolerance=NATS):
    "lm_eval has the predictions, scores and accuracy of a result of `evaluate`."
    scores = answered(samples)
    predictions = [own.index(max(own)) for own in scores]
    assert predictions == [record["prediction"] for record in result.predictions]
    for own, record in zip(scores, result.predictions, strict=True):
        assert own == pytest.approx(record["scores"], abs=tolerance)
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    assert [sample["acc"] for sample in ordered] == [one["score"] for one in result.predictions]
    assert accuracy == pytest.approx(result.accuracy)


def assert_equal(model, folder, result, tolerance=NATS, name="steer_nb_words", **options):
    found = harness(model, folder, name, **options)
    assert_same(found["samples"][name], found["results"][name]["acc,none"], result, tolerance)


# Choices


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_model_in_memory_has_the_predictions_of_evaluate(positions, written):
    task, tokenizer, model = choice_task(), word_tokenizer(WORDS), steered_model(positions)
    result = evaluate(model, tokenizer, task)
    (steering,) = steerings(model).values()
    with steering.disabled():
        plain = evaluate(model, tokenizer, task)
    assert result.frame().prediction.ne(plain.frame().prediction).sum() > 5
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4)
    assert_equal(steered, written, result)


def test_two_steerings_of_different_positions(written):
    task, tokenizer, model = choice_task(), word_tokenizer(WORDS), steered_model()
    randomize(steer(model, kind="vector", positions="last", name="second"))
    result = evaluate(model, tokenizer, task)
    assert_equal(SteeredHFLM(model, tokenizer=tokenizer), written, result)


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_the_batch_size_changes_nothing(batch_size, written):
    task, tokenizer, model = choice_task(), word_tokenizer(WORDS), steered_model("suffix:2")
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=8)
    detected, steered._detect_batch_size = [], lambda requests: detected.append(requests) or 8
    assert_equal(steered, written, evaluate(model, tokenizer, task))
    assert len(detected) == (batch_size == "auto")  # once, although contexts differ in length


@pytest.fixture
def saved(tmp_path):
    "The folders of a model with its tokenizer, and of a steering."
    model = steered_model("suffix:2")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    (steering,) = steerings(model).values()
    steering.save(tmp_path / "steering")
    steering.remove()
    model.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("dtype, tolerance", [("float32", NATS), ("bfloat16", 0.02)])
def test_saved_folders_by_name(dtype, tolerance, saved, written):
    "In bfloat16 a log-softmax in that precision would be off by up to 0.1 nats."
    task = choice_task()
    model, tokenizer = load_model(saved / "model", dtype)
    load_steering(model, saved / "steering").strength = 0.5
    options = {"pretrained": str(saved / "model"), "steering": str(saved / "steering")}
    steered = get_model("hf_steered").create_from_arg_obj(
        {**options, "strength": 0.5, "dtype": dtype}, {"batch_size": 16}
    )
    assert steered.model.dtype is getattr(torch, dtype)
    assert steered.get_model_info()["steerings"] == {"default": repr(steerings(model)["default"])}
    assert_equal(steered, written, evaluate(model, tokenizer, task), tolerance)


def test_the_program_with_a_steering_of_the_hub(saved):
    task, output = choice_task(), saved / "output"
    to_lm_eval_task(task, saved)
    model, tokenizer = load_model(saved / "model")
    load_steering(model, saved / "steering")
    result = evaluate(model, tokenizer, task)
    with fake_hub.running_hub() as hub:
        files = {path.name: path.read_bytes() for path in (saved / "steering").iterdir()}
        hub.add("me/words", files)
        hub.add("me/words", {"steering.safetensors": b""})
        environment = {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(saved / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        hub.branches["me/words", "7"] = 1  # the command line makes a number of it
        arguments = f"pretrained={saved / 'model'},steering=me/words,steering_revision=7"
        command = [sys.executable, "-m", "steer_nb", "lm-eval", "run", "--model", "hf_steered"]
        command += ["--model_args", arguments, "--include_path", saved, "--device", "cpu"]
        command += ["--tasks", "steer_nb_words", "--output_path", output, "--log_samples"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    found = json.loads(results.read_text())
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert_same(lines, found["results"]["steer_nb_words"]["acc,none"], result)
    assert "positions suffix:2" in found["config"]["steerings"]["default"]


def test_the_chat_template(tmp_path):
    task, tokenizer, model = choice_task(chat=True), word_tokenizer(WORDS), steered_model("last")
    tokenizer.chat_template = TEMPLATE
    to_lm_eval_task(task, tmp_path)
    result = evaluate(model, tokenizer, task)
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4)
    assert_equal(steered, tmp_path, result, apply_chat_template=True)
    with pytest.raises(SteerError, match="--apply_chat_template"):
        harness(steered, tmp_path, "steer_nb_words")
    tokenizer.chat_template = None
    plain = evaluate(model, tokenizer, task)
    assert plain.predictions != result.predictions
    assert_equal(steered, tmp_path, plain)


def marking_tokenizer() -> PreTrainedTokenizerFast:
    "Like that of Llama 2: a mark for a space, and another mark before every text. By characters."
    letters = ["<pad>", "<s>", "</s>", "<unk>", "▁", *"w0123456789"]
    backend = Tokenizer(models.WordLevel({one: n for n, one in enumerate(letters)}, "<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_prompt_and_choice_are_encoded_apart_as_in_evaluate(tmp_path):
    "With this tokenizer, a choice has other tokens by itself than after the prompt."
    task, tokenizer, model = choice_task(), marking_tokenizer(), steered_model("prompt")
    path = to_lm_eval_task(task, tmp_path)
    result = evaluate(model, tokenizer, task)
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4)
    assert_equal(steered, tmp_path, result)
    data = path.with_suffix(".jsonl")
    data.write_text(data.read_text().replace("steer_nb_chat", "other_column"))
    scores = answered(harness(steered, tmp_path, "steer_nb_words")["samples"]["steer_nb_words"])
    assert scores[0] != pytest.approx(result.predictions[0]["scores"], abs=0.1)


def test_choices_without_a_common_space(tmp_path):
    choices = ("w1 w2", " w3", "  w4")
    example = Example("w5 w6", "w1 w2", choices, 0, id="one")
    task = Task("words", "choice", (), (), (example,), source="generated", note="words")
    path = to_lm_eval_task(task, tmp_path)
    row = json.loads(path.with_suffix(".jsonl").read_text())
    assert row["choices"] == list(choices)
    assert yaml.safe_load(path.read_text())["target_delimiter"] == ""
    model, tokenizer = steered_model("last"), marking_tokenizer()
    result = evaluate(model, tokenizer, task)
    assert_equal(SteeredHFLM(model, tokenizer=tokenizer), tmp_path, result)


# Requests


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, argument, n) for n, argument in enumerate(arguments)]


def test_the_same_tokens_after_contexts_of_different_lengths():
    "HFLM computes such rows once; steered, they differ."
    model, tokenizer = steered_model("prompt"), word_tokenizer(WORDS)
    pairs = [("w1 w2", " w3 w4"), ("w1", " w2 w3 w4"), ("w1 w2 w3", " w4")]
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4)
    found = steered.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        example = Example(context, continuation, (continuation,), 0)
        assert score == pytest.approx(choice_scores(model, tokenizer, [example])[0][0], abs=NATS)


def test_a_context_that_is_cut_off_on_the_left():
    model, tokenizer = steered_model("last"), word_tokenizer(WORDS)
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4, max_length=8)
    context, continuations = words(12, 0), (" w3", " w4 w5 w6")
    pairs = [(context, continuation) for continuation in continuations]
    found = steered.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for continuation, (score, _) in zip(continuations, found, strict=True):
        kept = " ".join(context.split()[-(9 - len(continuation.split())) :])
        example = Example(kept, continuation, (continuation,), 0)
        assert score == pytest.approx(choice_scores(model, tokenizer, [example])[0][0], abs=NATS)


@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_with_padded_prompts(positions):
    model, tokenizer = steered_model(positions), word_tokenizer(WORDS)
    prompts = [words(count, count) for count in (3, 9, 5, 12)]
    examples = [Example(prompt, " w1", (), "w1") for prompt in prompts]
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=4)
    asked = [(prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts]
    found = steered.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert found == generate_answers(model, tokenizer, examples, 6)
    (steering,) = steerings(model).values()
    with steering.disabled():
        assert found != generate_answers(model, tokenizer, examples, 6)


OWN_TASK = {
    "task": "continue_words",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{first}} {{second}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_a_generation_task_that_was_written_for_lm_eval(tmp_path):
    model, tokenizer = steered_model("last"), word_tokenizer(WORDS)
    prompts = [(words(4, n), words(2 + n, 9 + n)) for n in range(6)]
    examples = [Example(" ".join(prompt), " w1", (), "w1") for prompt in prompts]
    texts = generate_answers(model, tokenizer, examples, 4)
    answers = [*texts[:4], "w1", "w1"]
    rows = [
        {"first": first, "second": second, "answer": answer}
        for (first, second), answer in zip(prompts, answers, strict=True)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = {**OWN_TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=3)
    found = harness(steered, tmp_path, "continue_words")
    samples = sorted(found["samples"]["continue_words"], key=lambda one: one["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == texts
    assert found["results"]["continue_words"]["exact_match,none"] == pytest.approx(4 / 6)


def test_rolling_likelihood():
    model, tokenizer = steered_model(), word_tokenizer(WORDS)
    texts = [words(count, count) for count in (3, 11)]
    asked = requests("loglikelihood_rolling", *[(text,) for text in texts])
    steered = SteeredHFLM(model, tokenizer=tokenizer, batch_size=2)
    found = steered.loglikelihood_rolling(asked, disable_tqdm=True)
    # a text follows the end-of-sequence token, since this tokenizer has no other special one
    examples = [Example("<eos>", f" {text}", (f" {text}",), 0) for text in texts]
    scores = [own for (own,) in choice_scores(model, tokenizer, examples)]
    assert found == pytest.approx(scores, abs=NATS)
    with pytest.raises(SteerError, match="no prompt"):
        SteeredHFLM(steered_model("last"), tokenizer=tokenizer).loglikelihood_rolling(asked)


# Errors and packaging


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steering": None}, "needs a steering"),
        ({"steering": None, "strength": 2}, "need steering="),
        ({"steering": "nowhere"}, "nowhere"),
        ({"stored": "other"}, "no steering 'other'"),
        ({"peft": "folder"}, "hf_steered has no option 'peft'"),
        ({"parallelize": True}, "hf_steered has no option 'parallelize'"),
        ({"trust_remote_code": True}, "hf_steered has no option 'trust_remote_code'"),
        ({"max_lenght": 8}, "did you mean 'max_length'"),
        ({"pretrained": "smollm-135m"}, "smollm2-135m"),
        ({"dtype": "float33"}, "float33"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_options_that_do_not_fit(options, message, saved):
    given = {"pretrained": str(saved / "model"), "steering": str(saved / "steering"), **options}
    with pytest.raises(SteerError, match=message):
        SteeredHFLM(**given)


def test_options_that_do_not_fit_a_model_in_memory():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(SteerError, match="in memory already"):
        SteeredHFLM(steered_model(), tokenizer=tokenizer, dtype="float32")
    with pytest.raises(SteerError, match="needs a steering"):
        SteeredHFLM(tiny_model("llama"), tokenizer=tokenizer)


def test_an_installed_package_names_the_model_for_lm_eval(tmp_path):
    "Versions of lm_eval after 0.4.13 find models by such entry points."
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (distribution,) = distributions(path=[str(tmp_path)])
    (point,) = distribution.entry_points.select(group="lm_eval.models")
    assert point.name == "hf_steered" and point.load() is get_model("hf_steered") is SteeredHFLM


@pytest.mark.parametrize(
    "example, message",
    [
        (Example("", " a", (" a", " b"), 0, id="e"), "example 'e' cannot be written"),
        (Example("x", " a", (" a",), 0, id="e"), "example 'e' cannot be written"),
    ],
)
def test_an_example_that_lm_eval_would_read_differently(example, message, tmp_path):
    task = Task("words", "choice", (), (), (example,), source="generated", note="words")
    with pytest.raises(SteerError, match=message):
        to_lm_eval_task(task, tmp_path)
    assert list(tmp_path.iterdir()) == []
