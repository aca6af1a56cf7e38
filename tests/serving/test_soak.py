"""Ten minutes of clients, good and bad requests, clients that go away and steerings that are
swapped: every answer is right, and the memory of the server does not grow."""

import json
import os
import random
import subprocess
import sys
import time

import clients
import pytest
from served import Request, Server
from test_server import BAD, NAMES, many

MINUTES = float(os.environ.get("STEER_NB_SOAK_MINUTES", "10"))
GROWTH = 40  # MiB that may be added after the first fifth: what allocators keep


@pytest.mark.slow
def test_ten_minutes(base, tmp_path):
    own, dice = base("llama"), random.Random(0)
    few = ("--num-gpu-blocks-override", 64)
    with Server(own, NAMES, arguments=few) as server:
        started, memory, counts = time.monotonic(), [], {"right": 0, "refused": 0, "aborted": 0}
        turn = 0
        while (passed := time.monotonic() - started) < 60 * MINUTES:
            turn += 1
            requests = many(60, 100 + turn)
            jobs = [{"body": one.body(stream=dice.random() < 0.5)} for one in requests]
            kinds = ["good"] * len(jobs)
            for i in dice.sample(range(len(jobs)), 15):
                kinds[i] = dice.choice(("bad", "aborted", "swapped"))
                if kinds[i] == "bad":
                    jobs[i]["body"]["vllm_xargs"] = BAD[dice.choice(list(BAD))]
                if kinds[i] == "aborted":
                    jobs[i] = {"body": {**jobs[i]["body"], "stream": True}, "abort": 1}
                if kinds[i] == "swapped":  # while it is replaced: either of two, or refused
                    jobs[i]["body"]["vllm_xargs"] = {"steering": "swapped"}
            files = tmp_path / "jobs.json", tmp_path / "answers.json"
            files[0].write_text(json.dumps(jobs))
            process = subprocess.Popen([sys.executable, clients.__file__, server.address, *files])
            source = ("linear_all", "full_all", "wide", "mlp_loreft")[turn % 4]
            swap = {"name": "swapped", "source": str(own.sources[source])}
            assert server.post("/v1/load_steering", swap).status_code == 200
            if turn % 3 == 0:
                assert server.post("/v1/unload_steering", {"name": "swapped"}).status_code == 200
            assert process.wait(300) == 0
            for kind, request, answer in zip(
                kinds, requests, json.loads(files[1].read_text()), strict=True
            ):
                check(own, kind, request, answer, counts)
            if passed > 12 * MINUTES:
                memory.append(server.memory())
        assert memory[-1] < memory[0] + GROWTH, memory
        assert min(counts.values()) > 20, counts
        print(f"{counts}, memory from {memory[0]:.0f} to {memory[-1]:.0f} MiB")


def check(own, kind: str, request: Request, answer: dict, counts: dict) -> None:
    "Check an answer of one kind of request."
    if kind == "good":
        assert answer["status"] == 200, answer
        request.answers = answer["choices"]
        request.check(own.reference)
        counts["right"] += 1
    if kind == "bad":
        assert answer["status"] == 400, answer
        counts["refused"] += 1
    if kind == "aborted":
        assert answer["status"] in ("aborted", 200), answer
        counts["aborted"] += 1
    if kind == "swapped":
        assert answer["status"] in (200, 400), answer
