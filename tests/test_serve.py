"""`steer_nb serve`: a real server in a process of its own, asked by real clients. Each text is
compared with that of transformers' `generate` for the same steering and strength."""

import json
import random
import re
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import children
import program
import pytest
import torch
from openai import BadRequestError, OpenAI

from steer_nb import SteerError, load_model, load_steering, server_app, steer, tiny_model
from steer_nb.core.steering import save_steerings
from steer_nb.testing.toy_task import word_tokenizer

WORDS = [f"w{number}" for number in range(97)]  # with three special tokens, the tiny vocabulary
TEMPLATE = (
    "{% for message in messages %}w90 {{ message.content }} w91 {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)
STEERINGS = {
    "vector": dict(kind="vector"),
    "linear": dict(kind="linear", rank=2, positions="completion"),
    "nonlinear": dict(kind="nonlinear", rank=2, positions="prompt", bias=True),
    "loreft": dict(kind="loreft", rank=2, positions="last"),
    "direft": dict(kind="direft", rank=2, positions="prefix:2", site="attn"),
    "full": dict(kind="full", positions="suffix:2", layers=[1]),
}
NOISE = {"linear": 0.2, "loreft": 0.2, "direft": 0.2, "full": 0.5}  # else 0.1; added to parameters
SAVED_STRENGTH = {"linear": 2.0}  # the others are saved with strength 1
STRENGTHS = (1, -1, 0.5)
TOKENS = 8
BASE = "base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model, a folder for each steering, and one that holds two."
    folder = tmp_path_factory.mktemp("serve")
    model, tokenizer = tiny_model("llama", num_hidden_layers=3), word_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    model, _ = load_model(folder / BASE)
    for seed, (name, options) in enumerate(STEERINGS.items()):
        steering = steer(model, name=name, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in steering.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += NOISE.get(name, 0.1) * noise
        steering.strength = SAVED_STRENGTH.get(name, 1.0)
        steering.save(folder / "runs" / name)
        if name != "linear":
            steering.remove()
    steer(model, name="other")
    save_steerings(model, folder / "two")
    return folder


class Server:
    "A running `steer_nb serve` and its address."

    def __init__(self, folder, *words):
        options = ("--host", "127.0.0.1", "--port", "0")
        self.child = children.start(run_program, "serve", BASE, *words, *options, cwd=folder)
        started = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
        self.child.wait_for(lambda: started.search(self.child.output("stderr")))
        self.address = started.search(self.child.output("stderr"))[1]
        self.client = OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body) -> tuple[int, dict]:
        "Status and content of an answer, without any client library."
        request = urllib.request.Request(
            self.address + path,
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: str, model=BASE, stream=False, **fields) -> str:
        "The greedy continuation, through the client of OpenAI."
        answer = self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=stream,
            extra_body={"vllm_xargs": fields} if fields else None,
        )
        if stream:
            return "".join(chunk.choices[0].text for chunk in answer)
        return answer.choices[0].text


def run_program(*words):
    from steer_nb.cli.cli import main

    sys.argv = ["steer_nb", *words]
    main()


@pytest.fixture(scope="module")
def start_server(folder):
    "A function: start a server with these options. All are ended after the tests."
    started = []

    def start(*words):
        started.append(Server(folder, *words))
        return started[-1]

    yield start
    for server in started:
        server.child.kill()


@pytest.fixture(scope="module")
def server(start_server):
    "A server of all steerings."
    return start_server(*(f"--steering={name}=runs/{name}" for name in STEERINGS))


@pytest.fixture(scope="module")
def reference(folder):
    "A function: the text that transformers generates with one steering on the model."
    known = {}

    def generated(text: str, name: str | None = None, strength: float = 1, chat=False) -> str:
        if (text, name, strength, chat) not in known:
            model, tokenizer = load_model(folder / BASE)
            if name is not None:
                steering = load_steering(model, folder / "runs" / name)
                steering.strength *= strength
            messages = [{"role": "user", "content": text}]
            if chat:
                text_ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                text_ids = tokenizer(text, return_tensors="pt")
            output = model.generate(**text_ids, max_new_tokens=TOKENS, do_sample=False)
            new = output[0, text_ids["input_ids"].shape[1] :]
            known[text, name, strength, chat] = tokenizer.decode(new, skip_special_tokens=True)
        return known[text, name, strength, chat]

    return generated


def words(seed: int) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choices(WORDS[:90], k=drawn.randint(3, 12)))


# The server multiplies shifts by a strength for each row, `generate` by one number. In float32 the
# logits differ by about 1e-7, which no choice between two tokens here depends on.


@pytest.mark.parametrize("name", STEERINGS)
def test_greedy_text_is_that_of_transformers(server, reference, name):
    prompt = words(2)
    texts = [server.complete(prompt, steering=name, strength=strength) for strength in STRENGTHS]
    assert texts == [reference(prompt, name, strength) for strength in STRENGTHS]
    assert server.complete(prompt, steering=name) == texts[0]
    assert server.complete(prompt, steering=name, strength=0) == reference(prompt)
    assert server.complete(prompt, model=f"{BASE}:{name}") == texts[0]
    assert server.complete(prompt, model=f"{BASE}:{name}", strength=0.5) == texts[2]
    assert len({*texts, reference(prompt)}) == 4, "the comparison needs different texts"


def test_chat_and_streams(server, reference):
    prompt = words(1)
    for name in (None, "vector", "linear", "loreft"):
        fields = {} if name is None else {"steering": name, "strength": -1}
        strength = 1 if name is None else -1
        expected = reference(prompt, name, strength)
        assert server.complete(prompt, stream=True, **fields) == expected
        options = dict(
            model=BASE,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"vllm_xargs": fields},
        )
        expected = reference(prompt, name, strength, chat=True)
        answer = server.client.chat.completions.create(**options)
        assert answer.choices[0].message.content == expected
        assert answer.model == (BASE if name is None else f"{BASE}:{name}")
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in server.client.chat.completions.create(**options, stream=True)
        ]
        assert "".join(pieces) == expected and sum(map(bool, pieces)) == TOKENS


def test_concurrent_clients_get_their_own_texts(server, reference):
    "Ten clients, each with five requests of random prompts, names, strengths and forms."
    clients = []
    for number in range(10):
        drawn = random.Random(number)
        clients.append(
            [
                (
                    words(drawn.randrange(4)),
                    drawn.choice([None, *STEERINGS]),
                    drawn.choice(STRENGTHS),
                    drawn.random() < 0.3,
                )
                for _ in range(5)
            ]
        )
    together = threading.Barrier(len(clients))

    def run(requests):
        together.wait()
        texts = []
        for prompt, name, strength, stream in requests:
            fields = {} if name is None else {"steering": name, "strength": strength}
            texts.append(server.complete(prompt, stream=stream, **fields))
        return texts

    with ThreadPoolExecutor(len(clients)) as pool:
        found = list(pool.map(run, clients))
    expected = [
        [
            reference(prompt, name, 1 if name is None else strength)
            for prompt, name, strength, _ in c
        ]
        for c in clients
    ]
    assert found == expected
    assert len({text for texts in expected for text in texts}) > 25


def test_models_are_listed(server):
    expected = [BASE, *(f"{BASE}:{name}" for name in STEERINGS)]
    assert [model.id for model in server.client.models.list()] == expected
    with urllib.request.urlopen(f"{server.address}/health", timeout=60) as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


ALL = ", ".join(STEERINGS)
WRONG = [
    ({"vllm_xargs": {"steering": "vectr"}}, f"no steering 'vectr': there are {ALL}; did you mean"),
    ({"vllm_xargs": {"steering": ["vector"]}}, f"no steering ['vector']: there are {ALL}"),
    ({"vllm_xargs": {"steering": "vector", "strength": "1"}}, "strength is '1'; it must be a"),
    ({"vllm_xargs": {"steering": "vector", "strength": True}}, "strength is True; it must be a"),
    ({"vllm_xargs": {"steering": "vector", "strength": float("nan")}}, "strength is nan; it must"),
    ({"vllm_xargs": {"steering": "vector", "strength": -float("inf")}}, "strength is -inf; it"),
    ({"vllm_xargs": {"steering": "linear", "strength": 6000}}, "strength is 12000.0; it must"),
    ({"vllm_xargs": {"strength": 1}}, f"strength 1 without a steering: name one; there are {ALL}"),
    ({"vllm_xargs": {"steering": "vector", "strenght": 1}}, "did you mean 'strength'?"),
    ({"vllm_xargs": "vector"}, "they must be an object"),
    ({"model": f"{BASE}:vectr"}, f"there are {BASE}, {BASE}:vector, {BASE}:linear"),
    ({"model": "other"}, f"no model 'other': there are {BASE}, {BASE}:vector"),
    ({"model": 7}, f"no model 7: there are {BASE}, {BASE}:vector"),
    ({"max_tokens": "many"}, "invalid literal"),
    ({"steering": "vector"}, "'steering' belongs in 'vllm_xargs'"),
    ({"strength": 2}, "'strength' belongs in 'vllm_xargs'"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_wrong_requests_are_errors_of_their_own(server, reference, path):
    prompt = words(2)
    good = {"messages": [{"role": "user", "content": prompt}], "prompt": prompt}
    good.pop("prompt" if "chat" in path else "messages")
    for wrong, message in WRONG:
        for stream in (False, True):
            status, answer = server.post(path, {**good, **wrong, "stream": stream})
            assert status == 400 and message in answer["error"]["message"], (wrong, status, answer)
    for body in (b"{", b"[]", b"\xff"):
        assert server.post(path, body)[0] in (400, 422)
    with pytest.raises(BadRequestError, match="no steering 'x': there are"):
        server.complete(prompt, steering="x")
    assert server.complete(prompt, steering="vector") == reference(prompt, "vector")


def test_a_default_and_one_of_two_in_a_folder(start_server, reference):
    server = start_server("--steering", "half=two#linear", "--default", "half")
    prompt = words(3)
    assert server.complete(prompt) == reference(prompt, "linear")
    assert server.complete(prompt, strength=0.5) == reference(prompt, "linear", 0.5)
    assert server.complete(prompt, strength=0) == reference(prompt)
    server.child.signal(signal.SIGINT)
    done = server.child.wait()
    assert done.returncode == 0 and "'half': linear" in done.stdout, done.stderr


def test_ctrl_c_answers_what_was_accepted_and_ends(start_server):
    server = start_server("--steering", "vector=runs/vector")
    stream = server.client.completions.create(
        model=f"{BASE}:vector", prompt=words(4), max_tokens=300, temperature=0, stream=True
    )
    next(stream)
    second = HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    body = json.dumps({"prompt": words(4), "max_tokens": 5})  # waits behind the stream
    second.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert server.post("/v1/completions", {"model": "x"})[0] == 400  # so the second one was read
    server.child.signal(signal.SIGINT)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert json.loads(second.getresponse().read())["usage"]["completion_tokens"] == 5
    done = server.child.wait()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def run_without_fastapi(*words):
    from transformers.utils import import_utils

    sys.modules["fastapi"] = None
    import_utils.is_fastapi_available.cache_clear()  # child processes share what is imported
    import_utils.is_serve_available.cache_clear()
    run_program(*words)


def test_errors_before_the_server_starts(folder):
    "None of them loads a model."
    good = ("serve", BASE, "--steering", "a=runs/vector")
    done = children.run(run_without_fastapi, *good, cwd=folder)
    assert done.returncode == 1 and "pip install steer_nb[serve]" in done.stderr
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            ((*good, "--steering", "a=runs/linear"), "the name 'a' is given twice"),
            ((*good, "--default", "b"), "no steering 'b': there are a"),
            ((*good, "--port", port), f"cannot listen at localhost:{port}"),
            ((*good, "--port", "70000"), "cannot listen at localhost:70000"),
        ):
            code, _, err = program.run(*words)
            assert code == 1 and message in err
    model = tiny_model("llama")
    with pytest.raises(SteerError, match="not steered"):
        server_app(model, None, "x")
    steer(model)
    with pytest.raises(SteerError, match="no steering 'b': there are default"):
        server_app(model, None, "x", default="b")
