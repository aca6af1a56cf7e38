"""Hostile and damaged files: each raises one of our errors, in bounded time and memory.

The model is unchanged afterwards, to the bit.

The bounds of one load are 10 seconds of processor time and 512 MiB. Measured are some 70 MiB and a
second at most, for a JSON file of 1 MiB (4 MiB where PEFT lists its layers), which becomes twenty
times as large as Python objects. What the files ask for is above the bounds: files of 1 and 10 GB,
tensors of 10⁹ rows."""

import contextlib
import copy
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
from pathlib import Path

import children
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

from steer_nb.core.adapters import AdapterError
from steer_nb.core.config import SteeringConfig
from steer_nb.core.errors import SteeringError
from steer_nb.core.loading import load_steering
from steer_nb.core.sites import SiteError
from steer_nb.core.steering import save_steerings, steer, steerings
from steer_nb.data.models import load_model
from steer_nb.data.wheels import AssetError
from steer_nb.evaluation.choices import EvaluateError
from steer_nb.evaluation.result import Result
from steer_nb.methods.orthogonal import JointError
from steer_nb.methods.registry import apply_method, load_method
from steer_nb.methods.rows import MethodError
from steer_nb.testing.tiny_models import INPUT_IDS, tiny_model
from steer_nb.training.config import TrainError
from steer_nb.training.run import Run

OURS = (AdapterError, JointError, MethodError, SiteError, SteeringError, TrainError)
MODEL = tiny_model("llama").requires_grad_(True)
SEED = int(os.environ.get("STEER_NB_FUZZ_SEED", 0))  # for longer runs by hand
TIMES = int(os.environ.get("STEER_NB_FUZZ_TIMES", 1))


def randomise(model):
    "Everything that is trained away from its start, so that a tensor that was not read shows."
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def valid_folders(folder: Path) -> dict[str, Path]:
    "Valid folders by name: two of steerings, and a method of each form on disk."
    model = copy.deepcopy(MODEL)
    steer(model, SteeringConfig(kind="nonlinear", rank=2, positions="suffix:3", bias=True))
    randomise(model)
    steerings(model)["default"].strength = 0.5
    save_steerings(model, folder / "one")
    steer(model, SteeringConfig(kind="vector", site="heads", heads=[(0, 1), (1, 3)]), name="heads")
    steer(model, SteeringConfig(kind="loreft", rank=2, layers=[1]), name="third")
    randomise(model)
    save_steerings(model, folder / "three")
    for name, options in (
        ("post_block_linear", {"rank": 2}),
        ("lofit", {"heads": [[0, 1], [1, 3]]}),
        ("bitfit", {}),
        ("lora", {"rank": 2}),
        ("joint", {"rank": 2, "weight_rank": 2}),
    ):
        method = apply_method(copy.deepcopy(MODEL), name, **options)
        randomise(method.model)
        method.save(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return valid_folders(tmp_path_factory.mktemp("valid"))


def state(model) -> dict:
    "All that a failed load could leave behind, apart from the numbers."
    return {
        path: (
            type(module),
            module.training,
            set(vars(module)),
            list(module._modules),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            [
                (name, id(parameter), parameter is not None and parameter.requires_grad)
                for name, parameter in module._parameters.items()
            ],
            list(module._buffers),
        )
        for path, module in model.named_modules()
    }


class Unchanged:
    "A model for many loads; each one that fails must leave it bit-identical."

    def __init__(self):
        self.model = copy.deepcopy(MODEL)
        self.state, self.numbers = (
            state(self.model),
            [p.detach().clone() for p in self.model.parameters()],
        )

    def check(self):
        assert state(self.model) == self.state
        assert all(
            torch.equal(p, was)
            for p, was in zip(self.model.parameters(), self.numbers, strict=True)
        )


def load(kind: str, model, folder, **options):
    return (
        load_steering(model, folder, **options)
        if kind == "steering"
        else load_method(model, folder)
    )


def kind_of(name: str) -> str:
    return "steering" if name in ("one", "three") else "method"


# Ways to damage a folder. Each returns a function of the folder.


def change(file, *path, value):
    "A change of one value in a JSON file."

    def spoil(folder):
        content = json.loads((folder / file).read_text())
        where = content
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return spoil


def write(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def sparse(file, size, start=b""):
    "A file that claims to be large and takes no disk."

    def spoil(folder):
        with open(folder / file, "wb") as opened:
            opened.write(start)
            opened.truncate(size)

    return spoil


def replace_with(file, make):
    def spoil(folder):
        (folder / file).unlink()
        make(folder / file)

    return spoil


def tensors(file, edit):
    "A change of the tensors in a file; `edit` gets them by name."

    def spoil(folder):
        content = unpack((folder / file).read_bytes())
        edit(content, min(content, key=lambda name: (content[name].ndim, name)))  # a small one
        (folder / file).write_bytes(pack(content))

    return spoil


def put(value):
    return lambda content, name: content.update({name: value(content[name])})


def file_of(header, data=b"", length=None) -> bytes:
    "A safetensors file by hand."
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header(file, edit):
    "A change of the header alone."

    def spoil(folder):
        data = (folder / file).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + size])
        edit(content)
        (folder / file).write_bytes(file_of(content, data[8 + size :]))

    return spoil


def all_at(key, value):
    return lambda content: [
        entry.update({key: value}) for name, entry in content.items() if name != "__metadata__"
    ]


def first(content):
    return content[min(name for name in content if name != "__metadata__")]


JSON_FILES = {
    "one": ["steering_config.json"],
    "lora": ["method.json", "adapter_config.json"],
    "joint": ["method.json", "adapter_config.json", "steering_config.json"],
}
TENSOR_FILES = {
    "one": ["steering.safetensors"],
    "three": ["steering.safetensors"],
    "bitfit": ["trainable.safetensors"],
    "lora": ["adapter_model.safetensors"],
    "joint": ["adapter_model.safetensors", "steering.safetensors"],
}
BAD_JSON = {
    "deep lists": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep after a string": b'{"\\"[": ' + b"[" * 100_000,
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "not UTF-8": b'{"schema": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nul bytes": bytes(1000),
    "million lists": b"[" + b"[]," * 300_000 + b"[]]",
    "million quotes": b'"\\"' * 300_000,
    "open string": b'"' + b"\\" * 900_000,
    "long number": b"1" * 1_000_000,
    "long fraction": b"0." + b"1" * 1_000_000,
    "keys": b"{" + b",".join(b'"%d":0' % number for number in range(70_000)) + b"}",
}
BAD_TENSORS = {
    "float16": put(lambda t: t.half()),
    "int32": put(lambda t: t.int()),
    "bool": put(lambda t: t.bool()),
    "complex": put(lambda t: t.to(torch.complex64)),
    "float8": put(lambda t: t.to(torch.float8_e4m3fn)),
    "bfloat16": put(lambda t: t.bfloat16()),
    "nan": put(lambda t: t * math.nan),
    "inf": put(lambda t: t + math.inf),
    "inf after rounding": put(lambda t: t.double() + 1e300),
    "row more": put(lambda t: torch.cat([t, t[:1]])),
    "flat": put(lambda t: t[None]),
    "empty": put(lambda t: t[:0]),
    "scalar": put(lambda t: t.flatten()[0]),
    "missing": lambda content, name: content.pop(name),
    "all missing": lambda content, name: content.clear(),
    "extra": lambda content, name: content.update(extra=torch.zeros(1)),
    "huge extra": lambda content, name: content.update({f"{name}.": torch.zeros(1 << 22)}),
    "renamed": lambda content, name: content.update({f"../{name}": content.pop(name)}),
    "absolute": lambda content, name: content.update({f"/etc/{name}": content[name].clone()}),
    "nul": lambda content, name: content.update({f"{name}\0": content[name].clone()}),
}


def bad_files():
    "Damage to any file: (name of the folder, name of the case, function that damages the folder)."
    for name, files in JSON_FILES.items():
        for file in files:
            for case, data in BAD_JSON.items():
                yield name, f"{file} {case}", write(file, data)
            yield name, f"{file} 1 GB", sparse(file, 1 << 30)
            yield name, f"{file} 1 GB that begins well", sparse(file, 1 << 30, b'{"schema": 3, ')
    for name, files in TENSOR_FILES.items():
        for file in files:
            for case, edit in BAD_TENSORS.items():
                yield name, f"{file} {case}", tensors(file, edit)
            for part in range(8):
                yield (
                    name,
                    f"{file} cut at {part}/8",
                    lambda folder, file=file, part=part: (folder / file).write_bytes(
                        (data := (folder / file).read_bytes())[: len(data) * part // 8]
                    ),
                )
            for length in (2**63, 2**64 - 1, 10**9, 10**8, 1 << 26):
                yield (
                    name,
                    f"{file} header of {length}",
                    sparse(file, 1 << 30, file_of(b"{}", length=length)),
                )
            yield name, f"{file} 10 GB", sparse(file, 10 << 30)
            yield (
                name,
                f"{file} 10 GB tensor",
                sparse(
                    file,
                    8 + 78 + (10 << 30),
                    file_of(
                        json.dumps(
                            {
                                "a": {
                                    "dtype": "U8",
                                    "shape": [10 << 30],
                                    "data_offsets": [0, 10 << 30],
                                }
                            }
                        )
                        .ljust(78)
                        .encode()
                    ),
                ),
            )
            yield (
                name,
                f"{file} 100,000 tensors",
                write(
                    file,
                    file_of(
                        {
                            str(number): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                            for number in range(100_000)
                        }
                    ),
                ),
            )
            yield name, f"{file} deep header", write(file, file_of(b'{"a":' * 100_000))
            for case, edit in {
                "overlap": lambda content: [
                    entry.update(data_offsets=first(content)["data_offsets"])
                    for key, entry in content.items()
                    if key != "__metadata__"
                ],
                "gap": lambda content: first(content).update(
                    data_offsets=[end + 4 for end in first(content)["data_offsets"]]
                ),
                "negative shape": lambda content: first(content).update(shape=[-1]),
                "overflowing shape": lambda content: first(content).update(shape=[2**62, 2**62]),
                "backwards": lambda content: first(content)["data_offsets"].reverse(),
                "odd dtype": all_at("dtype", "PICKLE"),
            }.items():
                yield name, f"{file} {case}", header(file, edit)
    for name, files in (
        (name, [*JSON_FILES.get(name, []), *TENSOR_FILES.get(name, [])])
        for name in ("one", "lora", "joint", "bitfit")
    ):
        for file in files:
            yield name, f"{file} missing", lambda folder, file=file: (folder / file).unlink()
            yield name, f"{file} a pipe", replace_with(file, os.mkfifo)
            yield name, f"{file} a folder", replace_with(file, os.mkdir)
            for target in (
                "/etc/passwd",
                "/dev/zero",
                "/dev/urandom",
                "/proc/self/environ",
                "/",
                "..",
                "nowhere",
                file,
            ):
                yield (
                    name,
                    f"{file} a link to {target}",
                    replace_with(file, lambda path, target=target: path.symlink_to(target)),
                )
            yield (
                name,
                f"{file} a link to the same outside",
                lambda folder, file=file: (
                    (folder / file).rename(folder.parent / f"{folder.name} outside"),
                    (folder / file).symlink_to(folder.parent / f"{folder.name} outside"),
                ),
            )


def bad_values():
    "Wrong values in otherwise valid files, likewise."
    where = ("steering_config.json", "steerings", "default")
    for field, values in {
        "kind": ["lineer", [], None, "a" * 900_000, {"a": 1}],
        "site": ["../block", 3],
        "rank": [0, -1, 10**9, 33, True, 2.0, "2", None],
        "layers": [
            [],
            [0, 0],
            [-1],
            [2],
            [True],
            [0.0],
            [[0]],
            [{}],
            {},
            "some",
            list(range(100_000)),
            [10**18],
            [0] * 300_000,
        ],
        "positions": ["", "prefix:0", "prefix:9999999999", "suffix:3\n", [], "last " * 100_000],
        "activation": ["exec", 1],
        "bias": [1, "yes"],
        "seed": [-1, 2**63 - 1 + 0.5, True, "0"],
        "init": ["x", None, ["gradient"]],
        "heads": [[], [[0, 0]], "all"],
        "strength": [math.inf, math.nan, 1e300, 10_001, True, "1", None, [1]],
        "another": [1],
    }.items():
        for value in values:
            yield "one", f"{field} {str(value)[:24]}", change(*where, field, value=value)
    yield (
        "one",
        "strength 1e400",
        lambda folder: (folder / where[0]).write_text(
            (folder / where[0]).read_text().replace('"strength": 0.5', '"strength": 1e400')
        ),
    )
    yield (
        "one",
        "the same key twice",
        lambda folder: (folder / where[0]).write_text(
            (folder / where[0])
            .read_text()
            .replace('"strength": 0.5', '"strength": 0.5, "strength": 0.5')
        ),
    )
    for name in (
        "../default",
        "..",
        ".",
        "",
        "a.b",
        "a/b",
        "/etc/passwd",
        "a\0",
        "default\n",
        "x" * 65,
        "ä",
        "__class__.x",
    ):
        yield "one", f"named {name!r}"[:40], lambda folder, name=name: rename(folder, name)
        yield (
            "three",
            f"another named {name!r}"[:40],
            lambda folder, name=name: rename(folder, name, "third"),
        )
    yield "one", "half a character for a name", lambda folder: rename(folder, "\ud800")
    for field, values in {
        "schema": [True, 0, -1, 6, 1.0, "5", None],
        "steerings": [{}, [], None, 3],
        "base": [None, [], {}],
    }.items():
        for value in values:
            yield "one", f"{field} {value}", change("steering_config.json", field, value=value)
    for field, values in {
        "name": [1, None],
        "hidden_size": [True, 33, "32"],
        "vocabulary": [True, 101, 0, -100, "100", None],
        "note": [1, None],
        "layers": [True, 2.0],
        "model_type": ["mamba", None],
        "fingerprint": [None, [], {}, {"embedding": 1}],
    }.items():
        for value in values:
            yield (
                "one",
                f"base {field} {value}",
                change("steering_config.json", "base", field, value=value),
            )
    for value in ([True] * 16, [[1.0]] * 16, ["1"] * 16, {}, 16, [1e308] * 15):
        yield (
            "one",
            f"fingerprint {str(value)[:20]}",
            change("steering_config.json", "base", "fingerprint", "embedding", value=value),
        )

    for field, values in {
        "schema": [True, 1.0, 2, None],
        "name": ["../lora", "", "full", "joint", "a" * 900_000, ["lora"], None],
        "base": [None, {}, {"name": 1}],
        "options": [
            None,
            [],
            {"rank": 2, "model": 1},
            {"name": "full"},
            {"self": 1},
            {"__class__": 1},
        ],
    }.items():
        for value in values:
            yield "lora", f"{field} {str(value)[:24]}", change("method.json", field, value=value)
    for field, values in {
        "rank": [10**9, 2**62, -1, 0, 32, 33, True, 2.0, "2", [2], None],
        "alpha": [1e300, 1e5, True, "1", [], -math.inf],
        "seed": ["x", [], {}],
        "targets": [
            [],
            "",
            5,
            [5],
            {"a": 1},
            [["q_proj"]],
            ["nothing"],
            ".*",
            "a" * 900_000,
            ["q_proj"] * 80_000,
            [f"{number}" for number in range(80_000)],
            ["embed_tokens"],
            ["model.layers.0"],
        ],
    }.items():
        for value in values:
            yield (
                "lora",
                f"option {field} {str(value)[:24]}",
                change("method.json", "options", field, value=value),
            )
    for field, value in (
        ("peft_type", "P_TUNING"),
        ("peft_type", None),
        ("r", 10**9),
        ("r", [2]),
        ("lora_alpha", 1e300),
        ("use_dora", True),
    ):
        yield "lora", f"adapter {field} {value}", change("adapter_config.json", field, value=value)
    yield (
        "lora",
        "embeddings of rank 10⁹",
        lambda folder: [
            change("method.json", "options", field, value=value)(folder)
            for field, value in (("targets", ["embed_tokens"]), ("rank", 10**9))
        ],
    )
    yield (
        "lora",
        "rank 10⁹ everywhere, and a sparse file",
        lambda folder: [
            change("method.json", "options", "rank", value=10**9)(folder),
            change("adapter_config.json", "r", value=10**9)(folder),
            sparse("adapter_model.safetensors", 1 << 40)(folder),
        ],
    )
    for field, values in {
        "rank": [10**9, 0, 33],
        "weight_rank": [10**9, True],
        "weights": ["full", "dora", "x", []],
        "weight_layers": [[0] * 200_000, 3, ["0"]],
        "penalty": [math.nan, -1, "x"],
        "every": [0, 1.5],
        "weights_window": [[1, 0], [0, 2], "ab", [0, "1"], [0] * 100_000],
        "kind": ["full", None],
        "project": [None, "x" * 900_000],
        "weights_schedule": ["x", {}],
    }.items():
        for value in values:
            yield (
                "joint",
                f"option {field} {str(value)[:24]}",
                change("method.json", "options", field, value=value),
            )
    for field, values in {
        "n_heads": [10**9, 0, -1, True, "2", [1], 1e9],
        "l1": [-1, math.nan, "x"],
        "heads": [
            [[0, 0]] * 100_000,
            [[0, 9]],
            [[10**9, 0]],
            "all",
            5,
            [],
            [[True, 0]],
            [[0]],
            {"0": 1},
        ],
    }.items():
        for value in values:
            yield (
                "lofit",
                f"option {field} {str(value)[:24]}",
                change("method.json", "options", field, value=value),
            )
    yield "joint", "another steering", change("steering_config.json", "steerings", value={})
    for name in ("one", "lora", "joint", "bitfit"):
        yield name, "an empty folder", lambda folder: [path.unlink() for path in folder.iterdir()]


def rename(folder, name, old="default"):
    "Give a steering another name, in both files."
    config, weights = folder / "steering_config.json", folder / "steering.safetensors"
    content, stored = json.loads(config.read_text()), unpack(weights.read_bytes())
    content["steerings"] = {
        name if key == old else key: value for key, value in content["steerings"].items()
    }
    config.write_text(json.dumps(content))
    renamed = {
        f"{name}.{key.split('.', 1)[1]}" if key.startswith(f"{old}.") else key: value
        for key, value in stored.items()
    }
    with contextlib.suppress(Exception):  # a name that safetensors cannot write
        weights.write_bytes(pack(renamed))


# All of them are loaded in one child process, whose memory is limited.


def memory() -> dict[str, float]:
    "This process's memory in MiB, by the names of Linux."
    with open("/proc/self/status") as file:
        return {
            line.split(":")[0]: int(line.split()[1]) / 1024
            for line in file
            if line.startswith("Vm")
        }


def load_case(name: str, model, folder: str):
    stored = {"stored": "default"} if name == "three" else {}
    return load(kind_of(name), model, folder, **stored)


def load_all(path: str) -> None:
    "Load every folder listed in a file; print the outcome of each, and what it took."
    cases = json.loads(Path(path).read_text())
    for name, good in cases["good"]:  # imports and allocates what is needed once
        load_case(name, Unchanged().model, good)
    unchanged = Unchanged()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (512 << 20), resource.RLIM_INFINITY))

    def stop(*_):
        raise TimeoutError("a minute")  # it waits for something that does not come

    signal.signal(signal.SIGALRM, stop)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory()["VmRSS"]
    for number, (name, folder) in enumerate(cases["bad"]):
        start, outcome, message = time.process_time(), "loaded", ""
        signal.alarm(60)
        try:
            load_case(name, unchanged.model, folder)
        except OURS as error:
            outcome, message = "refused", str(error)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        signal.alarm(0)
        seconds = time.process_time() - start
        if outcome != "loaded":
            try:
                unchanged.check()
            except AssertionError:
                outcome = f"changed the model, and {outcome}"
        if outcome != "refused":
            unchanged = Unchanged()
        peak = memory()["VmHWM"] - before
        print(json.dumps([number, outcome, seconds, peak, message[:1000]]), flush=True)


WHY = {  # part of some messages: otherwise a later check would hide that an earlier one is gone
    " 1 GB": "bytes, and at most",
    " 10 GB": "bytes, and at most",
    " header of ": "at most",
    "100,000 tensors": "at most",
    "a pipe": "not a regular file",
    "a folder": "not a regular file",
    "a link to /": "a link to a place outside",
    "the same outside": "a link to a place outside",
    "deep lists": "levels deep",
    "deep and closed": "levels deep",
    "deep objects": "levels deep",
    "deep after": "levels deep",
    "same key twice": "a key is there twice",
    "named '": "whose name is not 1 to 64",
    "option rank 32": "and the files have",
    "option rank 1000000000": "the largest rank",
    "rank 10⁹": "the largest rank",
    "option targets ['q_proj', 'q_proj'": "entries",
    "strength 1e400": "not a finite number",
    "inf after rounding": "not finite",
    "long number": "64 bits",
}
ELSE = {
    "one": (),
    "three": ("not a whole safetensors file",),
}  # with other steerings in it a file may be large; of a method the sizes of all files come first
FEW = {  # with one reader of JSON and one of tensors, these are enough for the other folders
    "deep lists",
    "not UTF-8",
    "a list",
    "1 GB",
    "bfloat16",
    "nan",
    "row more",
    "missing",
    "extra",
    "cut at 4/8",
    "header of 1000000000",
    "10 GB",
    "overlap",
    "a pipe",
    "a link to /etc/passwd",
    "a link to the same outside",
}


def hostile_cases(every: bool):
    "All cases, or all for one folder and a few for the others."
    for name, case, spoil in bad_files():
        if every or name == "one" or case.split(" ", 1)[1] in FEW:
            yield name, case, spoil
    yield from bad_values()


def lacks_reason(name: str, case: str, message: str) -> bool:
    "Whether the message does not name the reason that `WHY` expects."
    others = ELSE.get(name, ("and the files have",))
    return any(
        part in case and not any(right in message for right in (why, *others))
        for part, why in WHY.items()
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by Linux here")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hostile_folders_are_refused_within_bounds(valid, tmp_path, every):
    cases = []
    for number, (name, case, spoil) in enumerate(hostile_cases(every)):
        folder = tmp_path / str(number)
        shutil.copytree(valid[name], folder)
        spoil(folder)
        cases.append((name, case, str(folder)))
    good = [(name, str(path)) for name, path in valid.items()]
    bad = [(name, folder) for name, _, folder in cases]
    (tmp_path / "cases.json").write_text(json.dumps({"good": good, "bad": bad}))
    done = children.run(load_all, str(tmp_path / "cases.json"), timeout=900)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    wrong = [
        (*cases[number][:2], outcome, message)
        for number, outcome, _, _, message in found
        if outcome != "refused" or lacks_reason(*cases[number][:2], message)
    ]
    assert not wrong, wrong
    assert len(found) == len(cases) and done.returncode == 0, done.stderr[-2000:]
    slowest, peak = max(found, key=lambda one: one[2]), found[-1][3]
    name = " ".join(cases[slowest[0]][:2])
    print(f"{len(found)} folders: {slowest[2]:.1f} s at most ({name}), {peak:.0f} MiB at the peak")
    assert slowest[2] < 10 and peak < 512


# The same kinds of file elsewhere


def test_records_are_read_by_the_same_reader(tmp_path):
    path = tmp_path / "record.json"
    for data in BAD_JSON.values():
        path.write_bytes(data)
        for cls, error in ((Run, TrainError), (Result, EvaluateError)):
            with pytest.raises(error):
                cls.load(path)


def test_records_that_are_pipes_or_links_or_large(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    sparse("large", 1 << 40)(tmp_path)
    for cls, error in ((Run, TrainError), (Result, EvaluateError)):
        for name in ("pipe", "link", "large"):
            with pytest.raises(error):
                cls.load(tmp_path / name)


# Links


@pytest.mark.parametrize("name", ["one", "joint"])
def test_links_inside_the_folder_and_in_the_cache_of_the_hub_are_followed(
    valid, tmp_path, monkeypatch, name
):
    inside = tmp_path / "inside"
    shutil.copytree(valid[name], inside / "blobs")
    for path in list((inside / "blobs").iterdir()):
        (inside / path.name).symlink_to(Path("blobs") / path.name)
    load(kind_of(name), Unchanged().model, inside)
    cache = tmp_path / "hub"  # as the Hub's client makes it
    shutil.copytree(valid[name], cache / "models--a--b" / "blobs")
    snapshot = cache / "models--a--b" / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    for path in list((cache / "models--a--b" / "blobs").iterdir()):
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    unchanged = Unchanged()
    with pytest.raises(OURS, match="a link to a place outside"):
        load(kind_of(name), unchanged.model, snapshot)
    unchanged.check()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    load(kind_of(name), unchanged.model, snapshot)


# Pickles


class Bomb:
    "A file appears where this is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def bombs(folder, went_off, *names):
    "Pickles in both of torch's formats and in Python's own, under these names."
    for number, name in enumerate(names):
        if number % 3 == 0:
            torch.save({"a": Bomb(went_off)}, folder / name)
        elif number % 3 == 1:
            torch.save({"a": Bomb(went_off)}, folder / name, _use_new_zipfile_serialization=False)
        else:
            (folder / name).write_bytes(pickle.dumps(Bomb(went_off)))


PICKLES = (
    "adapter_model.bin",
    "pytorch_model.bin",
    "training_args.bin",
    "adapter_model.pt",
    "steering.bin",
    "method.pkl",
    "optimizer.pt",
    "rng_state.pth",
    "trainable.bin",
)


def test_the_bomb_works(tmp_path):
    "Unpickling does run code: the next tests would notice it."
    for number in range(3):
        bombs(tmp_path, tmp_path / "ran", *["unused"] * number, "bomb")
        if number < 2:
            torch.load(tmp_path / "bomb", weights_only=False)
        else:
            pickle.loads((tmp_path / "bomb").read_bytes())
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("name", ["one", "bitfit", "lora", "joint"])
def test_nothing_is_unpickled(valid, tmp_path, name):
    "Pickles beside the files, in place of them, and under their names."
    beside, went_off = tmp_path / "beside", tmp_path / "ran"
    shutil.copytree(valid[name], beside)
    bombs(beside, went_off, *PICKLES)
    load(kind_of(name), Unchanged().model, beside)
    for file in [path.name for path in valid[name].iterdir()]:
        for number in range(3):
            folder, unchanged = tmp_path / f"{file}{number}", Unchanged()
            shutil.copytree(valid[name], folder)
            (folder / file).unlink()
            if number < 2:
                bombs(
                    folder, went_off, *PICKLES
                )  # a missing file is not looked for under another name
            if number:
                bombs(folder, went_off, *["unused"] * (number - 1), file)
            with pytest.raises(OURS):
                load(kind_of(name), unchanged.model, folder)
            unchanged.check()
    assert not went_off.exists()


def test_peft_reads_and_fetches_nothing(valid, tmp_path, monkeypatch):
    "The stored configuration is compared, and PEFT never reads it, whatever it names."
    import socket

    from peft import PeftConfig

    def never(*args, **kwargs):
        raise AssertionError(f"called with {args}")

    folder = tmp_path / "lora"
    shutil.copytree(valid["lora"], folder)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for field, value in (
        ("base_model_name_or_path", "evil/model"),
        ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
        ("modules_to_save", ["evil"]),
        ("layer_replication", [[0, 10**9]]),
        ("lora_dropout", 7),
        ("init_lora_weights", "pissa"),
        ("target_modules", "(a+)+$"),
        ("rank_pattern", {"(a+)+$": 10**9}),
        ("megatron_core", "evil"),
        ("megatron_config", {"a": 1}),
        ("revision", "evil"),
        ("corda_config", {}),
        ("loftq_config", {"loftq_bits": 4}),
        ("runtime_config", {}),
        ("eva_config", {}),
        ("custom_modules", {"a": "evil"}),
    ):
        change("adapter_config.json", field, value=value)(folder)
    monkeypatch.syspath_prepend(tmp_path)
    for owner, name in (
        (PeftConfig, "from_pretrained"),
        (PeftConfig, "from_json_file"),
        (socket, "create_connection"),
        (torch, "load"),
        (pickle, "loads"),
        (pickle, "load"),
    ):
        monkeypatch.setattr(owner, name, never)
    before = set(sys.modules)
    loaded, plain = (
        load_method(Unchanged().model, folder),
        load_method(Unchanged().model, valid["lora"]),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.parameters(), plain.model.parameters(), strict=True)
    )
    assert (
        not {name for name in set(sys.modules) - before if "evil" in name}
        and not (tmp_path / "ran").exists()
    )


# Trust: `load_model`


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A model folder that loads."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("whole") / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>")),
        unk_token="<unk>",
    ).save_pretrained(folder)
    copy.deepcopy(MODEL).save_pretrained(folder)
    load_model(folder, device="cpu")
    return folder


def edited(name, **fields):
    def spoil(folder):
        (folder / name).write_text(
            json.dumps(
                {
                    **(json.loads((folder / name).read_text()) if (folder / name).exists() else {}),
                    **fields,
                }
            )
        )

    return spoil


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def real_pickle(folder):
    "Valid pickled weights: an error as well, since looking inside would run them."
    without_weights(folder)
    torch.save(MODEL.state_dict(), folder / "pytorch_model.bin")


MODELS = {
    "only a pickle": (without_weights, "nothing is unpickled here"),
    "a right pickle": (real_pickle, "nothing is unpickled here"),
    "shards that are pickles": (
        lambda folder: (
            without_weights(folder),
            edited(
                "model.safetensors.index.json",
                metadata={},
                weight_map={name: "pytorch_model.bin" for name in MODEL.state_dict()},
            )(folder),
        ),
        "is no safetensors file next to it",
    ),
    "shards elsewhere": (
        lambda folder: (
            without_weights(folder),
            edited(
                "model.safetensors.index.json",
                metadata={},
                weight_map={name: "../model.safetensors" for name in MODEL.state_dict()},
            )(folder),
        ),
        "is no safetensors file next to it",
    ),
    "an index of pickles": (
        lambda folder: (
            without_weights(folder),
            edited(
                "pytorch_model.bin.index.json",
                metadata={},
                weight_map={name: "pytorch_model.bin" for name in MODEL.state_dict()},
            )(folder),
        ),
        "nothing is unpickled here",
    ),
    "a named pickle": (
        edited("config.json", transformers_weights="adapter_model.bin"),
        "is no safetensors file next to it",
    ),
    "a named file elsewhere": (
        edited("config.json", transformers_weights="../model/model.safetensors"),
        "is no safetensors file next to it",
    ),
    "an adapter": (
        edited("adapter_config.json", peft_type="LORA", base_model_name_or_path="evil/model"),
        "has an adapter of PEFT",
    ),
    "a kernel": (edited("config.json", attn_implementation="evil/kernel"), "the code of others"),
    "code for an unknown type": (
        edited(
            "config.json",
            model_type="strange",
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        ),
        "",
    ),
    "code for a tokenizer": (
        lambda folder: (
            (folder / "tokenizer.json").unlink(),
            edited(
                "tokenizer_config.json",
                tokenizer_class="Strange",
                auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
            )(folder),
        ),
        "",
    ),
    "a deep config": (write("config.json", b"[" * 100_000), ""),
    "a deep tokenizer": (write("tokenizer_config.json", b"[" * 100_000), ""),
    "a deep index": (
        lambda folder: (
            without_weights(folder),
            write("model.safetensors.index.json", b"[" * 100_000)(folder),
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_is_not_trusted(whole, tmp_path, case):
    spoil, message = MODELS[case]
    shutil.copytree(whole, tmp_path / "model")
    bombs(
        tmp_path / "model",
        tmp_path / "ran",
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
    )
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    spoil(tmp_path / "model")
    with pytest.raises(AssetError, match=message):
        load_model(tmp_path / "model", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_for_a_known_type_is_passed_over(whole, tmp_path):
    "The folder loads with the class of transformers; its code and its pickles are not run."
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    bombs(folder, tmp_path / "ran", "pytorch_model.bin", "training_args.bin")
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edited(
        "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )(folder)
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})(folder)
    model, _ = load_model(folder, device="cpu")
    assert (
        type(model) is type(MODEL)
        and torch.equal(model.lm_head.weight, MODEL.lm_head.weight)
        and not (tmp_path / "ran").exists()
    )


# At random

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "all",
            "lora",
            "joint",
            "full",
            "linear",
            "vector",
            "heads",
            "block",
            "q_proj",
            0,
            1,
            2,
            -1,
            0.5,
            10**9,
            1e308,
            "../x",
            "default",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.bool,
)


def damaged_bytes(draw, data: bytes) -> bytes:
    "Bytes flipped, cut off, taken out or put in, more often at the front, where the header is."
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(data), 200)) | st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "remove", "insert", "repeat"]))
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        if kind == "set" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        if kind == "cut":
            del data[place:]
        if kind == "remove":
            del data[place : place + draw(st.integers(1, 64))]
        if kind == "insert":
            data[place:place] = draw(
                st.binary(max_size=32)
                | st.sampled_from(
                    [b"[", b"{", b'"', b"\\", b"NaN", b"1e999", b"\xff", b"0" * 30, b',"rank":3']
                )
            )
        if kind == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 200))]
    return bytes(data)


def places(content, path=()):
    "Where there is a value in JSON, by path."
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield path + (key,)
        if isinstance(value, (dict, list)):
            yield from places(value, path + (key,))


def damaged_json(draw, data: bytes) -> bytes:
    "Values replaced, keys taken out, put in or renamed."
    content = json.loads(data)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(content))
        if not found:
            break
        path = draw(st.sampled_from(found))
        where = content
        for key in path[:-1]:
            where = where[key]
        kind = draw(st.sampled_from(["replace", "replace", "nearby", "nearby", "delete", "add"]))
        if kind == "replace":
            where[path[-1]] = draw(JSON)
        if kind == "nearby":
            value = where[path[-1]]
            if isinstance(value, (int, float)):
                where[path[-1]] = draw(
                    st.sampled_from(
                        [
                            value + 1,
                            value - 1,
                            -value,
                            value * 2,
                            float(value),
                            str(value),
                            bool(value),
                            [value],
                        ]
                    )
                )
            elif isinstance(value, str):
                where[path[-1]] = draw(
                    st.sampled_from(
                        [
                            value + "x",
                            value[:-1],
                            value.upper(),
                            [value],
                            "../" + value,
                            *[
                                w
                                for w in (
                                    "vector",
                                    "full",
                                    "mlp",
                                    "attn",
                                    "last",
                                    "all",
                                    "gelu",
                                    "loreft",
                                )
                            ],
                        ]
                    )
                )
            elif isinstance(value, list) and value:
                where[path[-1]] = draw(
                    st.sampled_from(
                        [
                            value[:-1],
                            value + value[:1],
                            value[::-1],
                            [value],
                            dict(enumerate(value)),
                        ]
                    )
                )
            else:
                where[path[-1]] = draw(st.sampled_from([None, True, False, [], {}, 0]))
        if kind == "delete":
            del where[path[-1]]
        if kind == "add" and isinstance(where, dict):
            where[
                draw(
                    st.text(max_size=6)
                    | st.sampled_from(["rank", "name", "model", "schema", "bias"])
                )
            ] = draw(JSON)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def damaged_tensors(draw, data: bytes) -> bytes:
    "Tensors renamed, reshaped, in another dtype, with other numbers, taken out or put in."
    content = unpack(data)
    for _ in range(draw(st.integers(1, 2))):
        if not content:
            break
        name = draw(st.sampled_from(sorted(content)))
        tensor = content[name]
        kind = draw(
            st.sampled_from(
                ["rename", "reshape", "dtype", "value", "value", "delete", "add", "swap"]
            )
        )
        if kind == "rename":
            content[
                draw(
                    st.sampled_from(
                        [
                            f"../{name}",
                            f"{name}.x",
                            name.upper(),
                            name[1:],
                            "default.0.up",
                            "third.0.up",
                            "x",
                        ]
                    )
                    | st.text(st.characters(codec="utf-8"), max_size=8)
                )
            ] = content.pop(name)
        if kind == "reshape":
            content[name] = draw(
                st.sampled_from(
                    [
                        tensor.flatten(),
                        tensor[None],
                        tensor[..., None],
                        tensor[:1],
                        tensor.mT if tensor.ndim > 1 else tensor[:-1],
                        tensor[:0],
                    ]
                )
            ).contiguous()
        if kind == "dtype":
            content[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        if kind == "value" and tensor.numel():
            content[name] = tensor.clone()
            content[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(
                st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.5, 3.25, 1e30])
                | st.floats(-10, 10, width=16)
            )
        if kind == "delete":
            del content[name]
        if kind == "add":
            content[draw(st.sampled_from(["x", "default.2.up", "third.9.bias", f"{name}2"]))] = (
                tensor.clone()
            )
        if kind == "swap":
            other = draw(st.sampled_from(sorted(content)))
            content[name], content[other] = content[other], content[name]
    return pack(content)


@st.composite
def damaged(draw, folders):
    "A folder in memory, damaged: its name, and its files."
    name = draw(st.sampled_from(sorted(folders)))
    files = dict(folders[name])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        file = draw(st.sampled_from(sorted(files)))
        structure = damaged_json if file.endswith(".json") else damaged_tensors
        way = draw(st.sampled_from(["bytes", "structure", "structure"]))
        try:
            files[file] = (damaged_bytes if way == "bytes" else structure)(draw, files[file])
        except Exception as error:  # it was no JSON any more, or what was drawn cannot be written
            if type(error).__module__.startswith("hypothesis"):
                raise
            files[file] = damaged_bytes(draw, files[file])
    return name, files


def loaded_tensors(loaded) -> dict[str, dict[str, torch.Tensor]]:
    "The tensors that a load has put into the model, by their file and their name there."
    model, found = (
        loaded.model,
        {"steering.safetensors": {}, "adapter_model.safetensors": {}, "trainable.safetensors": {}},
    )
    named = [loaded] if not hasattr(loaded, "options") else steerings(model).values()
    steered = {id(p) for steering in steerings(model).values() for p in steering.parameters()}
    for steering in named:
        for site, adapter in steering.adapters.items():
            for part, parameter in adapter.named_parameters():
                found["steering.safetensors"][f"{steering.name}.{site.layer}.{part}"] = parameter
    if hasattr(model, "peft_config"):
        found["adapter_model.safetensors"] = get_peft_model_state_dict(
            model,
            state_dict={n: p for n, p in model.named_parameters() if id(p) not in steered},
            save_embedding_layers=False,
        )
    elif hasattr(loaded, "options"):
        found["trainable.safetensors"] = {
            n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in steered
        }
    return found


class Fuzz:
    "Loads damaged folders, and counts."

    def __init__(self, folder):
        self.folder, self.unchanged = folder, Unchanged()
        self.cases = self.loaded = self.finite = 0

    def __call__(self, name, files):
        self.cases += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for file, data in files.items():
            (self.folder / file).write_bytes(data)
        try:
            loaded = load_case(name, self.unchanged.model, self.folder)
        except OURS:
            return self.unchanged.check()
        except BaseException:
            self.unchanged = Unchanged()  # so that a smaller example can be looked for
            raise
        try:
            self.compare(loaded, files)
        finally:
            self.unchanged = Unchanged()

    def compare(self, loaded, files):
        "The model has exactly the tensors of the files, and its logits are finite."
        self.loaded += 1
        mild, model = True, loaded.model.eval()
        for file, tensors in loaded_tensors(loaded).items():
            stored = unpack(files[file]) if tensors else {}
            for key, parameter in tensors.items():
                tensor = stored.pop(key)
                assert torch.equal(
                    parameter.detach(), tensor.to(parameter.dtype)
                ) and tensor.dtype in (torch.float32, torch.float64), key
                mild = mild and parameter.isfinite().all() and parameter.abs().max() <= 100
            assert {key.split(".")[0] for key in stored} <= (
                {"heads", "third"} if file == "steering.safetensors" else set()
            ), stored
        strengths = [abs(steering.strength) for steering in steerings(model).values()]
        with torch.no_grad():
            logits = model(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits
        if (
            mild
            and max(strengths, default=0) <= 100
            and abs(getattr(loaded, "options", {}).get("alpha") or 0) <= 1000
        ):  # beyond, float32 may overflow
            self.finite += 1
            assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["steering", "method"])
@pytest.mark.parametrize("count", [100, pytest.param(1200, marks=pytest.mark.slow)])
def test_fuzz(valid, tmp_path, kind, count):
    """A damaged folder loads as its files describe, or raises an error of ours and changes nothing.

    The same cases each time. STEER_NB_FUZZ_SEED=7 makes others, STEER_NB_FUZZ_TIMES=10 ten times
    as many."""
    folders = {
        name: {file.name: file.read_bytes() for file in path.iterdir()}
        for name, path in valid.items()
        if kind_of(name) == kind
    }
    fuzz, count = Fuzz(tmp_path / "damaged"), count * TIMES

    @settings(
        max_examples=count,
        derandomize=not SEED,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(folders))
    def run(case):
        fuzz(*case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about odd options
        (seed(SEED)(run) if SEED else run)()
    print(f"{kind}: {fuzz.cases} folders, {fuzz.loaded} loaded, {fuzz.finite} checked for finite")
    assert fuzz.cases >= count and fuzz.loaded > count / 50
