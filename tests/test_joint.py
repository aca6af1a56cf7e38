"Joint training step by step: learning rates and windows, what is projected when, and saving."

import math
import warnings

import pytest
import torch
from toy import tiny, tokenizer, toy

from steer_nb.core.loading import load_steering
from steer_nb.core.sites import Site
from steer_nb.methods.joint import JointConfig, joint
from steer_nb.methods.registry import apply_method, load_method
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit

PARTS = ("weights", "activations")


def train(config, look=lambda *_: None, model=None, **changes):
    "A joint method trained for 20 steps, with `look(method, step, optimizer)` after each."
    method = joint(tiny() if model is None else model, config)
    after_step = method.after_step

    def watched(step, ends_epoch, optimizer):
        after_step(step, ends_epoch, optimizer)
        look(method, step, optimizer)

    method.after_step = watched
    options = {"lr": 1e-2, "epochs": 5, "batch_size": 8, **changes}
    return method, fit(method, tokenizer, toy, TrainConfig(**options))


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def equal(some, others):
    return all(map(torch.equal, some, others))


# Rates and schedules


def rates_by_hand(schedule, top, steps, warmup_ratio):
    "The rate of each step: linear warm-up to `top`, then decay to what would be 0 one step later."
    warmup = round(warmup_ratio * steps)
    rates = []
    for step in range(1, steps + 1):
        if step < warmup:
            rates.append(top * step / warmup)
            continue
        done = (step - warmup) / (steps + 1 - warmup)
        decay = {
            "constant": 1,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        rates.append(top * decay[schedule])
    return rates


@pytest.mark.parametrize(
    "weights, activations",
    [
        (("cosine", 0.1, (0.25, 1.0)), ("constant", 2.0, (0.0, 0.5))),
        (("linear", 0.5, (0.0, 1.0)), ("cosine", 1.0, (0.0, 1.0))),
        ((None, 0.2, (0.0, 0.75)), ("linear", 3.0, (0.5, 1.0))),
    ],
)
def test_each_part_moves_at_the_rate_of_its_own_schedule(weights, activations):
    """The optimizer's rates, and the moves: AdamW moves each number by rate · m / (√v + ε).

    Tolerance of the latter, in float64: moves of 1e-5 of numbers of size 0.1, each rounded."""
    options = {
        f"{part}_{name}": value
        for part, values in zip(PARTS, (weights, activations), strict=True)
        for name, value in zip(("schedule", "lr", "window"), values, strict=True)
    }
    config = JointConfig(rank=2, weight_rank=2, project="never", **options)
    reported, measured = [], []
    before = [copies(group.parameters) for group in joint(tiny().double(), config).groups()]

    def direction(state):
        if not state:
            return 0.0  # the optimizer has not updated this parameter yet
        step, m, v = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        return float(update.abs().sum())

    def look(method, step, optimizer):
        reported.append([group["lr"] for group in optimizer.param_groups])
        rates = []
        for group, old in zip(optimizer.param_groups, before, strict=True):
            pairs = zip(group["params"], old, strict=True)
            moved = sum(float((p - start).abs().sum()) for p, start in pairs)
            expected = sum(direction(optimizer.state.get(p)) for p in group["params"])
            rates.append(moved / (expected or 1))
        measured.append(rates)
        before[:] = [copies(group["params"]) for group in optimizer.param_groups]

    _, run = train(config, look, tiny().double(), schedule="cosine", warmup_ratio=0.2)

    expected = []
    for schedule, share, (first, last) in (weights, activations):
        first, last = round(20 * first), round(20 * last)
        rates = rates_by_hand(schedule or "cosine", 1e-2 * share, last - first, 0.2)
        expected.append([0.0] * first + rates + [0.0] * (20 - last))
    assert len(reported) == len(expected[0]) == 20 and expected[0] != expected[1]
    by_step = list(zip(*expected, strict=True))
    for step, (rates, done, right) in enumerate(
        zip(reported, measured, by_step, strict=True), start=1
    ):
        assert rates == pytest.approx(right, rel=1e-12), step
        assert done == pytest.approx(right, rel=1e-9), step
    highest = [max(pair) for pair in by_step]
    assert [point["lr"] for point in run.curve] == pytest.approx(highest, rel=1e-12)


# The projection, measured from the parameters and their names


def gemma():
    "A model with a norm between the last projection and the stream, its gain not one."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.normal_(std=0.3)
    return model


MODELS = {"llama": tiny, "gpt2": lambda: tiny("gpt2"), "gemma": gemma}
LAST = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gemma": "model.layers.{}.mlp.down_proj",
}


def written(method, name, layer):
    "What the LoRA part writes in a block, (hidden, …): by hand, from the parameters."
    parameters = {path: p.detach().double() for path, p in method.model.named_parameters()}
    path = LAST[name].format(layer)
    if method.config.weights == "full":
        start = dict(MODELS[name]().named_parameters())[f"{path}.weight"]  # the same seed
        X = parameters[f"{path}.weight"] - start.detach().double()
        X = X.T if name == "gpt2" else X
    else:
        base, A, B = (
            parameters[f"base_model.model.{path}.{part}.weight"]
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        X = B
        if method.config.weights == "dora":
            norm = parameters[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
            merged = (base.T if name == "gpt2" else base) + 2 * B @ A
            X = B * (norm / merged.norm(dim=1))[:, None]
    if name == "gemma":
        gain = f"layers.{layer}.post_feedforward_layernorm"
        X = X * (1 + next(p for key, p in parameters.items() if gain in key))[:, None]
    return X


def share(rows, X):
    "‖rows X‖ / (‖rows‖ ‖X‖)."
    rows = rows.detach().double()
    return float((rows @ X).norm() / (rows.norm() * X.norm()).clamp(min=1e-30))


def read(method, name="llama"):
    "The largest share of a block that D reads of what the LoRA part writes there."
    readings = [method.steering.adapters[Site(layer, "block")].down for layer in range(2)]
    return max(share(D, written(method, name, layer)) for layer, D in enumerate(readings))


def momentum_read(method, optimizer):
    "The same of D's momentum in the optimizer."
    readings = [method.steering.adapters[Site(layer, "block")].down for layer in range(2)]
    momenta = [optimizer.state[D]["exp_avg"] for D in readings]
    return max(share(m, written(method, "llama", layer)) for layer, m in enumerate(momenta))


@pytest.mark.parametrize("momentum", [True, False])
def test_the_momentum_is_projected_with_the_steering_unless_it_is_switched_off(momentum):
    seen = []

    def look(method, step, optimizer):
        seen.append((read(method), momentum_read(method, optimizer)))

    train(JointConfig(rank=3, weight_rank=3, momentum=momentum), look)
    assert max(value for value, _ in seen) < 1e-6  # float32
    assert (max(value for _, value in seen) < 1e-6) == momentum


def test_random_directions_are_removed_as_a_control():
    """What D reads of a random space of LoRA's rank is removed; it still reads what LoRA writes.

    Its 32 trained rows span all that it may read, so the rank of D counts what was removed."""
    config = JointConfig(rank=32, weight_rank=3, directions="random")
    method, _ = train(config)
    other = train(JointConfig(rank=32, weight_rank=3))[0]
    for layer in method.bases():
        for one, written in ((method, False), (other, True)):
            reading = one.reading(layer).detach().double()
            values = torch.linalg.svdvals(reading)
            assert int((values > 1e-6 * values[0]).sum()) == reading.shape[1] - 3
            overlap = (reading @ one.bases()[layer].double()).norm() / reading.norm()
            assert (overlap < 1e-6) == written


@pytest.mark.parametrize(
    "options, due",
    [
        (dict(), set(range(1, 21))),
        (dict(every=4), {4, 8, 12, 16, 20}),
        (dict(project="epoch"), {4, 8, 12, 16, 20}),
        (dict(project="once", every=4), {4}),
        (dict(project="never"), set()),
        (dict(project="penalty", penalty=0.1), set()),
    ],
)
def test_the_steering_is_projected_when_it_is_due(options, due):
    "An epoch has four steps."
    seen = {}

    def look(method, step, optimizer):
        seen[step] = read(method)

    train(JointConfig(rank=3, weight_rank=3, **options), look)
    assert {step for step, value in seen.items() if value < 1e-6} == due


def test_the_penalty_pulls_the_two_apart():
    method, _ = train(JointConfig(rank=3, weight_rank=3, project="penalty", penalty=1.0))
    free, _ = train(JointConfig(rank=3, weight_rank=3, project="never"))
    assert read(method) < read(free) / 2


@pytest.mark.parametrize("weights", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_lora_update_is_projected_while_the_steering_is_frozen(name, weights):
    """After its window the steering does not change by a bit, and the update is orthogonal to D.

    With "full" that is the whole update; before, D is projected onto the complement of its leading
    directions only. Tolerance: B, W and D are rounded to float32."""
    seen, halfway, momentum = {}, {}, []

    def look(method, step, optimizer):
        seen[step] = read(method, name)
        if step == 10:
            for part, group in zip(PARTS, method.groups(), strict=True):
                halfway[part] = copies(group.parameters)
        if step > 10:
            assert equal(halfway["activations"], copies(method.steering.parameters())), step
        if step == 20 and weights == "lora" and name == "llama":
            for layer, writer in method.writers.items():
                D = method.steering.adapters[Site(layer, "block")].down
                momentum.append(share(D, optimizer.state[writer.parameter]["exp_avg"].double()))

    config = JointConfig(weights=weights, rank=3, weight_rank=3, activations_window=(0.0, 0.5))
    method, _ = train(config, look, MODELS[name]())
    assert len(seen) == 20
    assert all(value < 1e-6 for step, value in seen.items() if step > 10 or weights != "full")
    assert max(method.overlap().values()) < 1e-5
    assert all(value < 1e-6 for value in momentum)
    assert not equal(halfway["weights"], copies(method.weights.values()))
    if weights == "lora":
        config = JointConfig(rank=3, weight_rank=3, activations_window=(0.0, 0.5), project="never")
        free, _ = train(config, model=MODELS[name]())
        assert read(free, name) > 1e-2  # without a projection they overlap


@pytest.mark.parametrize(
    "project, every, due",
    [
        ("steps", 4, {12, 16, 20}),
        ("epoch", 1, {12, 16, 20}),
        ("once", 14, {14}),
        ("never", 1, set()),
        ("penalty", 1, set()),
    ],
)
def test_the_lora_update_is_projected_when_it_is_due(project, every, due):
    "The steering is frozen after step 10; `once` comes while it is frozen."
    seen = {}

    def look(method, step, optimizer):
        seen[step] = read(method)

    config = JointConfig(
        rank=3, weight_rank=3, project=project, every=every, activations_window=(0.0, 0.5)
    )
    train(config, look)
    assert {step for step, value in seen.items() if step > 10 and value < 1e-6} == due


def test_nothing_is_projected_before_the_steering_starts_or_after_both_parts_end():
    seen, D = {}, {}

    def look(method, step, optimizer):
        seen[step] = read(method)
        D[step] = copies(method.steering.parameters())

    method, _ = train(JointConfig(rank=3, weight_rank=3, activations_window=(0.5, 1.0)), look)
    new = copies(joint(tiny(), method.config).steering.parameters())
    assert all(equal(new, D[step]) and seen[step] > 1e-2 for step in range(2, 11))
    assert not equal(new, D[11]) and all(seen[step] < 1e-6 for step in range(11, 21))

    everything = {}

    def watch(method, step, optimizer):
        everything[step] = copies(p for group in method.groups() for p in group.parameters)

    windows = dict(weights_window=(0.0, 0.5), activations_window=(0.0, 0.5))
    train(JointConfig(rank=3, weight_rank=3, **windows), watch)
    assert not equal(everything[9], everything[10])
    assert all(equal(everything[10], everything[step]) for step in range(11, 21))


@pytest.mark.parametrize("project", ["steps", "once", "epoch"])
def test_nothing_is_projected_while_lora_writes_nothing(project):
    method = joint(tiny_model("llama"), JointConfig(project=project))
    adapters = method.steering.adapters.values()
    before = copies(adapter.down for adapter in adapters)
    optimizer = torch.optim.AdamW([{"params": group.parameters} for group in method.groups()])
    with torch.no_grad():
        method.after_step(1, True, optimizer)
        assert equal(before, [adapter.down for adapter in adapters])
        for writer in method.writers.values():
            writer.parameter.normal_()
        method.after_step(1, True, optimizer)
    for start, adapter in zip(before, adapters, strict=True):
        assert not torch.equal(start, adapter.down)


@pytest.mark.parametrize(
    "options",
    [
        dict(weights_window=(0.0, 0.5), activations_window=(0.0, 0.5), project="once", every=15),
        dict(project="once", every=1000),
    ],
)
def test_a_projection_that_was_never_made_gives_a_warning(options):
    with pytest.warns(UserWarning, match="nothing was projected"):
        train(JointConfig(rank=2, weight_rank=2, **options))


def test_a_projection_that_was_made_gives_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*projected")
        train(JointConfig(rank=2, weight_rank=2, project="once"))


def test_the_projection_holds_with_a_norm_before_the_stream():
    "Gemma's post-norm: D is orthogonal to what LoRA adds after the norm, and not to B itself."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.normal_()
    method = joint(model, JointConfig(weight_rank=2, rank=3))
    with torch.no_grad():
        for writer in method.writers.values():
            writer.parameter.normal_()
    method.project_steering()
    layers = method.model.base_model.model.model.layers
    for layer, writer in method.writers.items():
        norm, D = layers[layer].post_feedforward_layernorm, method.reading(layer)
        B = writer.parameter
        y = torch.randn(1000, 32)  # what the projection computes without LoRA
        shifted = y + torch.randn(1000, 2) @ B.T
        # times the RMS, which the norm divides by: what remains is linear
        size, shifted_size = (x.square().mean(-1, keepdim=True).sqrt() for x in (y, shifted))
        added = norm(shifted) * shifted_size - norm(y) * size
        # float32, and the norm's epsilon
        assert (added @ D.T).norm() / (added.norm() * D.norm()) < 1e-5
        assert (B.T @ D.T).norm() / (B.norm() * D.norm()) > 1e-2


# Partners, and saving


@pytest.mark.parametrize(
    "options",
    [
        dict(weight_rank=4),
        dict(weights="dora", weight_rank=4),
        dict(weights="full", weight_layers=[1]),
        dict(kind="nonlinear"),
    ],
    ids=str,
)
def test_every_partner_trains_stays_apart_and_is_saved(options, tmp_path):
    input_ids = torch.arange(3, 11)[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids).logits

    method, run = train(JointConfig(rank=4, **options))
    assert max(method.overlap().values()) < 1e-5
    assert run.best_loss < run.validation[0]["loss"]
    method.save(tmp_path / "joint")
    loaded = load_method(tiny(), tmp_path / "joint")
    assert torch.equal(logits(loaded.model), logits(method.model))
    with method.only("activations"):
        activations = logits(method.model)
    alone = tiny()  # the steering on the weights as they were before training
    load_steering(alone, tmp_path / "joint", check_base=options.get("weights") != "full")
    assert torch.equal(logits(alone), activations)


def test_experts_train_jointly_without_a_projection():
    method = apply_method(tiny_model("mixtral"), "joint", project="never")
    input_ids = torch.arange(3, 11)[None]
    method.model(input_ids).logits.square().mean().backward()
    for group in method.groups():
        assert any(p.grad is not None and p.grad.any() for p in group.parameters)
