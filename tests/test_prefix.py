"""Activations below the lowest steered layer are computed once, and every result is as without.

Bit-equal in float32 where a text is always in the same batch. Where batches differ from epoch to
epoch, matrix products round differently, so losses agree to 1e-6 of their size."""

import copy
import json
import os
import shutil
import signal
import warnings
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from children import run, run_processes, start
from safetensors.torch import load_file
from toy import tiny, tokenizer, toy

from steer_nb.core.errors import SteerError
from steer_nb.core.hooks import edit
from steer_nb.core.kept_rows import PrefixCache
from steer_nb.core.prefix import PrefixError
from steer_nb.core.reuse import prefix_cache, reuse_prefix
from steer_nb.core.sites import Site, blocks
from steer_nb.core.steering import steer
from steer_nb.evaluation.result import evaluate
from steer_nb.experiments.grid import run_grid
from steer_nb.experiments.jobs import Arm, Experiment
from steer_nb.methods.registry import apply_method
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.testing.toy_task import toy_task
from steer_nb.theory.distill import fit_oracle
from steer_nb.training.checkpoints import Checkpoints
from steer_nb.training.config import CHECKPOINT_FOLDER, TrainConfig, TrainError
from steer_nb.training.fit import fit
from steer_nb.training.plan import Plan, prefix_layers
from steer_nb.training.run import Run

CONFIG = TrainConfig(lr=1e-2, epochs=3, batch_size=4, cache_prefix=True)
ONE_BATCH = replace(CONFIG, batch_size=len(toy.train), epochs=4)
ROUNDING = 1e-6  # of the losses, relative: float32 has 6e-8, times a few blocks and steps


def model_of_four(**changes):
    return tiny("llama", num_hidden_layers=4, **changes)


def steered(model=None, layers=(2, 3), **options):
    model = model_of_four() if model is None else model
    steer(model, **{"rank": 2, "layers": layers, **options})
    return model


def trained(build, config=CONFIG, **options):
    "The record of a training of a new model, and its trained parameters."
    method = build()
    model = getattr(method, "model", method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(method, tokenizer, toy, config, **options)
    return run, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def without(config):
    return replace(config, cache_prefix=False)


def check_same(build, config=CONFIG, layers=3, bits=False, **options):
    "Train with and without; the layers that were not computed again are those expected."
    run, parameters = trained(build, config, **options)
    plain, expected = trained(build, without(config), **options)
    assert plain.prefix is None and run.prefix["layers"] == layers
    assert run.prefix["tokens_reused"] > run.prefix["tokens_computed"] > 0
    for name in ("curve", "validation"):
        pairs = zip(getattr(run, name), getattr(plain, name), strict=True)
        for ours, other in pairs:
            limit = 0 if bits else ROUNDING * other["loss"]
            assert abs(ours["loss"] - other["loss"]) <= limit, (name, ours, other)
    for ours, other in zip(parameters, expected, strict=True):
        # AdamW divides rounding errors by their own size
        assert torch.equal(ours, other) if bits else float((ours - other).abs().max()) < 1e-4
    return run


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "completion"])
def test_one_batch_an_epoch_is_equal_to_the_bit(positions):
    check_same(lambda: steered(positions=positions), ONE_BATCH, bits=True)


@pytest.mark.parametrize("site, layers", [("block", 3), ("mlp", 2), ("attn", 2), ("heads", 2)])
def test_every_site(site, layers):
    check_same(lambda: steered(site=site, kind="vector"), layers=layers)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation_steps": 2},
        {"batch_tokens": 24},
        {"precision": "bfloat16"},
        {"evaluations_per_epoch": 2, "validation_share": None},
    ],
)
def test_options_of_a_training(options):
    config = replace(CONFIG, **options)
    if config.precision == "bfloat16":  # rounding is coarse, so only equal batches can be compared
        config = replace(config, batch_size=len(toy.train))
    check_same(steered, config, bits=config.precision == "bfloat16")


def test_retained_texts():
    texts = ["1 2 3 4 5", "max of 3 7 = 7", "9 8 7 6 5 4"]
    run = check_same(steered, retain=texts)
    assert "kl" in run.curve[0]


def test_gradient_checkpointing():
    def build(reentrant=False):
        model = steered()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        return model

    # block 2 is computed again in the backward pass, with the steering at its output
    check_same(build, layers=2)
    with pytest.raises(TrainError, match="use_reentrant=False"):
        trained(lambda: build(True))


def test_other_steerings_on_the_model():
    def with_lower(enabled):
        def build():
            model = model_of_four()
            lower = steer(model, name="lower", kind="vector", layers=[0])
            for parameter in lower.parameters():
                parameter.data.fill_(0.3)
                parameter.requires_grad_(False)
            lower.enabled = enabled
            return steered(model)

        return build

    check_same(with_lower(False), layers=3)
    check_same(with_lower(True), replace(CONFIG, epochs=4), layers=1)


def test_lora_on_upper_layers():
    "Its prefix ends below the first block with an adapter."

    def build():
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        options = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], r=2)
        return get_peft_model(model_of_four(), options)

    check_same(build, layers=2)


def test_half_of_the_layers_and_a_method_of_several_parts():
    check_same(lambda: apply_method(model_of_four(), "post_block_linear", layers=[3]), layers=4)


def test_a_file_of_activations_that_is_damaged_or_gone(tmp_path):
    "They are computed again."

    def damage(point):
        files = sorted((tmp_path / "run" / CHECKPOINT_FOLDER / "prefix").rglob("*.safetensors"))
        assert files
        if point["step"] in (9, 13):  # in the second epoch
            files[0].write_bytes(b"damaged")
            files[1].unlink()

    run, parameters = trained(steered, output=tmp_path / "run", on_step=damage)
    plain, expected = trained(steered, without(CONFIG))
    for ours, other in zip(run.curve, plain.curve, strict=True):
        assert abs(ours["loss"] - other["loss"]) <= ROUNDING * other["loss"]
    assert run.prefix["tokens_reused"] > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "steering"]
    assert Run.load(tmp_path / "run" / "run.json") == run


def kept_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_a_file_whose_values_were_changed(tmp_path):
    "Its header is whole. It is replaced, once."
    model = steered(tiny_model("llama", num_hidden_layers=4))
    plain = logits(model)
    for _ in range(2):
        with prefix_cache(tmp_path) as cache, reuse_prefix(model, cache):
            assert torch.equal(logits(model), plain)
        (file,) = kept_files(tmp_path)
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        assert load_file(file)
        content[start:] = bytes(len(content) - start)
        file.write_bytes(content)
    with prefix_cache(tmp_path) as cache, reuse_prefix(model, cache):
        assert torch.equal(logits(model), plain) and "tokens_reused" not in cache.counts
    with prefix_cache(tmp_path) as cache, reuse_prefix(model, cache):
        assert torch.equal(logits(model), plain) and cache.counts["tokens_reused"] == 12
    assert len(kept_files(tmp_path)) == 1


def test_what_a_killed_process_was_writing_is_deleted(tmp_path):
    names = [f"key/.{name}.safetensors.1.part" for name in ("killed", "being_written")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    PrefixCache(tmp_path)
    assert [(tmp_path / name).exists() for name in names] == [False, True]


def disk(monkeypatch, free):
    "A disk with so many free bytes, which the function tells."
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free()))


def test_a_part_of_the_disk_stays_free(tmp_path, monkeypatch):
    disk(monkeypatch, lambda: 2**30 + 10_000 - sum(f.stat().st_size for f in kept_files(tmp_path)))
    with prefix_cache(tmp_path) as cache, pytest.warns(UserWarning, match="less than 1 GiB"):
        run = fit(steered(), tokenizer, toy, CONFIG)
    assert 0 < cache.bytes < 10_000 and cache.full and run.prefix["tokens_reused"] > 0


def test_the_limit_counts_what_other_processes_keep(tmp_path):
    one, other = PrefixCache(tmp_path, 1500 / 2**30), PrefixCache(tmp_path, 1500 / 2**30)
    for name, cache, key in (("a", one, "k"), ("b", other, "l"), ("c", one, "k")):
        assert cache.read(key, [name]) is None  # as before each write
        cache.write(key, {name: torch.zeros(20, 8)})  # 640 bytes, and the header
    assert one.full and len(kept_files(tmp_path)) == 2


def test_a_resumed_training_needs_room_for_the_rest_only(tmp_path, monkeypatch):
    "The free half of the disk has room for all of it, but not twice."
    folder = tmp_path / "run"

    def stop(point):
        if point["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    def train(on_step):
        options = {"output": folder, "checkpoint_every": 0, "on_step": on_step}
        return fit(steered(), tokenizer, toy, config, **options)

    config = replace(CONFIG, precision="float32")
    plain, _ = trained(steered, config)
    needed = plain.prefix["bytes"]
    monkeypatch.setattr("steer_nb.core.kept_rows.RESERVE", 0)
    disk(monkeypatch, lambda: 2.2 * needed - sum(f.stat().st_size for f in kept_files(folder)))
    assert train(stop).stopped and kept_files(folder)
    resumed = train(None)
    assert resumed.resumed == [8] and resumed.curve == plain.curve


def test_a_limit_keeps_the_first_rows_only(tmp_path):
    with prefix_cache(tmp_path, limit=20_000 / 2**30) as cache:
        run, _ = trained(steered)
    plain, _ = trained(steered, without(CONFIG))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert cache.full and 0 < size < 40_000  # the headers of the files are not counted
    for ours, other in zip(run.curve, plain.curve, strict=True):
        assert abs(ours["loss"] - other["loss"]) <= ROUNDING * other["loss"]


def layer_drop(probability):
    "A model that leaves out whole blocks at random, and draws no other random numbers."
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return tiny_model("opt", num_hidden_layers=6, layerdrop=probability, **rates)


def test_where_it_cannot_be_done():
    def refused(build, message, config=CONFIG):
        with pytest.raises(TrainError, match=message):
            trained(build, config)
        run, _ = trained(build, replace(config, cache_prefix="auto"))
        assert run.prefix is None

    refused(lambda: steered(tiny("gpt2"), [1]), "Dropout draws random numbers in training")
    refused(lambda: steered(model_of_four(attention_dropout=0.1)), "LlamaAttention draws random")
    refused(lambda: steered(layer_drop(0.1), range(1, 6)), "OPTDecoder draws random")
    refused(lambda: steered(layers=[0], site="mlp"), "no block below .* in block 0 the steering")
    refused(steered, "cache_limit is 1e-09 GiB", replace(CONFIG, cache_limit=1e-9))

    def embedding():
        model = steered()
        model.model.embed_tokens.weight.requires_grad_(True)
        return model

    refused(embedding, "before the blocks a parameter is trained")

    def compiled():
        model = steered()
        model.compile()
        return model

    with pytest.raises(PrefixError, match="compiled"), reuse_prefix(compiled(), PrefixCache("no")):
        pass


def test_nothing_is_left_on_the_model_after_an_error():
    model = steered()
    before = {path: (set(vars(m)), len(m._forward_hooks)) for path, m in model.named_modules()}

    def fail(point):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        fit(model, tokenizer, toy, CONFIG, on_step=fail)
    after = {path: (set(vars(m)), len(m._forward_hooks)) for path, m in model.named_modules()}
    assert before == after and "forward" not in vars(blocks(model)[0])


# A training that is killed


def work(folder, every):
    "In a process: a training that is slow enough to be killed."
    config = replace(CONFIG, epochs=6, evaluations_per_epoch=2)
    print("ready")
    run = fit(steered(), tokenizer, toy, config, output=folder, checkpoint_every=every)
    print(json.dumps({"resumed": run.resumed, "prefix": run.prefix}))


def test_a_killed_training_goes_on_bit_identically(tmp_path):
    environment = {"ACCELERATE_USE_CPU": "true"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(work, str(whole), 60.0, environment=environment).wait()
    assert done.returncode == 0, done.stderr
    for step in (5, 20):  # in the first epoch, and later
        child = start(work, str(killed), 0.0, environment=environment)
        child.wait_for(
            lambda step=step: max(Checkpoints(killed / "checkpoints").numbers() or [0]) >= step
        )
        child.kill()
        child.wait()
        assert list((killed / CHECKPOINT_FOLDER / "prefix").rglob("*.safetensors"))
    done = start(work, str(killed), 0.0, environment=environment).wait()
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["resumed"]) == 2
    tensors = [
        load_file(folder / "steering" / "steering.safetensors") for folder in (whole, killed)
    ]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    runs = [Run.load(folder / "run.json") for folder in (whole, killed)]
    assert runs[0].curve == runs[1].curve and runs[0].validation == runs[1].validation
    assert not (killed / CHECKPOINT_FOLDER).exists()


# Several processes


def share(folder, cached):
    "In each of two processes: train together."
    warnings.simplefilter("ignore")
    config = replace(CONFIG, accumulation_steps=2, cache_prefix=cached)
    model = steered(model_of_four().double())
    computed = []
    blocks(model)[1].mlp.register_forward_hook(lambda *_: computed.append(1)) if not cached else 0
    run = fit(model, tokenizer, toy, config, output=folder)
    print(json.dumps({"curve": run.curve, "validation": run.validation, "prefix": run.prefix}))


def test_two_processes(tmp_path):
    "Each continues from what the other has computed."
    said = {}
    for cached in (True, False):
        done = run_processes(share, 2, str(tmp_path / str(cached)), cached)
        assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
        said[cached] = [json.loads(one.stdout.splitlines()[-1]) for one in done][0]
    prefix = said[True]["prefix"]
    assert said[False]["prefix"] is None
    # an example that fills up the last pass of an epoch is computed by both
    assert 2 * 0.8 < prefix["tokens_reused"] / prefix["tokens_computed"] < 3
    for name in ("curve", "validation"):
        pairs = zip(said[True][name], said[False][name], strict=True)
        assert all(abs(a["loss"] - b["loss"]) < 1e-9 for a, b in pairs)


# Without a training

CHOICES, TEXTS = toy_task(1, 1, 24), replace(toy_task(1, 1, 24, "generate"), metric="perplexity")


def test_evaluate_several_steerings_of_one_base():
    model, handles = model_of_four(), []
    for number in range(3):
        handles.append(steer(model, rank=2, layers=[3], name=f"steering-{number}"))
        for parameter in handles[-1].parameters():
            parameter.data.normal_(0, 0.3)

    def results():
        found = []
        for task in (CHOICES, TEXTS):
            for one in handles:
                for other in handles:
                    other.enabled = other is one
                found.append(evaluate(model, tokenizer, task).predictions)
        return found

    expected = results()
    with prefix_cache() as cache:
        found = results()
    assert cache.counts["tokens_reused"] == 2 * cache.counts["tokens_computed"] > 0
    assert found == expected  # the batches are the same, so to the bit
    assert expected[0] != expected[1]


def test_generation_is_computed_as_always():
    model = steered()
    expected = evaluate(model, tokenizer, toy, "validation").predictions
    with prefix_cache() as cache:
        assert evaluate(model, tokenizer, toy, "validation").predictions == expected
    assert not cache.counts


@pytest.mark.parametrize("at", ["block", "mlp", "heads"])
@pytest.mark.parametrize("mode", ["sequential", "teacher_forced"])
def test_fit_oracle_at_several_ranks(at, mode):
    base = tiny_model("llama", num_hidden_layers=4)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    mask = (torch.arange(9) < torch.tensor([9, 9, 8, 7, 5, 3])[:, None]).long()
    batches = [
        {"input_ids": torch.randint(3, 100, (6, 9), generator=generator), "attention_mask": mask}
        for _ in range(4)
    ]
    options = dict(at=at, mode=mode, layers=[2, 3])

    def fitted(rank):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tokens are few
            steering = fit_oracle(base, tuned, batches, rank=rank, **options)
        maps = [parameter.detach().clone() for parameter in steering.parameters()]
        steering.remove()
        return maps

    expected = [fitted(rank) for rank in (1, 2)]
    with prefix_cache() as cache:
        found = [fitted(rank) for rank in (1, 2)]
    assert cache.counts["tokens_reused"] >= cache.counts["tokens_computed"] > 0
    for ours, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_a_grid_shares_the_prefix(tmp_path):
    task = {"name": "listops", "length": 6, "depth": 1, "n_train": 48, "n_validation": 20}
    experiment = Experiment(
        "grid",
        ("listops-llama",),
        {"listops": {**task, "n_test": 20}},
        {
            "linear": Arm("post_block_linear", (1e-2, 3e-2), {"rank": 2, "layers": [3]}),
            "vector": Arm("post_block_vector", (1e-2,), {"layers": [3]}),
        },
        {"batch_size": 16},
        sweep_seeds=(0,),
        seeds=(0,),
        widen=0,
    )
    written = []
    for name, cached in (("with", "auto"), ("without", False)):
        one = replace(experiment, training={"batch_size": 16, "cache_prefix": cached})
        store = run_grid(one, tmp_path / name, say=None)
        assert not (store.folder / "prefix").exists()
        records = [r for r in store.records() if r["kind"] in ("run", "test")]
        assert all(record["status"] == "done" for record in records)
        written.append([(r["kind"], r["accuracy"], r.get("loss")) for r in records])
    for ours, other in zip(*written, strict=True):
        assert ours[:2] == other[:2]
        assert ours[2] is None or abs(ours[2] - other[2]) <= ROUNDING * other[2]


# When it must not be used

IDS = torch.tensor([[5, 17, 42, 8, 77, 23], [61, 3, 90, 12, 55, 31]])


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def test_what_acts_below_is_noticed():
    model = steered(tiny_model("llama", num_hidden_layers=4))
    plain = logits(model)
    with prefix_cache() as cache, reuse_prefix(model, cache):
        assert torch.equal(logits(model), plain)
        for site in (Site(0, "block"), Site(1, "mlp"), Site(2, "heads")):
            with edit(model, {site: lambda h: h * 1.5}):
                assert not torch.equal(logits(model), plain)
        with edit(model, {Site(2, "block"): lambda h: h * 1.5}):  # at the end of the prefix
            assert not torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight += 0.1
        changed = logits(model)
    assert torch.equal(changed, logits(model)) and not torch.equal(changed, plain)


def other_tokens(module, args, kwargs):
    "A hook that changes the tokens on their way to the blocks."
    return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 100}


@pytest.mark.parametrize("path", ["", "model"])
def test_another_program_that_changes_tokens_is_noticed(path):
    model = steered(tiny_model("llama", num_hidden_layers=4))
    caller = model.get_submodule(path)
    plain = logits(model)
    with prefix_cache() as cache:
        with reuse_prefix(model, cache) as reused:
            logits(model)
            hook = caller.register_forward_pre_hook(other_tokens, with_kwargs=True)
            changed = logits(model)
            assert not torch.equal(changed, plain) and not reused.counts["tokens_reused"]
            hook.remove()
            assert torch.equal(logits(model), plain) and reused.counts["tokens_reused"]
        hook = caller.register_forward_pre_hook(other_tokens, with_kwargs=True)
        refused = pytest.raises(PrefixError, match="another program has a hook")
        with refused, reuse_prefix(model, cache):
            pass
        hook.remove()
        if path:
            caller.forward = lambda **kwargs: type(caller).forward(caller, **kwargs)
            refused = pytest.raises(PrefixError, match="forward was replaced")
            with refused, reuse_prefix(model, cache):
                pass


CHANGES = {
    "layers.0.self_attn": ("scaling", 1.0),
    "layers.1.input_layernorm": ("variance_epsilon", 1.0),
    "layers.2.mlp": ("note", "any text"),
}


@pytest.mark.parametrize("path", CHANGES)
def test_an_attribute_that_was_changed_is_noticed(path, tmp_path):
    "In a later context, also of another process."
    model = steered(tiny_model("llama", num_hidden_layers=4))
    for changed in (False, True):
        if changed:
            setattr(model.model.get_submodule(path), *CHANGES[path])
        plain = logits(model)
        with prefix_cache(tmp_path) as cache, reuse_prefix(model, cache):
            assert torch.equal(logits(model), plain) and "tokens_reused" not in cache.counts


def keep(folder, peft):
    "In a process: one pass, in another mode each time."
    model = steered(tiny_model("llama", num_hidden_layers=4))
    if peft:
        from peft import LoraConfig, get_peft_model

        options = LoraConfig(target_modules=["q_proj"], layers_to_transform=[3], r=2)
        model = get_peft_model(model, options)
        model.train()
        model.config._name_or_path = model.get_base_model().model.name_or_path = "elsewhere"
    with prefix_cache(folder) as cache, reuse_prefix(model, cache, layer=2):
        logits(model)
    print(json.dumps(cache.counts))


def test_a_later_process_in_another_mode_continues(tmp_path):
    done = [run(keep, str(tmp_path), peft) for peft in (False, True)]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    first, second = (json.loads(one.stdout.splitlines()[-1]) for one in done)
    assert first == {"tokens_computed": 12} and second["tokens_reused"] == 12


@pytest.mark.parametrize("layer", [0, 5])
def test_blocks_that_are_left_out_at_random(layer):
    "In training mode these passes are computed as always; in evaluation mode they are kept."
    model = steered(layer_drop(0.5), [layer])
    plain = logits(model)
    with prefix_cache() as cache, reuse_prefix(model, cache) as reused:
        model.train()
        passes = [logits(model) for _ in range(20)]
        assert not reused.counts and not all(torch.equal(one, plain) for one in passes)
        model.eval()
        assert all(torch.equal(logits(model), plain) for _ in range(2))
    assert reused.counts["tokens_reused"] == 12


def test_a_forecast_knows_what_a_training_cannot_keep():
    "`prefix_layers` raises what `fit` raises, without a forward pass."

    def embedding():
        model = steered()
        model.model.embed_tokens.weight.requires_grad_(True)
        return model

    only_embeddings = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.1}
    for build in (
        embedding,
        lambda: steered(tiny("gpt2", num_hidden_layers=4), [3]),
        lambda: steered(tiny("gpt2", num_hidden_layers=4, **only_embeddings), [3]),
        lambda: steered(layer_drop(0.1), range(1, 6)),
    ):
        with pytest.raises(PrefixError) as forecast:
            prefix_layers(build(), Plan([9], CONFIG), [])
        with pytest.raises(TrainError) as fitted:
            trained(build)
        assert str(forecast.value) in str(fitted.value)
    assert prefix_layers(steered(), Plan([9], CONFIG), []) == 3


def test_other_arguments_are_not_ignored():
    model = steered(tiny_model("llama", num_hidden_layers=4))
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    calls = [
        {"position_ids": torch.arange(6)[None] * 2},
        {"attention_mask": left},
        {"output_hidden_states": True},
    ]
    expected = [logits(model, **options) for options in calls]
    with prefix_cache() as cache, reuse_prefix(model, cache) as reused:
        logits(model)
        for options, other in zip(calls, expected, strict=True):
            assert torch.equal(logits(model, **options), other)
        states = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
        assert len({float(state.detach().sum()) for state in states}) == len(states)
        assert "tokens_reused" not in reused.counts


ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "mixtral", "mamba", "phi"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type):
    model = tiny_model(model_type)
    steering = steer(model, kind="vector", layers=[1])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    for parameter in steering.parameters():
        parameter.data.normal_()
    with torch.no_grad():
        expected = logits(model, attention_mask=mask)[mask.bool()]
        with prefix_cache() as cache, reuse_prefix(model, cache) as reused:
            for _ in range(2):
                found = logits(model, attention_mask=mask)[mask.bool()]
                assert torch.equal(found, expected)
            alone = logits(model, IDS[1:, :4])[0]
    assert reused.counts == {"tokens_computed": 10, "tokens_reused": 14, "block_passes_saved": 4}
    assert torch.allclose(alone, expected[6:], rtol=0, atol=1e-5)


GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("gemma3n_text", {}, "not .batch, seq"),  # several residual streams, streams first
        ("bloom", {}, "more than one tensor"),
        ("gpt_neo", {}, "more than one tensor"),
        # upper layers use the keys and values of a lower one
        ("gemma4_text", GEMMA4, "a trial with two short rows failed .KeyError"),
    ],
)
def test_architectures_that_are_refused(model_type, changes, message):
    model = tiny_model(model_type, **changes)
    steer(
        model, kind="vector", site="block" if model_type == "gemma3n_text" else "mlp", layers=[-1]
    )
    with pytest.raises(PrefixError, match=message), reuse_prefix(model, PrefixCache("none")):
        pass
    assert "forward" not in vars(blocks(model)[0])


def test_an_upper_block_that_reads_a_lower_one_is_found_by_measurement():
    model = steered(tiny_model("llama", num_hidden_layers=4), site="mlp")
    lower, upper = (model.model.layers[layer].mlp for layer in (0, 3))

    class Lower(type(lower)):
        def forward(self, x):
            self.latest = super().forward(x)
            return self.latest

    class Upper(type(upper)):
        def forward(self, x):
            return super().forward(x) + lower.latest.mean()

    lower.__class__, upper.__class__ = Lower, Upper
    with pytest.raises(PrefixError, match="logits differ"), reuse_prefix(model, PrefixCache("no")):
        pass


def test_an_older_record_can_be_read(tmp_path):
    run, _ = trained(steered)
    assert "the lowest 3 layers not computed again for" in run.summary()
    content = json.loads(run.save(tmp_path / "run.json").read_text())
    del content["prefix"], content["config"]["cache_prefix"], content["config"]["cache_limit"]
    (tmp_path / "run.json").write_text(json.dumps(content | {"schema": 5}))
    earlier = Run.load(tmp_path / "run.json")
    assert earlier.prefix is None and earlier.config.cache_prefix is False
    assert "not computed again" not in earlier.summary()
    assert issubclass(PrefixError, SteerError) and os.path.exists(tmp_path)


def test_a_copy_that_is_made_meanwhile_is_independent():
    model = steered(tiny_model("llama", num_hidden_layers=4))
    with prefix_cache() as cache, reuse_prefix(model, cache):
        plain = logits(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight += 0.1
        changed = logits(twin)
        assert torch.equal(logits(model), plain) and not torch.equal(changed, plain)
    assert torch.equal(logits(twin), changed)
    run = fit(twin, tokenizer, toy, CONFIG)
    assert run.prefix["layers"] == 3 and run.prefix["tokens_reused"] > 0


def test_random_below_in_training_mode_is_computed_as_always():
    model = steered(tiny_model("gpt2", num_hidden_layers=4), site="mlp")
    with prefix_cache() as cache, reuse_prefix(model, cache) as reused:
        model.train()
        assert not torch.equal(logits(model), logits(model)) and not reused.counts
        model.eval()
        assert torch.equal(logits(model), logits(model)) and reused.counts["tokens_reused"] == 12


def test_bfloat16_has_activations_of_its_own():
    "In one cache: those of a training in float32 are not used in bfloat16, and the other way."
    computed = []
    with prefix_cache():
        for precision in ("float32", "bfloat16", "float32", "bfloat16"):
            config = replace(ONE_BATCH, precision=precision)
            run, parameters = trained(steered, config)
            plain, expected = trained(steered, without(config))
            assert run.curve == plain.curve and run.prefix["tokens_reused"] > 0
            assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))
            computed.append(run.prefix["tokens_computed"])
    assert computed[0] == computed[1] > 0 and computed[2:] == [0, 0]
