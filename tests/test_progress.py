"""What processes whose stderr is a file write to it: whole lines, and not many of them."""

import os
import subprocess
import sys
import time

import children
import pytest

from steer_nb import evaluate, fit, load_records, steer
from steer_nb.core import progress
from steer_nb.testing.toy_task import toy_model, toy_tokenizer

EVERY = 0.05  # seconds between two lines, in place of ten
PROGRAM = f"""
from steer_nb.core import progress
progress.LINE_SECONDS = {EVERY}
from steer_nb.cli.cli import main
main()
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A CSV file of 2,000 rows, which is read by `datasets`."
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    lines = [f"max of {n % 7} {n % 5} {n} =,{n % 7}\n" for n in range(2000)]
    path.write_text("prompt,completion\n" + "".join(lines))
    return path


def lines_of(log: str, seconds: float) -> list[str]:
    "The lines of progress in a log, after a check that there are no others and not too many."
    assert "\r" not in log and log.endswith("\n")
    lines = log.splitlines()
    assert all(" elapsed, " in line and " left, " in line for line in lines), log
    loops = {line.split(":")[0] for line in lines}
    # One every so often, and a last one of each loop.
    assert len(lines) <= seconds / EVERY + len(loops), log
    return lines


def test_the_program_writes_lines_to_a_log(rows, tmp_path):
    "A real process, as in a batch job."
    toy_model().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    words = ["train", "--model", tmp_path / "model", "--data", rows, "--output", tmp_path / "run"]
    started = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *words, "--batch-size", "8"],
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
            stdout=subprocess.DEVNULL,
            stderr=log,
            check=True,
        )
    found = lines_of((tmp_path / "log").read_text(), time.monotonic() - started)
    steps = [line for line in found if line.startswith("steps: ")]
    assert len(steps) > 1 and all("loss=" in line for line in steps)
    assert "(100 %)" in steps[-1] and "00:00 left" in steps[-1]


def train_and_evaluate(rows, every: float | None) -> None:
    "In a child: what a script does."
    progress.LINE_SECONDS = every or progress.LINE_SECONDS
    task, model, tokenizer = load_records(rows), toy_model(), toy_tokenizer()
    steer(model, rank=2)
    fit(model, tokenizer, task)
    evaluate(model, tokenizer, task)


@pytest.mark.parametrize("every", [EVERY, None])
def test_a_script_writes_lines_to_a_log(rows, every):
    "With the ten seconds of every day, this short one writes nothing."
    started = time.monotonic()
    done = children.run(train_and_evaluate, rows, every)
    assert done.returncode == 0, done.stderr
    if every is None:
        assert done.stderr == ""
    else:
        loops = {line.split(":")[0] for line in lines_of(done.stderr, time.monotonic() - started)}
        assert loops >= {"steps", "answers"}


def test_only_the_first_process_of_a_launch_writes(rows):
    done = children.run(train_and_evaluate, rows, EVERY, environment={"RANK": "1"})
    assert (done.returncode, done.stderr) == (0, "")
