"""`vllm serve` with steerings: many clients at once, steerings that are swapped meanwhile, model
names, and requests that are refused."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import clients
import httpx
import openai
import pytest
from served import CHUNK, Request, Server, tokens

NAMES = (
    "vector_all",
    "linear_all",
    "nonlinear_prompt",
    "loreft_last",
    "direft_completion",
    "full_prefix3",
    "linear_suffix2",
    "nonlinear_prefix2_suffix2",
    "mlp_linear",
    "stored_half",
)
BLOCKS = 64  # of the KV cache: four of the longest texts


@pytest.fixture(scope="module")
def server(base):
    "A server whose cache is too small for its requests, so that it preempts some."
    few = ("--num-gpu-blocks-override", BLOCKS)
    with Server(base("llama"), NAMES, arguments=(*few, "--enable-scale-out")) as server:
        yield server


def many(count: int, seed: int) -> list[Request]:
    "Requests of random lengths, steerings and strengths; some are unsteered, some of n = 2."
    dice, found = random.Random(seed), []
    for i in range(count):
        name = dice.choice((None, *NAMES))
        strength = None if name is None else dice.choice((None, 0.0, 0.5, 1.0, -1.0, dice.random()))
        # one in four continues one of three long beginnings, which are in the cache
        beginning = tokens(100, 900 + i % 3) if i % 4 == 0 else []
        prompt = beginning + tokens(dice.randrange(1, 160), seed * 1000 + i)
        several = dice.random() < 0.15
        found.append(
            Request(
                prompt,
                name,
                strength,
                new=dice.randrange(1, 60),
                n=2 if several else 1,
                temperature=0.8 if several else 0.0,
            )
        )
    return found


def by_processes(server: Server, requests: list[Request], folder: Path, count: int = 4) -> None:
    "Send the requests at once from several processes; half of them are streamed."
    running = []
    for i in range(count):
        jobs, answers = folder / f"jobs-{i}.json", folder / f"answers-{i}.json"
        bodies = [one.body(stream=j % 2 == 0) for j, one in enumerate(requests[i::count])]
        jobs.write_text(json.dumps([{"body": body} for body in bodies]))
        command = [sys.executable, clients.__file__, server.address, jobs, answers]
        running.append((subprocess.Popen(command), answers, requests[i::count]))
    for process, answers, own in running:
        assert process.wait(300) == 0
        for request, answer in zip(own, json.loads(answers.read_text()), strict=True):
            assert answer["status"] == 200, answer
            request.answers = answer["choices"]


def test_two_hundred_requests_at_once(server, tmp_path):
    requests = many(200, 1)
    by_processes(server, requests, tmp_path)
    for request in requests:
        request.check(server.base.reference)
    # what the test is about did happen
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    assert sum(len(request.prompt) > CHUNK for request in requests) > 50
    assert len({request.name for request in requests}) == len(NAMES) + 1


def test_a_steering_is_swapped_while_requests_run(server):
    """Long streams begin; then their steering is replaced, and later removed. They go on with the
    one that they began with. `test_swap` does the same step by step, where all still run."""
    own = server.base
    answer = server.post(
        "/v1/load_steering", {"name": "swapped", "source": str(own.sources["linear_all"])}
    )
    assert answer.status_code == 200, answer.text
    old = [Request(tokens(20 + 30 * i, i), "swapped", new=400) for i in range(3)]
    streams = [begin(server, request) for request in old]
    for stream in streams:
        next(stream)  # it runs
    replaced = {"name": "swapped", "source": str(own.sources["full_all"])}
    assert server.post("/v1/load_steering", replaced).status_code == 200
    new = [Request(request.prompt, "swapped", 0.7) for request in old]
    server.run(new)
    assert server.post("/v1/unload_steering", {"name": "swapped"}).status_code == 200
    (refused,) = server.ask([Request(tokens(9, 9), "swapped").body()])
    assert refused["status"] == 400 and "linear_all" in refused["error"]
    for request, stream in zip(old, streams, strict=True):
        request.answers = list(stream)[-1]
        request.check(own.reference, "linear_all")
    for request in new:
        request.check(own.reference, "full_all")
    assert server.post("/v1/unload_steering", {"name": "swapped"}).status_code in (400, 404)


def begin(server: Server, request: Request):
    "The answers of a request so far, chunk by chunk."
    choices: dict[int, dict] = {}
    with httpx.stream(
        "POST", f"{server.address}/v1/completions", json=request.body(stream=True), timeout=300
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    clients.merge(choices, choice)
                yield list(choices.values())


# What a request may say


def test_the_name_of_the_model_names_a_steering(server):
    listed = {row["id"]: row for row in server.get("/v1/models")["data"]}
    assert {"base", *(f"base:{name}" for name in NAMES)} <= set(listed)
    for name in ("linear_all", "direft_completion"):
        plain, by_model = Request(tokens(30, 3), name, 0.5), Request(tokens(30, 3), strength=0.5)
        server.run([plain])
        server.run([by_model], model=f"base:{name}")
        assert by_model.answers[0]["tokens"] == plain.answers[0]["tokens"]
        by_model.check(server.base.reference, name)


def test_several_prompts_in_one_request(server):
    prompts = [tokens(length, length) for length in (5, 90, 31)]
    request = Request(prompts, "nonlinear_prompt", 0.5, n=2, temperature=0.9)
    (answer,) = server.ask([request.body()])
    assert answer["status"] == 200 and len(answer["choices"]) == 6, answer
    for i, choice in enumerate(answer["choices"]):
        found = choice["tokens"], choice["log_probabilities"]
        server.base.reference.check(prompts[i // 2], *found, "nonlinear_prompt", 0.5, greedy=False)


def test_other_routes(server):
    "Each route that generates knows the names of models with a steering, and the fields."
    prompt = " ".join(f"t{n}" for n in tokens(12, 8))
    asked = {"temperature": 0, "max_output_tokens": 8, "input": prompt}
    texts = {}
    for name, strength in (("linear_all", 1.0), ("linear_all", 0.0), (None, None)):
        model = f"base:{name}" if name else "base"
        body = asked | {"model": model, "vllm_xargs": {"strength": strength} if name else None}
        answer = server.post("/v1/responses", body)
        assert answer.status_code == 200, answer.text
        texts[name, strength] = answer.json()["output"][0]["content"][0]["text"]
    assert texts["linear_all", 1.0] != texts[None, None] == texts["linear_all", 0.0]
    assert server.post("/v1/responses", asked | {"model": "base:nothing"}).status_code in (400, 404)
    same = {"prompt": prompt}
    assert (
        server.post("/tokenize", same | {"model": "base:linear_all"}).json()
        == server.post("/tokenize", same | {"model": "base"}).json()
    )


def test_routes_whose_requests_have_other_fields(server):
    "A batch of conversations, and tokens in and out; a score cannot be steered."
    reference, prompt = server.base.reference, tokens(25, 6)
    tokens_out = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    body = {"model": "base:linear_all", "token_ids": prompt, "sampling_params": tokens_out}
    answer = server.post("/inference/v1/generate", body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    rows = [row["logprob"] for row in choice["logprobs"]["content"]]
    reference.check(prompt, choice["token_ids"], rows, "linear_all", 1.0)

    said = [{"role": "user", "content": " ".join(f"t{n}" for n in prompt)}]
    asked = {"max_tokens": 8, "temperature": 0}
    texts = {}
    for model in ("base", "base:linear_all"):
        one = server.post("/v1/chat/completions", {"model": model, "messages": said, **asked})
        body = {"model": model, "messages": [said, said], **asked}
        batch = server.post("/v1/chat/completions/batch", body)
        assert one.status_code == batch.status_code == 200, batch.text
        texts[model] = one.json()["choices"][0]["message"]["content"]
        found = [choice["message"]["content"] for choice in batch.json()["choices"]]
        assert found == [texts[model]] * 2
    assert texts["base"] != texts["base:linear_all"]

    scored = {"query": prompt, "items": [[9], [10]], "label_token_ids": [5, 6]}
    answer = server.post("/generative_scoring", scored | {"model": "base:linear_all"})
    assert answer.status_code == 400 and "no steering" in answer.text


def test_the_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none")
    assert "base:linear_all" in {model.id for model in client.models.list()}
    words = [f"t{n}" for n in tokens(12, 4)]
    asked = {
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
    }
    same = {"ignore_eos": True, "return_token_ids": True}
    extra = {"vllm_xargs": {"steering": "linear_all", "strength": 0.5}}
    answers = [
        client.chat.completions.create(model="base", extra_body=same | extra, **asked),
        client.chat.completions.create(
            model="base:linear_all",
            extra_body=same | {"vllm_xargs": {"strength": 0.5}},
            **asked,
        ),
    ]
    plain = client.chat.completions.create(model="base", extra_body=same, **asked)
    for answer, name in ((answers[0], "linear_all"), (answers[1], "linear_all"), (plain, None)):
        choice = answer.choices[0]
        server.base.reference.check(
            answer.prompt_token_ids,
            choice.token_ids,
            [row.logprob for row in choice.logprobs.content],
            name,
            0.5,
        )
    assert answers[0].choices[0].message.content != plain.choices[0].message.content


BAD = {
    "an unknown name": {"steering": "linear_al"},
    "an empty name": {"steering": ""},
    "a number for a name": {"steering": 3},
    "a list for a name": {"steering": ["linear_all"]},
    "a path for a name": {"steering": "../linear_all"},
    "a very long name": {"steering": "a" * 100_000},
    "NaN": {"steering": "linear_all", "strength": float("nan")},
    "infinity": {"steering": "linear_all", "strength": float("inf")},
    "minus infinity": {"steering": "linear_all", "strength": float("-inf")},
    "text": {"steering": "linear_all", "strength": "inf"},
    "a number as text": {"steering": "linear_all", "strength": "0.5"},
    "a list": {"steering": "linear_all", "strength": [0.5]},
    "a strength alone": {"strength": 0.5},
    "too large": {"steering": "linear_all", "strength": 1e30},
    "too large, an integer": {"steering": "linear_all", "strength": 10**30},
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_refused(server, case):
    body = Request(tokens(10, 1)).body(vllm_xargs=BAD[case])
    bad, streamed, good = server.ask(
        [body, {**body, "stream": True}, Request(tokens(10, 1), "linear_all").body()]
    )
    assert bad["status"] == streamed["status"] == 400, (bad, streamed)
    assert len(bad["error"]) < 3000
    if "name" in case and "list" not in case:
        assert all(name in bad["error"] for name in NAMES)
    assert good["status"] == 200


def test_beam_search_with_a_steering_is_refused(server):
    beam = {"use_beam_search": True, "n": 2, "logprobs": None}
    named = Request(tokens(10, 1), "linear_all").body(**beam)
    without_model = {key: value for key, value in named.items() if key != "model"}
    by_model = Request(tokens(10, 1)).body(**beam, model="base:linear_all")
    for body in (named, without_model, by_model):
        (answer,) = server.ask([body])
        assert answer["status"] == 400 and "beam search" in answer["error"], answer
    (plain,) = server.ask([Request(tokens(10, 1)).body(**beam)])
    assert plain["status"] == 200


def test_an_unknown_model_is_refused(server):
    for model in ("base:linear_al", "base:", "other:linear_all", "linear_all"):
        (answer,) = server.ask([Request(tokens(10, 1)).body(model=model)])
        assert answer["status"] in (400, 404), (model, answer)
    (answer,) = server.ask([Request(tokens(10, 1)).body(model="base:linear_al")])
    assert "linear_all" in answer["error"]


def test_a_model_name_and_another_steering_are_refused(server):
    body = Request(tokens(10, 1), "vector_all").body(model="base:linear_all")
    (answer,) = server.ask([body])
    assert answer["status"] == 400, answer


def test_a_huge_strength_hurts_only_its_own_request(server):
    huge = [Request(tokens(40, i), "linear_all", 9999.0, new=30) for i in range(3)]
    good = [Request(tokens(40 + i, i), name, new=30) for i, name in enumerate(NAMES)]
    answers = server.ask([one.body() for one in huge + good])
    for request, answer in zip(good, answers[len(huge) :], strict=True):
        assert answer["status"] == 200, answer
        request.answers = answer["choices"]
        request.check(server.base.reference)


def test_wrong_updates_are_refused(server, base, tmp_path):
    for body in (
        {"name": "new", "source": str(tmp_path)},
        {"name": "new", "source": str(base("qwen").sources["linear_all"])},
        {"name": "a b", "source": str(server.base.sources["linear_all"])},
        {"name": "new"},
        {},
    ):
        answer = server.post("/v1/load_steering", body)
        assert answer.status_code in (400, 422), (body, answer.text)
    assert server.post("/v1/unload_steering", {"name": "none"}).status_code in (400, 404)
    assert not any("new" in row["id"] for row in server.get("/v1/models")["data"])


def test_clients_that_go_away(server):
    "Half of the requests are given up after their first chunk; the others are right."
    requests = many(30, 2)
    jobs = [{"body": one.body(stream=True)} for one in requests]
    for job in jobs[::2]:
        job["body"] |= {"max_tokens": 200, "n": 1}
        job["abort"] = 1
    answers = clients.asyncio.run(clients.ask_all(server.address, jobs))
    for request, answer in zip(requests[1::2], answers[1::2], strict=True):
        assert answer["status"] == 200, answer
        request.answers = answer["choices"]
        request.check(server.base.reference)
    limit = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < limit:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0


def test_the_server_is_alive_at_the_end(server):
    request = Request(tokens(33, 33), "linear_all")
    server.run([request])
    request.check(server.base.reference)
