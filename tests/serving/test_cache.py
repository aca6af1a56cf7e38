"""Prefix caching: a text is never continued from activations of another steering, and what may be
shared is."""

import pytest
from models import POSITIONS
from reference import EFFECT
from served import BLOCK, Request, engine, run, tokens

MARKS = [positions.replace(":", "").replace("+", "_") for positions in POSITIONS]
NAMES = [f"linear_{mark}" for mark in MARKS] + ["vector_all", "full_all"]
LONG = 7 * BLOCK + 5


@pytest.fixture(scope="module")
def llama(base):
    "A reference, and an engine."
    own = base("llama")
    with engine(own, NAMES) as llm:
        yield own.reference, llm


def ask(llama, prompt, name=None, strength=None, new=8) -> Request:
    "A request that was answered alone, and rightly."
    reference, llm = llama
    request = Request(prompt, name, strength, new=new)
    run(llm, [request])
    request.check(reference)
    return request


def test_one_prompt_with_every_steering_and_strength(llama):
    """Each after the others, twice: the second time its own blocks are in the cache."""
    reference, _ = llama
    prompt = tokens(LONG, 1)
    plain = ask(llama, prompt)
    cached = {}
    for turn in range(2):
        for name in NAMES:
            for strength in (1.0, 0.5, -1.0):
                cached[turn, name, strength] = ask(llama, prompt, name, strength).cached
    for name in NAMES:
        effect = reference.effect(prompt, plain.answers[0]["tokens"], name)
        assert effect > EFFECT, name  # else a mix-up would not show
    assert ask(llama, prompt).cached >= LONG - LONG % BLOCK - BLOCK
    for name in ("linear_all", "vector_all", "full_all", "linear_prompt"):
        assert cached[1, name, 0.5] >= LONG - LONG % BLOCK - BLOCK, name


def test_one_prompt_in_one_batch(llama):
    reference, llm = llama
    prompt = tokens(LONG, 2)
    requests = [Request(prompt, name, strength) for name in NAMES for strength in (1.0, 0.25, 0.0)]
    requests += [Request(prompt)]
    run(llm, requests)
    for one in requests:
        one.check(reference)


def test_strength_zero_shares_with_unsteered_requests(llama):
    prompt = tokens(LONG, 3)
    ask(llama, prompt)
    assert ask(llama, prompt, "linear_all", 0.0).cached > 0


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_conversation_goes_on(llama, name):
    """The next prompt is the first and its answer. Under `completion` the answer was steered when
    it was generated and is not as a part of the prompt; under `prompt` it is the other way round.
    """
    reference, _ = llama
    prompt, cached = tokens(LONG, 4), []
    for turn in range(3):
        request = ask(llama, prompt, name, 0.9 if name else None, new=2 * BLOCK)
        cached.append(request.cached)
        prompt = prompt + request.answers[0]["tokens"] + tokens(9, 50 + turn)
    if name in (None, "linear_all", "vector_all", "full_all"):
        # all that was computed is right for the next turn
        assert cached[1] >= LONG and cached[2] >= cached[1] + 2 * BLOCK


def test_prompts_that_end_elsewhere(llama):
    "A prompt of which another is the beginning: `last` and `suffix` are at other tokens."
    prompt = tokens(LONG, 5)
    for name in NAMES:
        for length in (LONG, LONG - 1, 3 * BLOCK, 3 * BLOCK + 1, LONG, 2 * BLOCK - 1):
            ask(llama, prompt[:length], name)
