"""The children of the fork server are real processes: output, exit status, signals, kills."""

import os
import signal
import sys
import time

from children import run, run_processes, start


def speak(word):
    print(word, os.environ.get("WHERE"), os.getcwd())
    print("aside", file=sys.stderr)


def fail():
    raise ValueError("on purpose")


def wait_long():
    print("ready")
    time.sleep(600)


def test_output_environment_and_folder(tmp_path):
    done = run(speak, "hello", environment={"WHERE": "here"}, cwd=tmp_path)
    assert done == (0, f"hello here {tmp_path}\n", "aside\n")
    assert "WHERE" not in os.environ


def test_a_failure_has_its_traceback():
    done = run(fail)
    assert done.returncode == 1 and "ValueError: on purpose" in done.stderr


def test_signals_and_kills_are_real():
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
        child = start(wait_long)
        child.wait_for(lambda child=child: "ready" in child.output())
        child.signal(number)
        assert child.wait().returncode == status


def meet():
    from accelerate import PartialState

    state = PartialState(cpu=True)
    print(state.process_index, state.num_processes)
    state.destroy_process_group()


def test_processes_find_each_other():
    assert [done.stdout.strip() for done in run_processes(meet, 2)] == ["0 2", "1 2"]
