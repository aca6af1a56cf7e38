"Every causal language model type that transformers registers, built tiny and checked at every site."

import warnings

import pytest
import torch

from steer_nb.testing.checks import check_type
from steer_nb.testing.tiny_models import zoo_types

# These are understood and cannot be steered, or cannot be built here; the notebook's table has the reasons.
WITHOUT_SITES = {"hrm_text", "reformer", "xlm", "blt"}

RESULTS = {}


@pytest.fixture(autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", zoo_types())
def test_type(model_type):
    checked = RESULTS[model_type] = check_type(model_type)
    assert checked.result != "failed", checked.note
    if checked.result == "no sites":
        assert model_type in WITHOUT_SITES, checked.note
    if checked.result != "checked":
        pytest.skip(f"{checked.result}: {checked.note}")


def test_at_least_150_types_are_fully_checked():
    if len(RESULTS) < len(zoo_types()):
        pytest.skip("only some types were run")
    full = [
        name
        for name, checked in RESULTS.items()
        if checked.result == "checked" and not checked.note
    ]
    assert len(full) >= 150, len(full)
    for name in (
        "llama",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "gptj",
        "gpt_neox",
        "phi",
        "cohere",
        "falcon",
        "mixtral",
        "mamba",
        "jamba",
        "lfm2",
        "nemotron_h",
        "opt",
        "biogpt",
        "deepseek_v4",
        "hy_v4",
    ):
        if name in zoo_types():
            assert name in full
