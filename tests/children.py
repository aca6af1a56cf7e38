"""Child processes for tests, forked from a server that has the training stack imported.

Importing it takes some five seconds, a fork a few milliseconds. The children are real processes:
each leads a process group of its own, receives real signals, and can be killed. A function given to
`start` or `run` is defined at the top level of a test module, and its arguments can be pickled."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

PRELOADED = ["torch", "transformers", "accelerate", "datasets", "peft", "pandas", "scipy.stats"]
PRELOADED += ["steer_nb.methods.registry", "steer_nb.evaluation.result", "steer_nb.training.fit"]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


class Done(NamedTuple):
    "What a child left behind."

    returncode: int  # the exit status; minus the signal's number if a signal ended it
    stdout: str
    stderr: str


def _main(function: Callable, args: tuple, environment: dict, cwd: str, folder: str) -> None:
    "In the child: an environment, a folder and outputs of its own, then the function."
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()  # the server has the environment of an earlier moment
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


class Child:
    "A running child process."

    def __init__(self, function: Callable, args: tuple, environment: Mapping, cwd):
        self.folder = tempfile.TemporaryDirectory(prefix="child-")
        arguments = (
            function,
            args,
            {**os.environ, **environment},
            str(cwd or os.getcwd()),
            self.folder.name,
        )
        self.process = _CONTEXT.Process(target=_main, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        "Its process id, which is also that of its group."
        return self.process.pid

    def running(self) -> bool:
        "Whether it has not ended."
        return self.process.is_alive()

    def output(self, name: str = "stdout") -> str:
        "What it has written so far."
        path = Path(self.folder.name) / name
        return path.read_text(errors="replace") if path.exists() else ""

    def signal(self, number: int) -> None:
        "Send it a signal."
        os.kill(self.pid, number)

    def kill(self) -> None:
        "SIGKILL, to it and all that it started."
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it has no group yet

    def wait(self, timeout: float = 120) -> Done:
        "Wait for its end. After `timeout` seconds it is killed and `TimeoutError` raised."
        self.process.join(timeout)
        if self.running():
            self.kill()
            self.process.join()
            raise TimeoutError(
                f"no end after {timeout} s:\n{self.output()}\n{self.output('stderr')}"
            )
        return Done(self.process.exitcode, self.output("stdout"), self.output("stderr"))

    def wait_for(self, happened: Callable[[], object], timeout: float = 60) -> None:
        "Wait until `happened()` is true. `AssertionError` if the child ends before, or too late."
        end = time.monotonic() + timeout
        while not happened():
            assert self.running(), f"it ended before:\n{self.output()}\n{self.output('stderr')}"
            assert time.monotonic() < end, f"not within {timeout} s:\n{self.output('stderr')}"
            time.sleep(0.01)


def start(function: Callable, *args, environment: Mapping[str, str] = {}, cwd=None) -> Child:
    "Start `function(*args)` in a child process."
    return Child(function, args, environment, cwd)


def run(
    function: Callable, *args, environment: Mapping[str, str] = {}, cwd=None, timeout=120
) -> Done:
    "Run `function(*args)` in a child process to its end."
    return start(function, *args, environment=environment, cwd=cwd).wait(timeout)


def run_processes(function: Callable, processes: int, *args, timeout=180) -> list[Done]:
    "Run `function(*args)` in processes that find each other by torch.distributed's variables."
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true",
    }
    children = [
        start(function, *args, environment={**common, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(processes)
    ]
    try:
        return [child.wait(timeout) for child in children]
    finally:
        for child in children:
            if child.running():
                child.kill()
