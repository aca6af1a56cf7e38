"""One training by two real processes (gloo), with and without FSDP2.

The result is that of one process, nothing is done twice, and nothing is lost when one of them dies.
The processes get from the environment what a launcher gives them; only the test restarts them.
"""

import json
import os
import signal
import socket
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from children import start
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from toy import tiny, tokenizer, toy

from steer_nb.evaluation.result import evaluate
from steer_nb.methods.registry import apply_method
from steer_nb.training.checkpoints import Checkpoints
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit

CHOICES = replace(
    toy,
    metric="choice",
    max_new_tokens=None,
    extractor=None,
    train=(),
    validation=(),
    test=tuple(
        replace(
            example,
            completion=example.completion[:2],
            choices=tuple(f" {number}" for number in range(10)),
            answer=int(example.answer),
        )
        for example in toy.train
    ),
)


TEXTS = ["1 2 3 4 5", "max of 3 7 = 7", "9 8 7 6 5 4", "5 5", "0 1 2 3 4 5 6 7"]


def work(folder, method, own="", signalled=None, evaluated=False, broken=None, retain=None):
    "In each process: train, perhaps evaluate, and print the observations as JSON."
    warnings.simplefilter("ignore")
    rank = int(os.environ.get("RANK", 0))
    method = apply_method(tiny().double(), method)
    embedding, rows, passes = method.model.get_input_embeddings(), [], []

    def see(module, args):
        (rows if module.training else passes).extend(args[0].tolist())

    embedding.register_forward_pre_hook(see)
    if rank == signalled:
        after_step = method.after_step

        def signal_after_four(step, *rest):
            after_step(step, *rest)
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        method.after_step = signal_after_four
    config = TrainConfig(lr=1e-2, epochs=2, batch_size=4, accumulation_steps=2)
    folder = folder + own * rank
    run = fit(method, tokenizer, toy, config, output=folder, checkpoint_every=0, retain=retain)
    sharded = [isinstance(parameter, DTensor) for parameter in method.model.parameters()]
    fields = ("stopped", "resumed", "processes", "curve", "validation")
    said = {name: getattr(run, name) for name in fields}
    said |= {"rows": rows, "sharded": sum(sharded), "whole": len(sharded) - sum(sharded)}
    if evaluated:
        passes.clear()
        said["choices"] = evaluate(method, tokenizer, CHOICES, batch_size=2).predictions
        said["passes"] = len(passes)
        said["texts"] = evaluate(method, tokenizer, toy, "validation", batch_size=2).predictions
    if broken is not None:
        if rank == broken:
            method.model.lm_head.weight.data.fill_(float("nan"))
        try:
            evaluate(method, tokenizer, CHOICES)
        except ValueError as error:
            said["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


def launch(processes, folder, method="post_block_linear", fsdp=None, **asked):
    "Start `work` in so many processes that find each other."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if fsdp is not None:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": fsdp}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    function = partial(work, str(folder), method, **asked)
    ranks = [
        {"RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {} for n in range(processes)
    ]
    return [start(function, environment={**environment, **own}) for own in ranks]


def finish(children):
    "The JSON that each of them printed last."
    ended = [child.wait(300) for child in children]
    said = "".join(f"process {n}:\n{done.stderr[-3000:]}\n" for n, done in enumerate(ended))
    assert [done.returncode for done in ended] == [0] * len(ended), said
    return [json.loads(done.stdout.splitlines()[-1]) for done in ended]


def run_to_end(processes, folder, *args, **asked):
    "The JSON that each of so many processes printed last, after a whole training."
    return finish(launch(processes, folder, *args, **asked))


def tensors(folder):
    "All tensors that a method wrote."
    return {
        f"{path.name} {name}": tensor
        for path in sorted((folder / "method").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def check_equal(folder, said, other_folder, other):
    """Parameters to 1e-6, because AdamW divides rounding errors by their size, and losses to 1e-7.

    Losses follow the parameters: after six steps they differ by 1e-9 to 2e-8, by processor."""
    mine, others = tensors(folder), tensors(other_folder)
    assert mine.keys() == others.keys()
    assert max(float((mine[name] - others[name]).abs().max()) for name in mine) < 1e-6
    for name in ("curve", "validation"):
        pairs = zip(said[name], other[name], strict=True)
        assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-7, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The result of one process, by method; each is trained once."
    done = {}

    def train(method="post_block_linear"):
        if method not in done:
            folder = tmp_path_factory.mktemp("alone") / "run"
            [said] = run_to_end(1, folder, method, evaluated=True)
            done[method] = folder, said
        return done[method]

    return train


def count_rows(said):
    "How often each example was computed in training, padding left out."
    return Counter(tuple(token for token in row if token) for row in said["rows"])


def outcomes(records):
    return [(record["id"], record["prediction"], record["correct"]) for record in records]


def test_two_processes_are_one(alone, tmp_path):
    "Rank 1 gets a folder of its own, and writes nothing there; evaluation is shared as well."
    folder, expected = alone()
    both = launch(2, tmp_path / "run", own="-other", evaluated=True, broken=1)
    first, second = finish(both)
    assert first["processes"] == second["processes"] == 2
    assert not (tmp_path / "run-other").exists()
    check_equal(tmp_path / "run", first, folder, expected)
    assert first["curve"] == second["curve"]
    # 29 examples in two epochs. The last pass of an epoch has one example; the process that has
    # none computes it too, with weight zero.
    one, shares = count_rows(expected), [count_rows(first), count_rows(second)]
    together = sum(shares, Counter())
    assert set(one.values()) == {2} and len(one) == 29
    assert not one - together and (together - one).total() == 2
    assert all(share.total() < 0.6 * one.total() for share in shares)
    # Evaluation: every example once, in its order, in both processes; each did about half.
    for kind in ("choices", "texts"):
        for said in (first, second):
            assert outcomes(said[kind]) == outcomes(expected[kind])
    assert len(first["choices"]) == 29 and expected["passes"] - first["passes"] in (13, 14)
    # The logits of rank 1 alone become NaN: both raise, and neither waits for the other.
    assert second["error"].startswith("EvaluateError: the model's logits are NaN")
    assert first["error"].startswith(
        "EvaluateError: another process failed: the model's logits are NaN"
    )


def steps_on_disk(folder):
    return Checkpoints(folder / "checkpoints").numbers()


@pytest.mark.parametrize("fsdp", [None, "2"], ids=["ddp", "fsdp2"])
def test_a_dead_process_ends_the_run_and_the_next_resumes(alone, tmp_path, fsdp):
    "Rank 1 is killed in the middle. Rank 0 must notice, without a launcher, within a minute."
    folder = tmp_path / "run"
    first, second = launch(2, folder, fsdp=fsdp)
    first.wait_for(lambda: max(steps_on_disk(folder), default=-1) >= 3)
    second.kill()
    assert first.wait(60).returncode != 0
    second.wait()
    assert steps_on_disk(folder) and not (folder / "run.json").exists()
    for child in launch(2, folder, fsdp=fsdp, own="-other"):  # rank 1 sees another folder
        done = child.wait()
        assert done.returncode == 1, done
        assert "the processes see different checkpoints" in done.stderr, done.stderr
    said, _ = run_to_end(2, folder, fsdp=fsdp)
    assert len(said["resumed"]) == 1 and said["resumed"][0] >= 3
    check_equal(folder, said, *alone())


@pytest.mark.parametrize("method", ["post_block_linear", "lora", "full"])
def test_fsdp_trains_and_saves_whole_tensors(alone, tmp_path, method):
    "A signal to one of two processes stops both; resumed, the result is that of one process."
    folder = tmp_path / "run"
    first, second = run_to_end(2, folder, method, fsdp="2", signalled=1)
    assert first["stopped"] == second["stopped"] == "SIGTERM"
    assert len(first["curve"]) == len(second["curve"]) == 4
    assert steps_on_disk(folder)[-1] == 4
    first, second = run_to_end(2, folder, method, fsdp="2", evaluated=True)
    # Else this was plain data parallelism; only of full fine-tuning is everything sharded.
    assert first["resumed"] == [4] and first["sharded"] > 0
    assert (first["whole"] == 0) == (method == "full")
    check_equal(folder, first, *alone(method))
    assert outcomes(first["choices"]) == outcomes(second["choices"])
    assert len(first["choices"]) == 29 and first["texts"] == second["texts"]


@pytest.mark.parametrize(
    "method, fsdp", [("lora", None), ("post_block_linear", "2"), ("full", "2")]
)
def test_two_processes_retain_the_same_texts(tmp_path, method, fsdp):
    "Five texts in passes of four: the process that has none in a pass takes part in it."
    [expected] = run_to_end(1, tmp_path / "one", method, retain=TEXTS)
    said, _ = run_to_end(2, tmp_path / "two", method, fsdp, retain=TEXTS)
    check_equal(tmp_path / "two", said, tmp_path / "one", expected)
    pairs = zip(said["curve"], expected["curve"], strict=True)
    assert all(abs(a["kl"] - b["kl"]) < 1e-7 for a, b in pairs)
    assert expected["curve"][-1]["kl"] > 1e-6


def test_one_process_resumes_what_two_began(alone, tmp_path):
    "A checkpoint has whole tensors by name, also of sharded parameters and their optimizer."
    run_to_end(2, tmp_path / "run", "full", fsdp="2", signalled=1)
    [said] = run_to_end(1, tmp_path / "run", "full")
    assert said["resumed"] == [4] and said["processes"] == 1 and said["sharded"] == 0
    check_equal(tmp_path / "run", said, *alone("full"))


def test_fsdp1_is_an_error(tmp_path):
    for child in launch(2, tmp_path / "run", fsdp="1"):
        done = child.wait()
        assert done.returncode == 1 and "set fsdp_version to 2" in done.stderr, done.stderr
