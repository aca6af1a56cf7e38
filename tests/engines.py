"""Next-token log-probabilities from llama.cpp, for comparison with ours.

As a module: `next_logprobs(engine, gguf, tokens, …)` runs an engine in a process of its own, with
the Python that STEER_NB_ENGINE_PYTHON names (default: this one), and raises `EngineMissing` if the
engine is not installed there. As a script, in any Python that has llama_cpp or xllamacpp:
`python engines.py request.json answer.json`.

llama_cpp (llama-cpp-python) accepts control vectors, by its low-level API, and LoRA files;
xllamacpp accepts LoRA files only.
"""

import ctypes
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from array import array
from functools import cache
from pathlib import Path

ENGINES = ("llama_cpp", "xllamacpp")


class EngineMissing(RuntimeError):
    "The engine is not installed in the Python that STEER_NB_ENGINE_PYTHON names."


def engine_python() -> str:
    "The Python that runs the engines."
    return os.environ.get("STEER_NB_ENGINE_PYTHON") or sys.executable


@cache
def _installed(python: str, engine: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def has_engine(engine: str) -> bool:
    "Whether the engine is installed there."
    return _installed(engine_python(), engine)


def directions(path) -> tuple[array, int]:
    """The buffer that llama.cpp's `common_control_vector_load` makes of a file, and its width.

    Layer 1 comes first; layers without a direction are zero; directions of the same layer are
    added. A layer below 1, another type than float32, and different widths are errors, as there."""
    from gguf import GGMLQuantizationType, GGUFReader

    rows, width = {}, None
    for tensor in GGUFReader(path).tensors:
        word, _, number = tensor.name.partition(".")
        layer = int(number) if word == "direction" and number.isdigit() else -1
        if layer < 1:
            raise ValueError(f"invalid layer in {tensor.name!r}")
        if tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise ValueError(f"{tensor.name!r} is not a float32 vector")
        width = width or len(tensor.data)
        if len(tensor.data) != width:
            raise ValueError(f"{tensor.name!r} has another width")
        rows[layer] = rows.get(layer, 0) + tensor.data
    flat = array("f", bytes(4 * width * max(rows)))
    for layer, row in rows.items():
        flat[width * (layer - 1) : width * layer] = array("f", row.tolist())
    return flat, width


def next_logprobs(
    engine: str, gguf, tokens: list[int], control_vector=None, lora=None
) -> list[float]:
    """The log-probability of every token of the vocabulary after `tokens`.

    `control_vector` and `lora` are files."""
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}: engines are {', '.join(ENGINES)}")
    if not has_engine(engine):
        raise EngineMissing(
            f"{engine} is not installed in this Python: install it, or set STEER_NB_ENGINE_PYTHON "
            "to a Python that has it"
        )
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "engine": engine,
            "gguf": str(gguf),
            "tokens": [int(token) for token in tokens],
            "lora": str(lora) if lora else None,
        }
        if control_vector:
            flat, request["width"] = directions(control_vector)
            (Path(folder) / "directions").write_bytes(flat.tobytes())
            request["directions"] = str(Path(folder) / "directions")
        (Path(folder) / "request").write_text(json.dumps(request))
        done = subprocess.run(
            [engine_python(), __file__, f"{folder}/request", f"{folder}/answer"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise RuntimeError(f"{engine} failed: {done.stderr[-2000:]}")
        return json.loads((Path(folder) / "answer").read_text())


def _log_softmax(logits) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    return [logit - total for logit in logits]


def ask_llama_cpp(request: dict) -> list[float]:
    "By llama-cpp-python's low-level API."
    api = importlib.import_module("llama_cpp")
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = api.llama_model_load_from_file(request["gguf"].encode(), settings)
    options = api.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
    context = api.llama_init_from_model(model, options)
    if request.get("directions"):
        flat = array("f", Path(request["directions"]).read_bytes())
        data = (ctypes.c_float * len(flat))(*flat)
        status = api.llama_set_adapter_cvec(
            context, data, len(flat), request["width"], 1, api.llama_model_n_layer(model)
        )
        if status:
            raise RuntimeError(f"the control vector was not accepted: {status}")
    if request["lora"]:
        adapter = api.llama_adapter_lora_init(model, request["lora"].encode())
        if not adapter:
            raise RuntimeError("the LoRA was not accepted")
        status = api.llama_set_adapters_lora(
            context, (api.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
        )
        if status:
            raise RuntimeError(f"the LoRA was not set: {status}")
    tokens = (api.llama_token * len(request["tokens"]))(*request["tokens"])
    if api.llama_decode(context, api.llama_batch_get_one(tokens, len(tokens))):
        raise RuntimeError("decoding failed")
    count = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return _log_softmax(api.llama_get_logits_ith(context, -1)[:count])


def ask_xllamacpp(request: dict) -> list[float]:
    "By xllamacpp's server object, which returns the log-probabilities of the n most likely tokens."
    api = importlib.import_module("xllamacpp")
    parameters = api.CommonParams()
    parameters.model.path = request["gguf"]
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.warmup = (
        256,
        1,
        0,
        False,
    )
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    if request.get("directions"):
        raise ValueError("xllamacpp exposes no control vectors")
    if request["lora"]:
        adapter = api.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["lora"], 1.0
        parameters.lora_adapters = [adapter]
    answer = api.Server(parameters).handle_completions(
        {
            "prompt": request["tokens"],
            "n_predict": 1,
            "n_probs": 1_000_000,
            "temperature": 0.0,
            "cache_prompt": False,
        }
    )
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {row["id"]: row["logprob"] for row in listed}
    return [found[token] for token in range(len(found))]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    answer = {"llama_cpp": ask_llama_cpp, "xllamacpp": ask_xllamacpp}[asked["engine"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # without the engines' own shutdown, which can wait for threads
