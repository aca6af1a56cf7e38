"""These tests need vLLM: `make test-vllm` makes an environment with it, and elsewhere none runs.

Engines of the tests run in the test's own process (VLLM_ENABLE_V1_MULTIPROCESSING=0), where one
starts in two seconds; the servers have the usual processes."""

import importlib.util
import os

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_PLUGINS="steer_nb",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    TRANSFORMERS_VERBOSITY="error",
)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "Folders of models and steerings, and a reference for each model: `base('llama')`."
    from served import Base, random_base

    made = {}

    def base(architecture: str) -> Base:
        if architecture not in made:
            made[architecture] = random_base(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return base
