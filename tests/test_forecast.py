"""A forecast counts the passes that `fit` makes; measuring for it leaves the model as it was."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from toy import tiny, tokenizer, toy

from steer_nb.core.sites import blocks
from steer_nb.experiments.catalog import ScaleError
from steer_nb.experiments.forecast import (
    TrainingPasses,
    plan_training,
    training_memory,
    training_passes,
    training_seconds,
)
from steer_nb.experiments.machine import MeasuredTraining, measure_training
from steer_nb.experiments.part_costs import TERMS, Law, PartCost, PassShape
from steer_nb.methods.registry import apply_method
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit
from steer_nb.training.method import as_method

OPTIONS = {
    "epochs": {"epochs": 3, "batch_size": 4},
    "accumulated": {"batch_size": 2, "accumulation_steps": 3, "evaluations_per_epoch": 2},
    "tokens": {"batch_size": 8, "batch_tokens": 40},
    "stopped": {"epochs": 2, "batch_size": 4, "max_steps": 9},
    "all validation examples": {"batch_size": 4, "validation_share": None, "end_token": False},
}


TRIAL = 2 * 2 * 6  # tokens of the trial whether the model needs a mask for padding


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_passes_are_those_that_fit_makes(options):
    config = TrainConfig(seed=3, **options)
    method = apply_method(tiny(), "post_block", rank=2)
    passes = training_passes(method, tokenizer, toy, config)
    counts = {"tokens": -TRIAL, "logits": -TRIAL}

    def count(name, size):
        counts[name] += size.numel()

    model = method.model
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: count("tokens", args[0])
    )
    model.lm_head.register_forward_hook(lambda _, args, out: count("logits", out[..., 0]))
    run = fit(method, tokenizer, toy, config)
    every = passes.shapes + passes.validations * passes.validation
    assert counts["tokens"] == sum(shape.tokens for shape in every)
    assert counts["logits"] == sum(shape.rows for shape in every)
    assert len(passes.steps) == run.steps and passes.validations == len(run.validation)
    assert [epoch for epoch, _ in passes.steps] == [point["epoch"] for point in run.curve]


def state(model):
    "What a measurement could have changed."
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    parameters = {name: one.detach().clone() for name, one in model.named_parameters()}
    flags = [(one.requires_grad, one.grad) for one in model.parameters()]
    modes = [module.training for module in model.modules()]
    return parameters, (hooks, flags, modes, list(map(id, blocks(model))), torch.get_rng_state())


METHODS = {
    "lowest layer": ("post_block", {"rank": 2}),
    "highest layer": ("post_block", {"rank": 2, "layers": [-1]}),
    "last prompt token": ("loreft_last", {"rank": 2}),
    "heads": ("lofit", {}),
    "lora": ("lora", {"rank": 2}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("name, precision", [*product(METHODS, ["float32"]), ("lora", "bfloat16")])
def test_measuring_leaves_the_model_as_it_was(name, precision):
    method, options = METHODS[name]
    if name != "heads":
        trained = apply_method(tiny(), method, **options)
    else:  # its first stage
        trained = apply_method(tiny(), method, **options)
        next(iter(trained.stages()))
    parameters, rest = state(trained.model)
    measured = measure_training(
        trained, [PassShape(2, 8, 3), PassShape(2, 12, 4)], precision, seconds=0
    )
    after, rest_after = state(trained.model)
    assert parameters.keys() == after.keys()
    assert all(torch.equal(parameters[key], after[key]) for key in after)
    assert all(map(lambda ours, theirs: str(ours) == str(theirs), rest, rest_after))
    assert measured.trainable == sum(
        one.numel() for one in trained.model.parameters() if one.requires_grad
    )
    above = measured.blocks[-1]
    size = PassShape(2, 12, 4)
    assert above.forward(size) > 0 and above.graph(size) > 0 and above.backward(size) > 0
    frozen = measured.blocks[: max(0, measured.lowest)]
    assert len(frozen) == (1 if name == "highest layer" else 0)
    assert all(part.forward(size) > 0 and part.backward(size) == 0 for part in frozen)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3_moe", "mamba", "opt", "falcon_h1"])
def test_blocks_of_any_kind_are_measured(kind):
    trained = apply_method(tiny_model(kind), "post_block", rank=2)
    measured = measure_training(trained, [PassShape(2, 8, 4), PassShape(2, 16, 4)], seconds=0)
    size = PassShape(2, 16, 4)
    assert all(part.forward(size) > 0 for part in measured.blocks)
    assert measured.rest.backward(size) > 0


def test_a_law_reproduces_what_follows_it_and_never_falls():
    generator = torch.Generator().manual_seed(0)
    sizes = [
        PassShape(*torch.randint(1, 200, (3,), generator=generator).tolist()) for _ in range(6)
    ]
    law = Law(*torch.rand(4, generator=generator).tolist())
    found = Law.through(sizes, [law(size) for size in sizes])
    # Six exact points and four unknowns: only rounding is left.
    assert all(found(size) == pytest.approx(law(size), rel=1e-9) for size in sizes)
    noise = torch.rand(6, generator=generator).tolist()
    noisy = Law.through(sizes, noise)
    assert min(getattr(noisy, term) for term in TERMS) >= 0
    for longer in (PassShape(3, 50, 9), PassShape(4, 40, 9), PassShape(3, 40, 10)):
        assert noisy(longer) >= noisy(PassShape(3, 40, 9))


def part(seconds, kept):
    "Costs by tokens."
    laws = [Law(token=one) for one in seconds]
    return PartCost(*laws, working=Law(), kept=Law(token=kept), extra=Law())


TOY = MeasuredTraining(
    blocks=(part((1, 0, 0), 0), part((1, 1, 0.5), 10), part((1, 2, 3), 100)),
    rest=part((0.25, 0.5, 0.75), 0),
    lowest=1,
    first_step=7,
    later_step=5,
    first_use=0,
    kernels=0,
    first_touch=0,
    trained=(0, 4, 4),
    trained_elsewhere=0,
    largest=4,
    precision="float32",
    weighed=True,
    points=[],
    seconds=0,
)


def passes_of(epochs, tokens=100):
    shape = PassShape(1, tokens, 1)
    return TrainingPasses([(epoch, [shape]) for epoch in range(epochs)], [shape], epochs + 1)


def test_kept_blocks_are_computed_in_the_first_epoch_and_validation_only():
    passes = passes_of(3)
    whole = training_seconds(TOY, passes)
    assert whole["training"] == 7 + 2 * 5 + 3 * 100 * (1 + (1 + 2 + 0.5) + (0.5 + 3 + 0.75))
    assert whole["validation"] == 4 * 100 * 3.25
    assert training_seconds(TOY, passes, cached=0) == whole
    one = training_seconds(TOY, passes, cached=1)  # the blocks below the lowest steered one
    assert whole["training"] - one["training"] == 2 * 100 * 1
    assert whole["validation"] - one["validation"] == 3 * 100 * 1
    two = training_seconds(TOY, passes, cached=2)  # and that one, whose adapter is after it
    assert one["training"] - two["training"] == 2 * 100 * 1
    with pytest.raises(ScaleError, match="cached"):
        training_seconds(TOY, passes, cached=3)
    assert training_seconds(TOY, passes_of(1), cached=2)["training"] == pytest.approx(
        training_seconds(TOY, passes_of(1))["training"]
    )


def test_longer_and_more_passes_need_more():
    for few, many in ((passes_of(2), passes_of(3)), (passes_of(2), passes_of(2, 120))):
        less, more = (training_seconds(TOY, one) for one in (few, many))
        assert less["training"] < more["training"] and less["validation"] < more["validation"]
    less, more = (training_memory(TOY, passes_of(2, tokens)) for tokens in (100, 120))
    assert sum(less.values()) < sum(more.values())


def test_memory_has_its_peak_where_the_parts_say():
    long = training_memory(TOY, passes_of(2))
    assert long["kept for the backward pass"] == 100 * (10 + 100)
    assert long["optimizer"] == 8 * 8 and long["best parameters"] == 4 * 8
    assert "optimizer" not in training_memory(TOY, passes_of(1))
    large = replace(TOY, trained_elsewhere=10**6, largest=10**6)
    update = training_memory(large, passes_of(1))
    assert update["gradients"] == 4 * large.trainable and update["temporary"] == 8 * 10**6


def test_a_forecast_of_a_training_says_all():
    config = TrainConfig(batch_size=4, epochs=2)
    forecast = plan_training(
        apply_method(tiny(), "lora", rank=2), tokenizer, toy, config, seconds=0
    )
    assert forecast.steps == 16 and forecast.validations == 3
    assert forecast.total == sum(forecast.seconds.values()) > 0
    assert "16 steps" in repr(forecast) and "seconds: training" in forecast._repr_markdown_()
    with pytest.raises(ScaleError, match="no training examples"):
        plan_training(as_method(tiny()), tokenizer, replace(toy, train=()), config)


@pytest.mark.parametrize("trained", ["model.norm.weight", "lm_head.weight"])
def test_what_is_above_all_blocks_is_planned_too(trained):
    model = tiny().requires_grad_(False)
    model.get_parameter(trained).requires_grad_(True)
    forecast = plan_training(as_method(model), tokenizer, toy, TrainConfig(max_steps=2), seconds=0)
    assert forecast.memory["kept for the backward pass"] == 0 < forecast.total
