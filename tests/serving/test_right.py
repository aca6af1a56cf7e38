"""Every kind at every position on three architectures gives what transformers gives, in one batch
with others, with prompts in several chunks."""

import pytest
import torch
from models import ARCHITECTURES, KINDS, POSITIONS, matrix_of_steerings
from reference import EFFECT, TOLERANCE
from served import CHUNK, EXTRA, Request, engine, run, tokens

from steer_nb.core.errors import SteerError

NAMES = [*matrix_of_steerings(), *EXTRA]
STRENGTHS = (1.0, 0.5, -1.0)


def requests_of(architecture: str) -> list[Request]:
    """For each steering a short request without a strength, and a long one with; between them
    unsteered ones, and some of strength 0.

    The lengths are random, so that texts of several chunks end everywhere in a chunk."""
    found, start = [], len(architecture)
    for i, name in enumerate(NAMES):
        short, long = 1 + (17 * i + start) % 40, CHUNK + (61 * i + start) % (2 * CHUNK)
        found.append(Request(tokens(short, i), name, new=6))
        found.append(Request(tokens(long, i + 100), name, STRENGTHS[i % 3], new=6))
        if i % 3 == 0:
            found.append(Request(tokens(5 + 11 * i % 150, i + 200), new=6))
        if i % 8 == 0:
            found.append(Request(tokens(5 + 11 * i % 150, i + 300), name, 0.0, new=6))
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, base):
    "A reference, and the requests that an engine with all steerings answered in one batch."
    own = base(request.param)
    requests = requests_of(request.param)
    with engine(own, NAMES) as llm:
        run(llm, requests)
    return own.reference, requests


@pytest.mark.parametrize("name", NAMES)
def test_a_steering_gives_what_transformers_gives(served, name):
    reference, requests = served
    own = [one for one in requests if one.name == name and one.strength != 0]
    assert len(own) == 2
    for one in own:
        one.check(reference)
    assert reference.effect(own[0].prompt, own[0].answers[0]["tokens"], name) > EFFECT


def test_unsteered_requests_in_the_same_batch_are_unsteered(served):
    reference, requests = served
    own = [one for one in requests if one.name is None or one.strength == 0]
    assert len(own) > 20
    for one in own:
        answer = one.answers[0]
        reference.check(one.prompt, answer["tokens"], answer["log_probabilities"])


def test_texts_are_read_in_chunks_and_of_one_token(served):
    lengths = {len(one.prompt) for one in served[1] if one.name}
    assert max(lengths) > 2 * CHUNK and min(lengths) < 4


@pytest.fixture(scope="module")
def llama(base):
    "A base, and an engine with some of its steerings, one of which is the default."
    own = base("llama")
    names = [f"linear_{mark}" for mark in marks()] + ["vector_all", "stored_half"]
    with engine(own, names, default="vector_all") as llm:
        yield own.reference, llm


def marks() -> list[str]:
    "The positions, as names of steerings have them."
    return [positions.replace(":", "").replace("+", "_") for positions in POSITIONS]


def test_requests_that_say_nothing_get_the_default(llama):
    reference, llm = llama
    requests = [Request(tokens(20, 1)), Request(tokens(90, 2), strength=-0.5)]
    off = [Request(tokens(20, 1), strength=0.0), Request(tokens(20, 1), "linear_all", 0.0)]
    run(llm, requests + off)
    for one in requests:
        one.check(reference, "vector_all")
    for one in off:
        answer = one.answers[0]
        reference.check(one.prompt, answer["tokens"], answer["log_probabilities"])


def test_beam_search_is_refused_where_there_is_a_default(llama):
    from vllm.sampling_params import BeamSearchParams

    _, llm = llama
    with pytest.raises(SteerError, match="beam search"):
        llm.beam_search([{"prompt_token_ids": tokens(9, 1)}], BeamSearchParams(2, 3))


@pytest.mark.parametrize("name", [f"linear_{mark}" for mark in marks()])
def test_several_sequences_of_a_request(llama, name):
    reference, llm = llama
    request = Request(tokens(70, 5), name, 0.7, n=3, temperature=1.0, new=10)
    run(llm, [request])
    request.check(reference)
    assert len({tuple(one["tokens"]) for one in request.answers}) == 3


@pytest.mark.parametrize("name", [f"linear_{mark}" for mark in marks()])
def test_log_probabilities_of_the_prompt(llama, name):
    from vllm import SamplingParams

    reference, llm = llama
    prompt = tokens(100, 6)
    parameters = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=0, extra_args={"steering": name}
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    rows = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    found = torch.tensor([row[token].logprob for row, token in rows])
    table = reference.log_probabilities(prompt, [], name)
    own = table.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert torch.allclose(found, own, atol=TOLERANCE, rtol=0)


def test_every_kind_is_in_the_matrix():
    found = matrix_of_steerings().values()
    assert {(one["kind"], one["positions"]) for one in found} == {
        (kind, positions) for kind in KINDS for positions in POSITIONS
    }
