"""Steerings that are added, replaced and removed while requests run."""

import pytest
from served import Request, engine, run, sampling, take, tokens
from vllm.exceptions import VLLMValidationError

from steer_nb.core.errors import SteerError

FIRST, SECOND = "linear_all", "nonlinear_all"


@pytest.fixture
def llama(base):
    "A base, and an engine that a failed test does not leave to the next."
    own = base("llama")
    with engine(own, {"a": own.sources[FIRST], "b": own.sources["vector_all"]}) as llm:
        yield own, llm


class Steps:
    "An engine that is run step by step."

    def __init__(self, llm):
        self.engine, self.waiting, self.count = llm.llm_engine, {}, 0

    def start(self, request: Request) -> None:
        "Give a request to the engine."
        self.count += 1
        key = f"step-{self.count}"
        self.waiting[key] = request
        self.engine.add_request(key, {"prompt_token_ids": request.prompt}, sampling(request))

    def steps(self, count: int = 10_000) -> None:
        "Run so many steps, or until all is answered."
        while count and self.engine.has_unfinished_requests():
            count -= 1
            for output in self.engine.step():
                if output.finished:
                    take(self.waiting.pop(output.request_id), output)


def test_running_requests_keep_what_they_began_with(llama):
    from steer_nb.integrations.vllm import add_steering, remove_steering

    own, llm = llama
    reference = own.reference
    steps = Steps(llm)
    old = [Request(tokens(length, length), "a", 0.8, new=40) for length in (9, 120)]
    other = Request(tokens(30, 8), "b", new=40)
    for one in (*old, other):
        steps.start(one)
    steps.steps(8)
    add_steering(llm, "a", str(own.sources[SECOND]))  # under the same name
    new = [Request(one.prompt, "a", 0.8, new=40) for one in old]
    for one in new:
        steps.start(one)
    steps.steps(8)
    remove_steering(llm, "a")
    with pytest.raises(VLLMValidationError, match="there are b"):
        steps.start(Request(tokens(5, 1), "a"))
    steps.waiting.pop(f"step-{steps.count}")
    steps.steps()
    assert not steps.waiting
    for one in old:
        one.check(reference, FIRST)
    for one in new:
        one.check(reference, SECOND)
    other.check(reference, "vector_all")
    add_steering(llm, "a", str(own.sources[FIRST]))
    again = Request(old[1].prompt, "a", 0.8, new=40)
    run(llm, [again])
    again.check(reference, FIRST)


def test_a_steering_of_the_same_name_is_not_taken_from_the_cache(llama):
    from steer_nb.integrations.vllm import add_steering, remove_steering

    own, llm = llama
    prompt = tokens(200, 3)
    for turn in range(3):
        for source in ("full_all", "loreft_all", "direft_prompt"):
            add_steering(llm, "c", str(own.sources[source]))
            for _ in range(2):
                request = Request(prompt, "c")
                run(llm, [request])
                request.check(own.reference, source)
            if turn == 1:
                remove_steering(llm, "c")


def test_many_swaps_leave_nothing_behind(llama):
    "Forty steerings, one after the other, under one name: there is room for the next one."
    from steer_nb.integrations.vllm import add_steering, remove_steering

    own, llm = llama
    for turn in range(40):
        source = (FIRST, SECOND, "wide", "mlp_linear")[turn % 4]
        add_steering(llm, "d", str(own.sources[source]))
        request = Request(tokens(20, turn), "d", new=4)
        run(llm, [request])
        request.check(own.reference, source)
    remove_steering(llm, "d")


def test_what_cannot_be_added_changes_nothing(llama, base, tmp_path):
    from steer_nb.integrations.vllm import add_steering, remove_steering

    own, llm = llama
    for source in (base("qwen").sources["linear_all"], tmp_path / "nowhere"):
        with pytest.raises(SteerError):
            add_steering(llm, "b", str(source))
    with pytest.raises(SteerError, match="nothere"):
        remove_steering(llm, "nothere")
    request = Request(tokens(40, 2), "b")
    run(llm, [request])
    request.check(own.reference, "vector_all")
