"The calculator against measurements on models of other shapes than the notebook's, and what it takes several processes to show."

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from steer_nb.experiments.plan import GPUS, _job, _operations, _payload, kept_in_cache, plan_run
from steer_nb.experiments.testbed import small_llama
from steer_nb.methods.registry import apply_method
from steer_nb.training.loss import completion_loss

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "nbs" / "configs"
SHAPES = {
    "wide heads": {"head_dim": 24, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "deep": {"num_hidden_layers": 6, "num_key_value_heads": 2},
}
METHODS = {
    "linear": ("post_block_linear", {"rank": 3}),
    "some": ("post_block_linear", {"layers": [1, 2]}),
    "nonlinear": ("post_block_nonlinear", {"layers": [0, 2]}),
    "vector": ("post_block_vector", {"layers": [1]}),
    "lora": ("lora", {"rank": 2}),
    "full": ("full", {}),
}
BATCH, LENGTH, LABELLED, VOCAB = 3, 20, 4, 80


def llama(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            **{
                "hidden_size": 48,
                "intermediate_size": 112,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": VOCAB,
                **SHAPES[shape],
            }
        ),
        dtype=dtype,
    )


def batch():
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-LABELLED] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def job(model, method, options, precision="float32"):
    return _job(model, method, options, BATCH, LENGTH, LABELLED, precision, False)


def kept(method, precision):
    "Bytes of distinct storages that a forward pass keeps, parameters and buffers apart."
    found, own = (
        {},
        {
            tensor.untyped_storage().data_ptr()
            for tensor in (*method.model.parameters(), *method.model.buffers())
        },
    )

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        completion_loss(method.model.train(), batch())
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_formulas_are_what_is_measured(shape, name):
    "Parameters and operations to the last one, bytes that are kept but for the indices of labels."
    method, options = METHODS[name]
    for precision in ("float32", "bfloat16"):
        model = llama(shape, torch.float32 if method == "full" else getattr(torch, precision))
        planned, total = (
            job(model, method, options, precision),
            sum(p.numel() for p in model.parameters()),
        )
        trained = apply_method(model, method, **options)
        assert planned.trained == trained.num_parameters and planned.frozen == (
            0 if method == "full" else total
        )
        assert 0 <= kept(trained, precision) - sum(kept_in_cache(planned).values()) < 200
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = completion_loss(trained.model.train(), batch())
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert _operations(planned) == {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
    }


def test_a_wrong_formula_would_be_seen():
    "The measures move with each of the things that the formulas depend on."
    model = llama("deep")
    planned = job(model, "post_block_linear", {"rank": 3, "layers": [2, 4]})
    measured = kept(apply_method(model, "post_block_linear", rank=3, layers=[2, 4]), "float32")
    assert 0 <= measured - sum(kept_in_cache(planned).values()) < 200
    for change in (
        {"rank": 4},
        {"steered": (1, 4)},
        {"kind": "full"},
        {"labelled": 5},
        {"length": 21},
        {"batch": 2},
        {"precision": "bfloat16"},
        {"nonlinear": True},
    ):
        assert abs(measured - sum(kept_in_cache(replace(planned, **change)).values())) > 200, change


def processes(*command, **environment):
    "Run with this Python's programs, on the CPU, one thread a process; what it printed."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "strategy, method, options",
    [
        ("ddp", "post_block_linear", {}),
        ("ddp", "lora", {"rank": 2}),
        ("fsdp", "post_block_vector", {"layers": [2]}),
        ("fsdp", "full", {}),
    ],
)
def test_two_processes_send_what_is_planned(strategy, method, options):
    out = processes(
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "nbs/count_bytes.py",
        method,
        json.dumps(options),
        strategy,
    )
    counted = json.loads(out.splitlines()[-1])
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=14,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    planned = _job(model, method, options, 4, 8, 1, "float32", False)
    expected = _payload(planned, strategy)
    assert counted == {"bytes": expected, "trained": planned.trained}


def test_a_plan_scales_as_it_should():
    plan = plan_run("meta-llama/Llama-3.2-1B", gpus=4)
    assert plan.sent == {"all-reduce": 2 * 3 / 4 * 4 * plan.parameters["trained"]}
    assert (
        plan_run("meta-llama/Llama-3.2-1B", gpus=1).sent == {}
        and plan_run("meta-llama/Llama-3.2-1B", gpus=1).seconds["communication"] == 0
    )
    across = plan_run("meta-llama/Llama-3.2-1B", gpus=2, nodes=2)
    assert across.sent == plan.sent and across.seconds["communication"] == pytest.approx(
        plan.seconds["communication"] * GPUS["H100"].link / GPUS["H100"].network
    )
    spread = plan_run("meta-llama/Llama-3.2-1B", gpus=4, strategy="fsdp")
    assert (
        spread.memory["frozen weights"] * 4 == plan.memory["frozen weights"]
        and spread.memory["optimizer"] == plan.memory["optimizer"]
    )
    full, full_spread = (
        plan_run("meta-llama/Llama-3.2-1B", "full", gpus=4, strategy=strategy)
        for strategy in ("ddp", "fsdp")
    )
    assert (
        full_spread.memory["optimizer"] * 4 == full.memory["optimizer"]
        and full.memory["frozen weights"] == 0
    )


# Configuration files and commands

FILES = {
    "one_node_8_gpus.yaml": ("MULTI_GPU", 1, 8),
    "one_node_8_gpus_fsdp.yaml": ("FSDP", 1, 8),
    "several_nodes.yaml": ("MULTI_GPU", 4, 32),
    "two_processes_cpu.yaml": ("MULTI_GPU", 1, 2),
}


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(CONFIGS / name))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == FILES[name]
    assert config.mixed_precision == "no" and (
        name != "one_node_8_gpus_fsdp.yaml" or config.fsdp_config["fsdp_version"] == 2
    )


def test_every_file_is_tested_and_an_unknown_key_is_refused(tmp_path):
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(FILES)
    (tmp_path / "wrong.yaml").write_text(
        (CONFIGS / "two_processes_cpu.yaml").read_text() + "number_of_processes: 2\n"
    )
    with pytest.raises(ValueError, match="number_of_processes"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


def test_the_files_that_pages_name_exist():
    pages = [ROOT / "nbs/26_scale.ipynb", CONFIGS / "slurm.sh"]
    assert {
        name
        for page in pages
        for name in re.findall(r"nbs/configs/\w+\.(?:yaml|sh)", page.read_text())
        if not (ROOT / name).exists()
    } == set()
    subprocess.run(["bash", "-n", CONFIGS / "slurm.sh"], check=True)


LAUNCH = ("accelerate.commands.accelerate_cli", "launch", "--config_file")


def test_accelerate_launch_starts_what_fsdp_asks_for(tmp_path):
    "The environment that `fit` sees: both files that are for one node, with two processes."
    (tmp_path / "say.py").write_text(
        "import os\nprint({name: os.environ.get(name) for name in ('WORLD_SIZE', 'ACCELERATE_USE_FSDP', 'FSDP_VERSION', 'ACCELERATE_MIXED_PRECISION')})"
    )
    for name, expected in (
        (
            "one_node_8_gpus.yaml",
            {
                "WORLD_SIZE": "2",
                "ACCELERATE_USE_FSDP": None,
                "FSDP_VERSION": None,
                "ACCELERATE_MIXED_PRECISION": "no",
            },
        ),
        (
            "one_node_8_gpus_fsdp.yaml",
            {
                "WORLD_SIZE": "2",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "ACCELERATE_MIXED_PRECISION": "no",
            },
        ),
    ):
        out = processes(*LAUNCH, CONFIGS / name, "--num_processes", 2, tmp_path / "say.py")
        assert out.splitlines() == [str(expected)] * 2


def test_the_program_under_accelerate_launch(tmp_path):
    "Two processes train one steering: said once, written once, and the same as one process makes."
    model, tokenizer = small_llama(2, 32, 64, "tiny-llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = (
        "train",
        "--model",
        tmp_path / "model",
        "--task",
        "listops",
        "--n-train",
        24,
        "--batch-size",
        8,
    )
    out = processes(
        *LAUNCH,
        CONFIGS / "two_processes_cpu.yaml",
        "-m",
        "steer_nb",
        *words,
        "--output",
        tmp_path / "two",
    )
    assert out.count("parameters trained") == out.count("saved in") == 1
    processes("steer_nb", *words, "--output", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_processes_that_do_not_find_each_other_are_an_error(tmp_path):
    model, tokenizer = small_llama(2, 32, 64, "tiny-llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "steer_nb",
        "train",
        "--model",
        tmp_path / "model",
        "--task",
        "listops",
        "--n-train",
        "24",
        "--output",
        tmp_path / "run",
    ]
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert (
        done.returncode
        and done.stderr.count(
            "error: 2 processes were started, and each sees only itself: without GPUs, set ACCELERATE_USE_CPU=true"
        )
        == 2
        and not (tmp_path / "run").exists()
    )
