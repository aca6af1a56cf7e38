"""The program on a tiny model, in this process; once as a process of its own.

What takes the real model and data is marked slow."""

import errno
import re
import signal
import subprocess
import sys

import children
import pytest
import torch
from peft import LoraConfig, get_peft_model
from program import check, json_of, run
from typer.testing import CliRunner

from steer_nb.cli.cli import app
from steer_nb.cli.demo import write_files
from steer_nb.cli.startup import start_phases
from steer_nb.data.models import load_model
from steer_nb.experiments.testbed import load_testbed
from steer_nb.testing.tiny_models import tiny_model

COMMANDS = [
    "demo",
    "models",
    "tasks",
    "train",
    "evaluate",
    "lm-eval",
    "generate",
    "chat",
    "serve",
    "push",
    "distill",
    "experiment",
    "plan",
    "bench",
]


def program(*words):
    "In a child: the program with these arguments."
    from steer_nb.cli.cli import main

    sys.argv = ["steer_nb", *map(str, words)]
    main()


# The demonstration


def check_demonstration(folder, out):
    "Everything that the demonstration reports is in its files."
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "data/train.jsonl",
        "data/test.jsonl",
        "run/steering/steering.safetensors",
        "run/steering/steering_config.json",
        "run/run.json",
        "before.json",
        "after.json",
        "demo.png",
    }
    before, after = json_of(folder / "before.json"), json_of(folder / "after.json")
    assert before["n"] == after["n"] == 40 and before["predictions"] != after["predictions"]
    assert f"before: {before['score']:.1%} (95 % interval" in out
    assert f"   {after['score']:.1%} (95 % interval" in out
    assert "all 40 answers are the same" in out and "always {" in out
    assert f"steer_nb chat --steering {folder / 'run'}" in out
    assert json_of(folder / "run/run.json")["steps"] == 3
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not any(str(folder) in path.read_text() for path in folder.rglob("*.json*"))


SIZES = "--n-train", 48, "--n-test", 40, "--epochs", 1


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    "The folder of a small random model with SmolLM2's tokenizer."
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = load_model("smollm2-135m")[1]
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    for part in (tokenizer, tiny_model("llama", **changes)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demonstration(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, check("demo", "--model", talker, "--lr", 0.01, *SIZES, "--output", folder)


def test_the_demonstration(demonstration):
    check_demonstration(*demonstration)


def test_the_files_of_the_demonstration(demonstration, tmp_path):
    "Another seed has other training examples and the same test; there are not that many."
    folder, _ = demonstration
    write_files(tmp_path, 48, 40, seed=1)
    same = [
        (folder / "data" / name).read_text() == (tmp_path / name).read_text()
        for name in ("train.jsonl", "test.jsonl")
    ]
    assert same == [False, True]
    code, _, err = run("demo", "--n-test", 9999, "--output", tmp_path / "demo")
    assert code == 1 and "sst2 has 346 test examples, 9999 were asked for" in err


def test_an_output_folder_with_files_is_an_error(demonstration, tiny):
    folder, _ = demonstration
    for words in (("demo",), ("distill", tiny, tiny)):
        code, out, err = run(*words, "--output", folder)
        assert code == 1 and "exists already" in err and out == ""


def test_the_data_of_the_demonstration_in_other_commands(demonstration, talker, tmp_path):
    "The same training from a terminal has the same weights; they are evaluated and used."
    folder, _ = demonstration
    again, data = tmp_path / "again", ("--model", talker, "--data", folder / "data")
    check("train", *data, "--lr", 0.01, "--epochs", 1, "--output", again)
    first, second = (one / "steering/steering.safetensors" for one in (folder / "run", again))
    assert first.read_bytes() == second.read_bytes()
    words = "evaluate", *data, "--steering", again, "--metric", "json"
    words += "--output", tmp_path / "again.json"
    assert "saved in" in check(*words) and json_of(tmp_path / "again.json")["n"] == 40
    code, _, err = run(*words)
    assert code == 1 and "exists already" in err
    words = "generate", "Question: why?", "--tokens", 6, "--model", talker
    off, on = (
        check(*words, "--steering", again, "--strength", strength).splitlines()[-1]
        for strength in (0, 50)
    )
    assert check(*words).splitlines()[-1] == off != on


def test_an_empty_answer_of_a_steering_says_why(demonstration, talker, monkeypatch):
    "A steering of conversations ends at once where the prompt has no chat template."
    monkeypatch.setattr("steer_nb.evaluation.generation.generate_answers", lambda *_: [""])
    words, steering = ("generate", "why?", "--model", talker), demonstration[0] / "run"
    assert "needs --chat" in run(*words, "--steering", steering)[2]
    assert run(*words)[2] == run(*words, "--steering", steering, "--chat")[2] == ""


@pytest.mark.slow
def test_the_demonstration_on_the_real_model(tmp_path):
    out = check("demo", *SIZES, "--output", tmp_path / "demo")
    check_demonstration(tmp_path / "demo", out)
    assert "276,480 parameters" in out
    assert 1e6 < (tmp_path / "demo/run/steering/steering.safetensors").stat().st_size < 1.3e6


# Training


def test_train_with_retained_texts(tiny, tmp_path):
    texts = tmp_path / "texts.jsonl"
    rows = [f'{{"text": "[MIN {n} {n + 1} ] = {n}"}}' for n in range(8)]
    texts.write_text("\n".join(rows))
    words = "train", "--model", tiny, "--task", "listops", "--n-train", 32, "--lr", 0.01
    folder = tmp_path / "run"
    out = check(*words, "--output", folder, "--retain", texts, "--retain-weight", 0.5)
    record = json_of(folder / "run.json")
    assert record["retain_weight"] == 0.5 and record["examples"]["retain"] == 8
    assert record["curve"][0]["kl"] == 0 < record["curve"][-1]["kl"]
    assert "KL on 8 retained texts" in out
    code, _, err = run(*words, "--output", tmp_path / "other", "--retain", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl" in err


def test_train_as_a_process_of_its_own(tiny, tmp_path):
    "`python -m steer_nb`, as a user or a launcher starts it."
    words = f"train --model {tiny} --task listops --n-train 16 --kind vector --site mlp"
    command = [sys.executable, "-m", "steer_nb", *words.split(), "--positions", "last"]
    command += ["--layers", "-1"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "run"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "32 parameters trained" in done.stdout  # a vector in one layer
    assert (tmp_path / "run/steering/steering.safetensors").exists()


def test_the_phases_of_a_start(tiny):
    "Every phase is found, and the command ends with its first step."
    words = f"train --model {tiny} --task listops --n-train 16"
    phases = start_phases(*words.split())
    assert list(phases)[:2] == ["Python", "command line"] and list(phases)[-1] == "other"
    assert {"model", "examples", "adapters", "tokens", "validation"} < set(phases)
    assert all(seconds > 0 for seconds in phases.values())


def test_an_interrupted_training_resumes(tiny, tmp_path):
    "SIGTERM; another learning rate, which is an error; the same command; and its evaluation."
    output = tmp_path / "run"
    words = "train", "--model", tiny, "--task", "listops", "--n-train", 320, "--output", output
    words += "--method", "lora", "--rank", 2, "--checkpoint-every", 0
    child = children.start(program, *words)
    child.wait_for((output / "checkpoints/00000003").exists)
    child.signal(signal.SIGTERM)
    stopped = child.wait()
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "stopped by SIGTERM" in stopped.stdout and "rerun the same command" in stopped.stdout
    code, _, err = run(*words, "--lr", 5e-4)
    assert code == 1 and "config.lr was 0.001, now 0.0005" in err
    assert f"saved in {output}" in check(*words)
    record = json_of(output / "run.json")
    assert record["resumed"][0] >= 3 and record["steps"] == record["planned"] == 20
    assert not (output / "checkpoints").exists()
    method = "--steering", output / "method"
    out = check("evaluate", "--model", tiny, "--task", "listops", *method, "--n", 20)
    assert "lora" in out and "n = 20" in out
    code, _, err = run(*words, "--kind", "vector", "--overwrite")
    assert code == 1 and "not with --method" in err


# Errors and help


@pytest.mark.parametrize(
    "words, code, message",
    [
        ("train --output new --method lorra", 1, "did you mean 'lora'"),
        ("evaluate --task sst3", 1, "did you mean 'sst2'"),
        ("evaluate --model smollm-135m", 1, "smollm2-135m"),
        ("evaluate --model TINY --steering /nowhere", 1, "no steering at /nowhere"),
        ("evaluate --split tset --model TINY", 1, "test"),
        ("train --output new --kind lineer", 1, "did you mean 'linear'"),
        ("train --output new --rank 0", 1, "rank"),
        ("train --output new --lr -1", 1, "lr"),
        ("train --output new --dtype halved", 1, "no dtype 'halved'"),
        ("generate x --strength 2", 1, "--strength needs --steering"),
        ("experiment smok", 1, "did you mean 'smoke'"),
        ("experiment smoke --arms lorra", 1, "did you mean 'lora'"),
        ("bench --only trainer-lora", 1, "did you mean 'trainer_lora'"),
        ("plan --gpu H1000 --model TINY", 1, "did you mean 'H100'"),
        ("plan --layers 1:3 --model TINY", 1, "numbers and ranges with commas"),
        ("plan --method lora --kind vector --model TINY", 1, "not with --method"),
        ("train", 2, "--output"),
        ("evaluate --n 0", 2, "--n"),
        ("evaluate --n 99999", 1, "346"),
        ("demos", 2, "demos"),
    ],
)
def test_errors_are_one_line(words, code, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(*words.replace("TINY", str(tiny)).split())
    assert got == code and message in err and "Traceback" not in err
    if code == 1:
        assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_debug_raises_the_error():
    result = CliRunner().invoke(app, ["--debug", "evaluate", "--task", "sst3"])
    assert isinstance(result.exception, ValueError) and "error:" not in result.stderr


def test_ctrl_c_and_broken_pipes(monkeypatch):
    pipe = BrokenPipeError(errno.EPIPE, "Broken pipe")
    for error, code, message in ((KeyboardInterrupt(), 130, "stopped"), (pipe, 1, "")):
        monkeypatch.setattr("steer_nb.data.tasks.load_task", raising(error))
        got, _, err = run("evaluate")
        assert (got, err.strip()) == (code, message)


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: steer_nb {command}" in " ".join(check(command, "--help").split())


def test_lists():
    assert re.findall(r"^│ (\w[\w-]*)", check("--help"), re.MULTILINE) == COMMANDS
    assert "smollm2-135m" in check("models") and "sst2" in check("tasks")


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys\nfrom steer_nb.cli.cli import app\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Experiments


def test_the_cost_of_an_experiment():
    out = check("experiment", "smoke", "--dry-run", "--arms", "lora,full")
    assert "5 runs" in out and "hours of an H100" in out


def test_an_experiment_from_its_jobs_to_its_table(tmp_path):
    "One method of the preset smoke. The same command again has nothing left to run."
    words = "experiment", "smoke", "--arms", "lora", "--store", tmp_path
    first, again = check(*words), check(*words)
    jobs, table = first[: first.index("| model")], first[first.index("| model") :]
    assert len(jobs.splitlines()) == 3 and "done, about 0 left" in jobs
    assert again == table and "zero_shot" in table and "lora" in table


def test_the_arguments_of_an_experiment(monkeypatch, tmp_path):
    "The options reach `run_grid`; the table compares with the chosen method."
    given = {}
    monkeypatch.setattr(
        "steer_nb.experiments.grid.run_grid",
        lambda grid, folder, **options: given.update(options, grid=grid, folder=folder),
    )
    monkeypatch.setattr(
        "steer_nb.experiments.statistics.table", lambda grid, done, against: f"against {against}"
    )
    words = "experiment", "mine", "--preset", "smoke", "--arms", "lora,full", "--store", tmp_path
    assert check(*words, "--processes", 2, "--again").endswith("against lora\n")
    grid = given.pop("grid")
    assert grid.name == "mine" and set(grid.arms) == {"lora", "full"}
    assert given["folder"] == tmp_path and given["processes"] == 2 and given["again"] is True
    assert check(*words, "--cluster", "auto", "--against", "full").endswith("against full\n")
    assert given["cluster"] == "auto"


# Distillation


def save_lora(model, folder, **options):
    "A random LoRA that changes the model's predictions."
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["down_proj"], **options)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return save_lora(load_testbed("tiny-llama")[0], tmp_path_factory.mktemp("lora"), lora_alpha=64)


def paragraphs(sentence: str, count: int) -> str:
    return "\n\n".join(sentence.format(n, n + 1, 2 * n) for n in range(count))


def test_distill_on_a_task(tiny, lora, tmp_path):
    words = "--task", "listops", "--n", 64, "--n-test", 20, "--rank", 4
    out = check("distill", tiny, lora, "--output", tmp_path / "new", *words)
    report = json_of(tmp_path / "new/distill.json")
    assert report["after"]["kl"] < 0.5 * report["before"]["kl"]
    assert len(report["layers"]) == 2 and "accuracy" in report["after"]
    assert "parameters" in out and "KL to the tuned model" in out
    steering = "--steering", tmp_path / "new/steering"
    check("evaluate", "--model", tiny, "--task", "listops", *steering, "--n", 4)


def test_distill_on_a_text(tiny, lora, tmp_path):
    text = tmp_path / "text.txt"
    digits = "[MAX 1 2 3 ] = 3 [MIN 4 5 ] = 4 [SM {0} {1} {2} ] = 7 [MED 1 2 3 ] = 2 9 8 7"
    text.write_text(paragraphs(digits, 60), encoding="utf-8")
    check("distill", tiny, lora, "--output", tmp_path / "new", "--text", text, "--rank", 2)
    report = json_of(tmp_path / "new/distill.json")
    assert report["after"]["kl"] < 0.5 * report["before"]["kl"]
    assert "accuracy" not in report["after"]


def test_distill_errors(tiny, lora, tmp_path):
    (tmp_path / "short.txt").write_text("one paragraph")
    few = "--task", "listops", "--n", 4, "--n-test", 2
    for words, message in (
        (("--text", tmp_path / "short.txt"), "paragraphs"),
        (("--kind", "nonlinear", *few), "closed form"),
    ):
        code, out, err = run("distill", tiny, lora, "--output", tmp_path / "new", *words)
        assert code == 1 and message in err, (words, out, err)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_distill_the_real_model(tmp_path):
    tuned = save_lora(
        load_model("smollm2-135m")[0], tmp_path / "lora", lora_alpha=8, layers_to_transform=[10, 20]
    )
    text = tmp_path / "text.txt"
    text.write_text(paragraphs("The number {0} comes before {1}. Twice is {2}.", 32))
    for words in (("--n", 24, "--n-test", 12), ("--text", text)):
        folder = tmp_path / words[0]
        check("distill", "smollm2-135m", tuned, "--output", folder, "--rank", 4, *words)
        report = json_of(folder / "distill.json")
        assert report["after"]["kl"] < 0.5 * report["before"]["kl"] and len(report["layers"]) == 30
