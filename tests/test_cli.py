"The program as a user runs it: in a process of its own, on a real model and real data."

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = [sys.executable, "-c", "from steer_nb.cli import main; main()"]


def run(*words, cwd=None):
    done = subprocess.run(
        [*PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    "The demonstration, with fewer examples than a person would run it with."
    folder = tmp_path_factory.mktemp("demo")
    code, out, err = run("demo", "--n-train", 48, "--n-test", 40, "--epochs", 1, cwd=folder)
    assert code == 0, err
    return folder / "steer_nb_demo", out


def test_the_demonstration_does_all_it_says(demonstration):
    folder, out = demonstration
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "steering/steering.safetensors",
        "steering/steering_config.json",
        "run.json",
        "before.json",
        "after.json",
        "demo.png",
    }
    before, after = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after")
    )
    assert before["n"] == after["n"] == 40 and before["predictions"] != after["predictions"]
    assert (
        f"as it is: accuracy {before['accuracy']:.1%}" in out and f"{after['accuracy']:.1%}" in out
    )
    assert (
        "every prediction is the same" in out
        and "276,480 parameters" in out
        and "strength 0:" in out
        and "strength 1:" in out
    )
    assert 1e6 < (folder / "steering/steering.safetensors").stat().st_size < 1.3e6
    assert json.loads((folder / "run.json").read_text())["steps"] == 3
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not any(str(folder) in path.read_text() for path in folder.rglob("*.json"))


def test_the_saved_steering_works_from_the_command_line(demonstration):
    folder, _ = demonstration
    code, out, err = run(
        "evaluate",
        "--steering",
        folder / "steering",
        "--n",
        40,
        "--output",
        folder.parent / "again.json",
    )
    assert code == 0, err
    again, after = (
        json.loads((folder.parent / "again.json").read_text()),
        json.loads((folder / "after.json").read_text()),
    )
    assert again["predictions"] == after["predictions"]
    texts = {}
    for strength in (0, 1):
        code, texts[strength], err = run(
            "generate",
            "Review: a joy to watch.\nSentiment:",
            "--steering",
            folder / "steering",
            "--strength",
            strength,
            "--tokens",
            4,
        )
        assert code == 0, err
    code, plain, err = run("generate", "Review: a joy to watch.\nSentiment:", "--tokens", 4)
    assert (
        plain.strip()
        and plain.strip().splitlines()[-1]
        == texts[0].strip().splitlines()[-1]
        != texts[1].strip().splitlines()[-1]
    )


def test_train(tmp_path):
    words = (
        "train",
        "--output",
        tmp_path / "run",
        "--n-train",
        16,
        "--kind",
        "vector",
        "--site",
        "mlp",
        "--positions",
        "last",
    )
    code, out, err = run(*words)
    assert code == 0, err
    assert (tmp_path / "run/steering/steering.safetensors").exists() and "17,280 parameters" in out
    code, out, err = run(*words)
    assert code == 1 and len(err.strip().splitlines()) == 1 and "exists already" in err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A model folder that trains in seconds."
    from steer_nb.experiments.testbed import load_bed

    folder = tmp_path_factory.mktemp("tiny")
    for part in load_bed("tiny-llama"):
        part.save_pretrained(folder)
    return folder


def test_a_stopped_training_goes_on_when_asked_for_again(tiny, tmp_path):
    "SIGTERM to the program; then another learning rate, which is refused; then the same again. A method of PEFT's, which evaluate reads afterwards."
    words = [
        "train",
        "--model",
        tiny,
        "--task",
        "listops",
        "--n-train",
        1600,
        "--epochs",
        2,
        "--method",
        "lora",
        "--rank",
        2,
        "--output",
        tmp_path / "run",
        "--checkpoint-every",
        0,
    ]
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run/checkpoints/00000003").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "stopped by SIGTERM" in out
        and "give the same command again" in out
    ), err
    code, _, err = run(*words, "--lr", 5e-4)
    assert (
        code == 1
        and "config.lr was 0.001, now 0.0005" in err
        and len([line for line in err.splitlines() if not line.startswith("warning")]) == 1
    )
    code, out, err = run(*words)
    assert code == 0 and f"saved in {tmp_path / 'run'}" in out, err
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (
        record["resumed"][0] >= 3
        and record["steps"] == record["planned"] == 200
        and not (tmp_path / "run/checkpoints").exists()
    )
    code, out, err = run(
        "evaluate",
        "--model",
        tiny,
        "--task",
        "listops",
        "--steering",
        tmp_path / "run/method",
        "--n",
        20,
    )
    assert code == 0 and "lora" in out and "n = 20" in out, err
    code, out, err = run(*words[:-2], "--kind", "vector", "--overwrite")
    assert code == 1 and "leave them out with --method" in err


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["train", "--output", "new", "--method", "lorra"], 1, "did you mean 'lora'"),
        (["evaluate", "--task", "sst3"], 1, "did you mean 'sst2'"),
        (["evaluate", "--model", "smollm-135m"], 1, "smollm2-135m"),
        (["evaluate", "--steering", "/nowhere"], 1, "no steering at /nowhere"),
        (["evaluate", "--split", "tset"], 1, "test"),
        (["train", "--output", "new", "--kind", "lineer"], 1, "did you mean 'linear'"),
        (["train", "--output", "new", "--rank", "0"], 1, "rank"),
        (["train", "--output", "new", "--lr", "-1"], 1, "lr"),
        (["train"], 2, "--output"),
        (["evaluate", "--n", "0"], 2, "--n"),
        (["evaluate", "--n", "99999"], 1, "346"),
        (["demos"], 2, "demos"),
    ],
)
def test_errors_are_one_line(words, code, says, tmp_path):
    got, out, err = run(*words, cwd=tmp_path)
    assert got == code and says in err and "Traceback" not in err
    assert code == 2 or len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback():
    code, out, err = run("--debug", "evaluate", "--task", "sst3")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "generate", "models", "tasks"])
def test_help_has_an_example(command):
    code, out, err = run(command, "--help")
    assert code == 0 and f"Example: steer_nb {command}" in " ".join(out.split())


def test_help_loads_no_torch():
    script = "import sys\nfrom steer_nb.cli import app\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    "A LoRA of SmolLM2 that changes what it says: random, in two layers."
    import torch
    from peft import LoraConfig, get_peft_model

    from steer_nb.data.models import load_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_model("smollm2-135m")[0],
        LoraConfig(
            r=2,
            lora_alpha=8,
            init_lora_weights=False,
            target_modules=["down_proj"],
            layers_to_transform=[10, 20],
        ),
    )
    folder = tmp_path_factory.mktemp("tuned") / "lora"
    model.save_pretrained(folder)
    return folder


def test_distill(lora, tmp_path):
    code, out, err = run(
        "distill",
        "smollm2-135m",
        lora,
        "--output",
        tmp_path / "task",
        "--n",
        24,
        "--n-test",
        12,
        "--rank",
        4,
    )
    assert code == 0, err
    report = json.loads((tmp_path / "task/distill.json").read_text())
    assert (
        report["after"]["kl"] < 0.5 * report["before"]["kl"]
        and len(report["layers"]) == 30
        and "accuracy" in report["after"]
    )
    assert (
        "138,240 parameters" in out or "155,520 parameters" in out
    )  # 30 × 2 × 4 × 576, and 30 × 576 of biases
    code, out, err = run("evaluate", "--steering", tmp_path / "task/steering", "--n", 4)
    assert code == 0, err
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(
            f"The number {n} comes after {n - 1}, and before {n + 1}. What is {n} plus {n}? It is {2 * n}."
            for n in range(1, 33)
        ),
        encoding="utf-8",
    )
    code, out, err = run(
        "distill", "smollm2-135m", lora, "--output", tmp_path / "text", "--text", text, "--rank", 4
    )
    assert code == 0, err
    report = json.loads((tmp_path / "text/distill.json").read_text())
    assert (
        report["after"]["kl"] < 0.5 * report["before"]["kl"] and "accuracy" not in report["after"]
    )


def test_distill_refuses(lora, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    (tmp_path / "short.txt").write_text("one paragraph")
    for words, said in (
        (("--output", tmp_path / "full"), "exists already"),
        (("--output", tmp_path / "new", "--text", tmp_path / "short.txt"), "paragraphs"),
        (
            ("--output", tmp_path / "new", "--kind", "nonlinear", "--n", 4, "--n-test", 2),
            "closed form",
        ),
    ):
        code, out, err = run("distill", "smollm2-135m", lora, *words)
        assert code == 1 and said in err and "Traceback" not in err, (words, out, err)
    assert not (tmp_path / "new").exists()
