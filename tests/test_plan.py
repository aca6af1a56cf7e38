"""The estimates of a run's cost against measurements, and the launch files against Accelerate.

The models here have other shapes than those in the notebook."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from steer_nb.experiments.catalog import GPUS, ScaleError
from steer_nb.experiments.formulas import (
    collective_bytes,
    kept_terms,
    operation_counts,
    training_step,
)
from steer_nb.experiments.plan import plan_run
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
SMALL = 200  # bytes that are not counted: masks, and indices of labelled tokens


def llama(shape, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        **SHAPES[shape],
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)


def batch():
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-LABELLED] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step_of(model, method, options, precision="float32"):
    return training_step(model, method, options, BATCH, LENGTH, LABELLED, precision)


def planned_bytes(step):
    return sum(kept_terms(step).values())


def kept(method, precision):
    "Bytes of distinct storages that a forward pass keeps, parameters and buffers excluded."
    model, found = method.model, {}
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        completion_loss(model.train(), batch())
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_formulas_agree_with_measurements(shape, name):
    "Parameters and operations exactly, kept bytes up to the indices of labels."
    method, options = METHODS[name]
    for precision in ("float32", "bfloat16"):
        model = llama(shape, torch.float32 if method == "full" else getattr(torch, precision))
        planned = step_of(model, method, options, precision)
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = apply_method(model, method, **options)
        assert planned.trained == trained.num_parameters
        assert planned.frozen == (0 if method == "full" else total)
        assert 0 <= kept(trained, precision) - planned_bytes(planned) < SMALL
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = completion_loss(trained.model.train(), batch())
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert operation_counts(planned) == {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
    }


def test_a_wrong_formula_would_be_noticed():
    "The measurement differs when any of the inputs of the formulas is changed."
    model, options = llama("deep"), {"rank": 3, "layers": [2, 4]}
    planned = step_of(model, "post_block_linear", options)
    measured = kept(apply_method(model, "post_block_linear", **options), "float32")
    assert 0 <= measured - planned_bytes(planned) < SMALL
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
        assert abs(measured - planned_bytes(replace(planned, **change))) > SMALL, change


def count_bytes(method, options, strategy):
    "In a child: run `nbs/count_bytes.py` and print its result."
    spec = importlib.util.spec_from_file_location("count_bytes", ROOT / "nbs/count_bytes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    print("counted", json.dumps(script.main(method, json.dumps(options), strategy)))


@pytest.mark.parametrize(
    "strategy, method, options",
    [
        ("ddp", "post_block_linear", {}),
        ("ddp", "lora", {"rank": 2}),
        ("fsdp", "post_block_vector", {"layers": [2]}),
        ("fsdp", "full", {}),
    ],
)
def test_two_processes_send_the_planned_bytes(strategy, method, options):
    for done in children.run_processes(count_bytes, 2, method, options, strategy):
        assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.split("counted ")[1])
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
    planned = training_step(model, method, options, 4, 8, 1, "float32")
    expected = collective_bytes(planned, strategy)
    assert counted == {"bytes": expected, "trained": planned.trained}


def test_a_plan_scales_with_the_number_of_gpus():
    name = "meta-llama/Llama-3.2-1B"
    alone, plan = plan_run(name, gpus=1), plan_run(name, gpus=4)
    assert plan.sent == {"all-reduce": 2 * 3 / 4 * 4 * plan.parameters["trained"]}
    assert alone.sent == {} and alone.seconds["communication"] == 0
    across = plan_run(name, gpus=2, nodes=2)
    slower = GPUS["H100"].link / GPUS["H100"].network
    assert across.sent == plan.sent
    assert across.seconds["communication"] == pytest.approx(plan.seconds["communication"] * slower)
    sharded = plan_run(name, gpus=4, strategy="fsdp")
    assert sharded.memory["frozen weights"] * 4 == plan.memory["frozen weights"]
    assert sharded.memory["optimizer"] == plan.memory["optimizer"]
    full, full_sharded = (
        plan_run(name, "full", gpus=4, strategy=strategy) for strategy in ("ddp", "fsdp")
    )
    assert full_sharded.memory["optimizer"] * 4 == full.memory["optimizer"]
    assert full.memory["frozen weights"] == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gpu": "H1000"}, "did you mean 'H100'"),
        ({"strategy": "fdsp"}, "did you mean 'fsdp'"),
        ({"gpus": 0}, "gpus is 0"),
        ({"nodes": True}, "nodes is True"),
        ({"utilisation": 2}, "utilisation is 2"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"labelled": 1024}, "cannot have a label"),
        ({"precision": "half"}, "no precision 'half'"),
        ({"method": "jola"}, "not for jola"),
        ({"method": "lora", "options": {"targets": "q_proj"}}, "not for lora"),
        ({"model": "google/gemma-3-1b-pt"}, "Gemma3DecoderLayer differs in"),
        ({"model": "meta-llama/Llama-3-1B"}, "did you mean"),
    ],
)
def test_wrong_plans(wrong, message):
    with pytest.raises(ScaleError, match=message):
        plan_run(**{"model": "meta-llama/Llama-3.2-1B", **wrong})


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
    assert config.mixed_precision == "no"
    if name == "one_node_8_gpus_fsdp.yaml":
        assert config.fsdp_config["fsdp_version"] == 2


def test_every_file_is_tested_and_an_unknown_key_is_an_error(tmp_path):
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(FILES)
    text = (CONFIGS / "two_processes_cpu.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text + "number_of_processes: 2\n")
    with pytest.raises(ValueError, match="number_of_processes"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


def test_the_files_that_pages_name_exist():
    pages = [ROOT / "nbs/experiments/02_plan.ipynb", CONFIGS / "slurm.sh"]
    named = {
        name
        for page in pages
        for name in re.findall(r"nbs/configs/\w+\.(?:yaml|sh)", page.read_text())
    }
    assert len(named) >= 4
    assert all((ROOT / name).exists() for name in named)
    subprocess.run(["bash", "-n", CONFIGS / "slurm.sh"], check=True)


def launch(*words):
    "In a child: `accelerate launch` with these arguments."
    launch_command(launch_command_parser().parse_args([str(word) for word in words]))


def test_accelerate_launch_starts_what_fsdp_asks_for(tmp_path):
    "The environment that `fit` sees: both files that are for one node, with two processes."
    names = "WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_MIXED_PRECISION"
    script = tmp_path / "show.py"
    script.write_text(f"import os\nprint([os.environ.get(name) for name in {names}])\n")
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    for name, expected in (
        ("one_node_8_gpus.yaml", ["2", None, None, "no"]),
        ("one_node_8_gpus_fsdp.yaml", ["2", "true", "2", "no"]),
    ):
        words = "--config_file", CONFIGS / name, "--num_processes", 2, script
        done = children.run(launch, *words, environment=cpu)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(expected)] * 2


def program(*words):
    "In a child: the command line program."
    from steer_nb.cli.cli import main

    sys.argv = ["steer_nb", *map(str, words)]
    main()


def program_without_cpu(*words):
    "In a child of several: the program as a launcher starts it that does not say where it runs."
    os.environ["ACCELERATE_USE_CPU"] = "false"
    program(*words)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    "The words of a short training of a tiny model."
    folder = tmp_path_factory.mktemp("model")
    for part in small_llama(2, 32, 64, "tiny-llama"):
        part.save_pretrained(folder)
    sizes = "--n-train", 24, "--batch-size", 8
    return "train", "--model", folder, "--task", "listops", *sizes


def check_two(out, one, two):
    "Two processes train the steering that one trains; messages are printed once."
    assert out.count("parameters trained") == out.count("saved in") == 1
    one, two = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def train_alone(training, folder):
    done = children.run(
        program, *training, "--output", folder, environment={"ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr


def test_the_program_in_two_processes(training, tmp_path):
    train_alone(training, tmp_path / "one")
    done = children.run_processes(program, 2, *training, "--output", tmp_path / "two")
    assert [one.returncode for one in done] == [0, 0], done
    check_two("".join(one.stdout for one in done), tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_program_under_accelerate_launch(training, tmp_path):
    train_alone(training, tmp_path / "one")
    config = "--config_file", CONFIGS / "two_processes_cpu.yaml"
    words = *config, "-m", "steer_nb", *training, "--output", tmp_path / "two"
    done = children.run(launch, *words, environment={"ACCELERATE_USE_CPU": "true"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    check_two(done.stdout, tmp_path / "one", tmp_path / "two")


def test_processes_that_do_not_find_each_other_are_an_error(training, tmp_path):
    words = *training, "--output", tmp_path / "run"
    ended = children.run_processes(program_without_cpu, 2, *words)
    message = (
        "error: 2 processes were started, but each found only itself: "
        "without GPUs, set ACCELERATE_USE_CPU=true"
    )
    assert [done.returncode for done in ended] == [1, 1]
    # The first to end takes the store with it that the other may still be connecting to.
    assert any(message in done.stderr for done in ended), ended
    assert not (tmp_path / "run").exists()
