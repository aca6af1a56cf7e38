"Every causal language model type that `transformers` registers, built tiny and checked at every site."

import warnings
from unittest.mock import patch

import pytest
import torch
import zoo_checks as checks

from steer_nb.core.sites import Site, SiteError, blocks, locate
from steer_nb.testing.tiny_models import tiny_model, zoo_types

WITHOUT_SITES = {"hrm_text", "reformer", "xlm", "blt"}  # their errors say why
FULL = {}  # whether each type was checked with nothing left out


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_type(model_type: str, steps: int) -> bool:
    "All checks on one model. Returns whether all of them could be made."
    try:
        model = tiny_model(model_type)
        if sum(p.numel() for p in model.parameters()) > 3e7:
            pytest.skip("too large even when small")
        # Frozen, because torch chooses another convolution for FalconMamba's weights when they
        # need no gradient, which rounds differently.
        base = checks.logits(model.requires_grad_(False))
    except Exception as error:
        pytest.skip(f"cannot be built: {checks.reason(error)}")
    try:
        locate(model, Site(0, "block"))
    except SiteError as error:
        assert model_type in WITHOUT_SITES, error
        pytest.skip(str(error))
    checks.check_capture(model)
    checks.check_zero_start(model, base)
    checks.check_vector(model, base)
    for layer in range(len(blocks(model))):
        checks.branch_form(model, layer)
    note = checks.check_last_position(model, base)
    positions = ("all",) if note else ("all", "prompt")
    return not (note or checks.check_generate(model, positions, steps))


@pytest.mark.parametrize("model_type", zoo_types())
def test_type(model_type):
    FULL[model_type] = check_type(model_type, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo_types())
def test_type_generates_more_tokens(model_type):
    check_type(model_type, steps=6)


def test_at_least_150_types_are_fully_checked():
    if len(FULL) < 150:
        pytest.skip("only some types were run in this process")
    full = {name for name, complete in FULL.items() if complete}
    assert len(full) >= 150, len(full)
    common = "llama gemma2 gemma3_text olmo2 gptj gpt_neox phi cohere falcon mixtral mamba jamba"
    assert {*common.split(), *"lfm2 nemotron_h opt biogpt".split()} <= full


def test_a_wrong_row_in_the_tables_is_caught():
    "In Llama, `post_attention_layernorm` is the norm before the MLP."
    llama = tiny_model("llama")
    assert checks.branch_form(llama, 1) == "x + a + m"
    assert checks.branch_form(tiny_model("bart"), 0) == "sums inside"
    norms = ("post_attention_layernorm", "post_attention_layernorm")
    with patch("steer_nb.core.sites.POST_NORMS", (norms,)):
        with pytest.raises(AssertionError, match="a vector at"):
            checks.branch_form(llama, 1)
