"""What every test runs under: one thread (tests run side by side), no hub, and signals that act."""

import os
import signal

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",  # nothing waits for a hub
    TOKENIZERS_PARALLELISM="false",
)
# A shell starts background jobs with SIGINT ignored, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "The folder of a model that trains in seconds."
    folder = tmp_path_factory.mktemp("tiny")
    from steer_nb.experiments.testbed import load_testbed

    for part in load_testbed("tiny-llama"):
        part.save_pretrained(folder)
    return folder
