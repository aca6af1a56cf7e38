"""Run every notebook and every test file, several at a time, and count.

`make test` calls this. A notebook is one test, run by `nbdev_test`; the tests of a file are counted one by one. The last line
is the total, and the exit status is 1 if anything failed. Files named on the command line are run instead of all of them.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LONGEST = "test_zoo.py"  # started first, so that nothing waits for it at the end
WORKERS = max(1, min(4, os.cpu_count() or 1))  # each can hold a language model in memory
SECONDS = {".ipynb": 600, ".py": 1500}  # after which a file counts as failed
TAIL = 120  # lines shown of a file that failed

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    "OMP_NUM_THREADS": "1",  # files run side by side; threads of one would wait for those of another
    "HF_HUB_OFFLINE": "1",  # nothing waits for a hub
    "TOKENIZERS_PARALLELISM": "false",
}
RUNNING: set[subprocess.Popen] = set()


class Count(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other):
        return Count(*(mine + its for mine, its in zip(self, other)))

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed" + (
            f", {self.skipped} skipped" if self.skipped else ""
        )


def files() -> list[Path]:
    "Every test file and notebook, the longest first."
    notebooks = [
        path
        for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts
    ]
    return (
        sorted(sorted((ROOT / "tests").glob("test_*.py")), key=lambda path: path.name != LONGEST)
        + notebooks
    )


def command(path: Path, report: Path) -> list:
    "What runs this file."
    if path.suffix == ".ipynb":
        return [BIN / "nbdev_test", "--path", path]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        path,
    ]


def kill(process: subprocess.Popen) -> None:
    "End a process and those it started; each leads a group of its own."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def execute(path: Path, report: Path, output) -> int | None:
    "Run a file in a process of its own: its exit status, or None if it took too long."
    process = subprocess.Popen(
        command(path, report),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    RUNNING.add(process)
    try:
        return process.wait(SECONDS[path.suffix])
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(process)  # also what it may have left behind
        process.wait()
        RUNNING.discard(process)


def count(status: int | None, report: Path) -> Count:
    "The tests of one file. A file that ended badly has failed at least once, whatever its report says."
    total = Count()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        outcome = {child.tag for child in case}
        total += (
            Count(failed=1)
            if outcome & {"failure", "error"}
            else Count(skipped=1)
            if "skipped" in outcome
            else Count(passed=1)
        )
    if status != 0 and not total.failed:
        total += Count(failed=1)
    return total if report.exists() or status != 0 else Count(passed=1)


def run(path: Path) -> tuple[Count, float, str]:
    "Run one file: its count, the seconds it took, and the end of its output if it failed."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+b") as output:
        report = Path(folder) / "report.xml"
        status = execute(path, report, output)
        total, seconds = count(status, report), time.monotonic() - start
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-TAIL:] if total.failed else []
    if status is None:
        lines.append(f"stopped after {SECONDS[path.suffix]} s")
    return total, seconds, "\n".join(lines)


def main(paths: list[Path]) -> int:
    "Run the files, a line for each; the exit status."
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it, and so would the tests
    total, pool = Count(), ThreadPoolExecutor(WORKERS)
    try:
        waiting = {pool.submit(run, path): path for path in paths}
        for done in as_completed(waiting):
            counted, seconds, output = done.result()
            name = os.path.relpath(waiting[done], ROOT)
            if output:
                print(output)
            print(f"{name:32} {seconds:5.0f} s  {counted}", flush=True)
            total += counted
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            kill(process)
        print("stopped", file=sys.stderr)
        return 130
    print(total, flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main([Path(name).absolute() for name in sys.argv[1:]] or files()))
