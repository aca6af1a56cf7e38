"""What cannot be served is refused when the engine starts, with the reason."""

import json
import shutil

import pytest
from models import make_model, write_steering
from served import Request, Server, engine, run, tokens
from vllm.exceptions import VLLMValidationError

HEADS = {"site": "heads", "kind": "vector"}


def damaged(own, folder):
    "A steering whose tensors are cut off."
    shutil.copytree(own.sources["linear_all"], folder)
    tensors = folder / "steering.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    return folder


def edited(own, folder):
    "A steering whose file of options was edited."
    shutil.copytree(own.sources["linear_all"], folder)
    config = folder / "steering_config.json"
    content = json.loads(config.read_text())
    content["steerings"]["made"]["rank"] = 1000
    config.write_text(json.dumps(content))
    return folder


CASES = {
    "heads": (lambda own, other, folder: own.write("heads", 1, **HEADS), "head"),
    "another base": (lambda own, other, folder: other.sources["linear_all"], "another model"),
    "other weights": (
        lambda own, other, folder: write_steering(
            make_model("llama", seed=1), folder / "x", 1, kind="vector"
        ),
        "weights",
    ),
    "damaged tensors": (
        lambda own, other, folder: damaged(own, folder / "x"),
        "steering.safetensors",
    ),
    "edited options": (lambda own, other, folder: edited(own, folder / "x"), "rank"),
    "no folder": (lambda own, other, folder: folder / "missing", "missing"),
    "no steering in the folder": (lambda own, other, folder: own.model, "steering"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_steering_that_cannot_be_served(base, tmp_path, case):
    make, reason = CASES[case]
    own = base("llama")
    source = make(own, base("qwen"), tmp_path)
    with (
        pytest.raises(Exception, match=f"(?s)bad.*{reason}"),
        engine(own, {"good": own.sources["vector_all"], "bad": source}),
    ):
        pass


def test_a_default_that_is_no_steering(base):
    with (
        pytest.raises(Exception, match="vector_all"),
        engine(base("llama"), ["vector_all"], default="vector_al"),
    ):
        pass


def test_a_request_to_an_engine_without_steerings(base):
    with (
        engine(base("llama")) as llm,
        pytest.raises(VLLMValidationError, match="without steerings"),
    ):
        run(llm, [Request(tokens(5, 1), "linear_all")])


def test_names_that_cannot_be_named(base):
    own = base("llama")
    with (
        pytest.raises(Exception, match="a:b"),
        engine(own, {"a:b": own.sources["vector_all"]}),
    ):
        pass


def test_speculative_decoding(base):
    guess = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with (
        pytest.raises(Exception, match="(?i)speculative"),
        engine(base("llama"), ["vector_all"], speculative_config=guess),
    ):
        pass


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(base):
    own = base("llama")
    own.sources["heads"] = own.write("heads-of-server", 1, **HEADS)
    with pytest.raises(RuntimeError) as caught, Server(own, ["vector_all", "heads"]):
        pass
    own.sources.pop("heads")
    assert "SteeringError" in str(caught.value) and "heads" in str(caught.value)
