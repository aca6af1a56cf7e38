"Every causal language model type that `transformers` registers: built tiny, checked at every site."

import warnings
from unittest.mock import patch

import pytest
import zoo_checks as checks

from steer_nb.core.sites import Site, SiteError, blocks, locate
from steer_nb.testing.tiny_models import tiny_model, zoo_types

NOT_BUILT = {  # and why
    "blt": "too large even when small",
    "dbrx": "its forward clamps without limits",
    "dots3_note": "its per_layer_config is for more layers",
    "gemma3n": "needs timm",
    "gemma4_assistant": "needs the cache of another model",
    "gemma4_unified_assistant": "needs the cache of another model",
    "musicgen": "its config lacks what its model reads",
    "musicgen_melody": "its config lacks what its model reads",
    "xlstm": "its kernel refuses the small shapes",
    "zamba": "its tied weights do not fit two layers",
}
WITHOUT_SITES = {"hrm_text": "several stacks", "reformer": "reversible", "xlm": "several stacks"}
PARTLY = {  # what cannot be asked of them
    "cpmant": "unknown in an activation",  # it adds tokens in front
    "prophetnet": "unknown in an activation",  # it has several streams of tokens
    "rwkv": "its own cached tokens differ",
}
CHECKED = [name for name in zoo_types() if name not in {*NOT_BUILT, *WITHOUT_SITES}]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_type(model_type: str, steps: int) -> str:
    "All checks on one model. Returns '', or what could not be asked of it."
    # Frozen, because torch chooses another convolution for FalconMamba's weights when they need
    # no gradient, which rounds differently.
    model = tiny_model(model_type).requires_grad_(False)
    base = checks.logits(model)
    checks.check_capture(model)
    checks.check_zero_start(model, base)
    checks.check_vector(model, base)
    for layer in range(len(blocks(model))):
        checks.branch_form(model, layer)
    note = checks.check_last_position(model, base)
    positions = ("all",) if note else ("all", "prompt")
    return note or checks.check_generate(model, positions, steps)


@pytest.mark.parametrize("model_type", CHECKED)
def test_type(model_type):
    note = check_type(model_type, steps=2)
    assert PARTLY.get(model_type, "") in note and bool(note) == (model_type in PARTLY), note


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CHECKED)
def test_type_with_more_tokens(model_type):
    check_type(model_type, steps=4)  # with more steps, some models have notes of their own


@pytest.mark.parametrize("model_type", WITHOUT_SITES)
def test_type_without_sites(model_type):
    with pytest.raises(SiteError, match=WITHOUT_SITES[model_type]):
        locate(tiny_model(model_type), Site(0, "block"))


def test_at_least_170_types_are_checked():
    assert len(set(CHECKED) - set(PARTLY)) >= 170


def test_a_wrong_row_in_the_tables_is_caught():
    "In Llama, `post_attention_layernorm` is the norm before the MLP."
    llama = tiny_model("llama")
    assert checks.branch_form(llama, 1) == "x + a + m"
    assert checks.branch_form(tiny_model("bart"), 0) == "sums inside"
    row = ("post_attention_layernorm", "post_attention_layernorm")
    wrong = patch("steer_nb.core.sites.POST_NORMS", (row,))
    with wrong, pytest.raises(AssertionError, match="a vector at"):
        checks.branch_form(llama, 1)
