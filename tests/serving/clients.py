"""A client process: sends requests of completions all at once, and writes down what it gets.

`python clients.py ADDRESS JOBS.json ANSWERS.json`. It imports no torch, so it starts at once. A job
is the body of a request, and optionally `abort`: close the connection after that many chunks."""

import asyncio
import json
import sys
from pathlib import Path

import httpx


def merge(choices: dict[int, dict], sent: dict) -> None:
    "Add a choice of an answer, or of a chunk of one, to the choices so far."
    own = choices.setdefault(sent["index"], {"tokens": [], "log_probabilities": [], "text": ""})
    own["tokens"] += sent.get("token_ids") or []
    own["log_probabilities"] += (sent.get("logprobs") or {}).get("token_logprobs") or []
    own["text"] += sent["text"]


async def ask(client: httpx.AsyncClient, body: dict, abort: int | None = None) -> dict:
    "Send one request. The answer has `status`, and `choices` or `error`."
    choices: dict[int, dict] = {}
    content = json.dumps(body)  # writes NaN and Infinity, as Python's clients do
    headers = {"Content-Type": "application/json"}
    call = client.stream("POST", "/v1/completions", content=content, headers=headers)
    async with call as answer:
        if answer.status_code != 200:
            error = (await answer.aread()).decode()
            return {"status": answer.status_code, "error": error}
        if not body.get("stream"):
            for choice in json.loads(await answer.aread())["choices"]:
                merge(choices, choice)
        else:
            chunks = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return {"status": chunk["error"]["code"], "error": json.dumps(chunk)}
                for choice in chunk["choices"]:
                    merge(choices, choice)
                chunks += 1
                if chunks == abort:
                    return {"status": "aborted"}
    return {"status": 200, "choices": [choices[index] for index in sorted(choices)]}


async def ask_all(address: str, jobs: list[dict]) -> list[dict]:
    "The answers to requests that are sent at once."
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(ask(client, job["body"], job.get("abort")) for job in jobs))


if __name__ == "__main__":
    address, jobs, answers = sys.argv[1:]
    found = asyncio.run(ask_all(address, json.loads(Path(jobs).read_text())))
    Path(answers).write_text(json.dumps(found))
