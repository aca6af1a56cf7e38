"Joint training, step by step: the rates of the halves, and what is kept apart while one of them rests."

import math

import pytest
import torch
from test_train import TOY

from steer_nb.core.sites import Site
from steer_nb.methods.joint import JointConfig, joint
from steer_nb.methods.orthogonal import overlap
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.training.config import TrainConfig
from steer_nb.training.fit import fit

SPACE = {}
exec(TOY, SPACE)
HALVES = ("weights", "activations")


def train(config, look=lambda *_: None, model=None, **changes):
    "A joint method, trained for 20 steps with `look(method, step, optimizer)` after each, and the record."
    method = joint(SPACE["tiny"]() if model is None else model, config)
    own = method.after_step

    def after_step(step, ends_epoch, optimizer):
        own(step, ends_epoch, optimizer)
        look(method, step, optimizer)

    method.after_step = after_step
    return method, fit(
        method,
        SPACE["tokenizer"],
        SPACE["toy"],
        TrainConfig(**{"lr": 1e-2, "epochs": 5, "batch_size": 8, **changes}),
    )


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def alike(some, others):
    return all(map(torch.equal, some, others))


# Rates and schedules


def by_hand(schedule, top, steps, warmup_ratio):
    "The rate of each of so many steps: a rise to `top` in equal parts, and from there down to what would be 0 one step after the last."
    warmup = round(warmup_ratio * steps)
    rates = []
    for step in range(1, steps + 1):
        if step < warmup:
            rates.append(top * step / warmup)
        else:
            done = (step - warmup) / (steps + 1 - warmup)
            rates.append(
                top
                * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
                    schedule
                ]
            )
    return rates


@pytest.mark.parametrize(
    "weights, activations",
    [
        (("cosine", 0.1, (0.25, 1.0)), ("constant", 2.0, (0.0, 0.5))),
        (("linear", 0.5, (0.0, 1.0)), ("cosine", 1.0, (0.0, 1.0))),
        ((None, 0.2, (0.0, 0.75)), ("linear", 3.0, (0.5, 1.0))),
    ],
)
def test_each_half_moves_at_the_rate_of_its_own_schedule(weights, activations):
    """What the optimizer was told, and what it did: AdamW moves each number by the rate times m / (√v + ε), from its own m and v.

    Tolerance of the latter, in float64: moves of 1e-5 and less of numbers of size 0.1, each rounded."""
    options = {
        f"{half}_{name}": value
        for half, values in zip(HALVES, (weights, activations))
        for name, value in zip(("schedule", "lr", "window"), values)
    }
    config = JointConfig(rank=2, weight_rank=2, project="never", **options)
    told, did, before = (
        [],
        [],
        [copies(group.parameters) for group in joint(SPACE["tiny"]().double(), config).groups()],
    )  # the same seed

    def look(method, step, optimizer):
        told.append([group["lr"] for group in optimizer.param_groups])
        did.append(
            [
                sum(float((p - start).abs().sum()) for p, start in zip(group["params"], old))
                / (sum(map(direction, map(optimizer.state.get, group["params"]))) or 1)
                for group, old in zip(optimizer.param_groups, before)
            ]
        )
        before[:] = [copies(group["params"]) for group in optimizer.param_groups]

    def direction(state):
        if not state:
            return 0.0  # the optimizer has not had this parameter yet
        step, m, v = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        return float((m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)).abs().sum())

    _, run = train(config, look, SPACE["tiny"]().double(), schedule="cosine", warmup_ratio=0.2)

    expected = []
    for schedule, share, (first, last) in (weights, activations):
        first, last = round(20 * first), round(20 * last)
        expected.append(
            [0.0] * first
            + by_hand(schedule or "cosine", 1e-2 * share, last - first, 0.2)
            + [0.0] * (20 - last)
        )
    assert len(told) == len(expected[0]) == 20 and expected[0] != expected[1]
    for step, (rates, rates_done, mine) in enumerate(zip(told, did, zip(*expected)), start=1):
        assert rates == pytest.approx(mine, rel=1e-12), step
        assert rates_done == pytest.approx(mine, rel=1e-9), step
    assert [point["lr"] for point in run.curve] == pytest.approx(
        [max(pair) for pair in zip(*expected)], rel=1e-12
    )


# The projection while a half rests


def gemma():
    "A norm between the last projection and the stream, its gain not one."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.normal_(std=0.3)
    return model


MODELS = {"llama": SPACE["tiny"], "gpt2": lambda: SPACE["tiny"]("gpt2"), "gemma": gemma}
LAST = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gemma": "model.layers.{}.mlp.down_proj",
}


def read(method, name):
    "The largest ‖D X‖ / (‖D‖ ‖X‖) of a block, X what the weight half writes there: by hand, from the parameters and their names."
    parameters, found = dict(method.model.named_parameters()), []
    for layer in range(2):
        D = method.steering.adapters[Site(layer, "block")].down.detach().double()
        path = LAST[name].format(layer)
        if method.config.weights == "full":
            X = (
                (
                    parameters[f"{path}.weight"]
                    - dict(MODELS[name]().named_parameters())[f"{path}.weight"]
                )
                .detach()
                .double()
            )  # the same seed
            if name == "gpt2":
                X = X.T
        else:
            base, A, B = (
                parameters[f"base_model.model.{path}.{part}.weight"].detach().double()
                for part in ("base_layer", "lora_A.default", "lora_B.default")
            )
            X = B
            if method.config.weights == "dora":
                magnitude = (
                    parameters[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
                    .detach()
                    .double()
                )
                X = (
                    B
                    * (magnitude / ((base.T if name == "gpt2" else base) + 2 * B @ A).norm(dim=1))[
                        :, None
                    ]
                )
        if name == "gemma":
            X = (
                X
                * (
                    1
                    + next(
                        p
                        for key, p in parameters.items()
                        if f"layers.{layer}.post_feedforward_layernorm" in key
                    )
                    .detach()
                    .double()
                )[:, None]
            )
        found.append(float((D @ X).norm() / (D.norm() * X.norm()).clamp(min=1e-30)))
    return max(found)


@pytest.mark.parametrize("weights", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_give_way_to_a_steering_that_rests(name, weights):
    """After its window the steering stays to the bit, and what the weights write goes on to be orthogonal to D, in each step.

    Of "full" all of the update is then; before, D is projected onto the complement of its leading directions. Tolerance: B, W and D are rounded to float32."""
    seen, halfway, momentum = {}, {}, {}

    def look(method, step, optimizer):
        seen[step] = read(method, name)
        if step == 10:
            halfway.update(
                {half: copies(group.parameters) for half, group in zip(HALVES, method.groups())}
            )
        if step > 10:
            assert alike(halfway["activations"], copies(method.steering.parameters())), step
        if step == 20 and weights == "lora" and name == "llama":
            for layer in range(2):
                D = method.steering.adapters[Site(layer, "block")].down
                m = optimizer.state[method.writers[layer][0].lora_B["default"].weight]["exp_avg"]
                momentum[layer] = float((D @ m).norm() / (D.norm() * m.norm()))

    config = JointConfig(weights=weights, rank=3, weight_rank=3, activations_window=(0.0, 0.5))
    method, _ = train(config, look, MODELS[name]())
    assert (
        len(seen) == 20
        and all(value < 1e-6 for step, value in seen.items() if step > 10 or weights != "full")
        and max(overlap(method).values()) < 1e-5
    )
    assert all(value < 1e-6 for value in momentum.values())
    assert not alike(halfway["weights"], copies(method.weights.values()))
    if weights == "lora":
        free, _ = train(
            JointConfig(rank=3, weight_rank=3, activations_window=(0.0, 0.5), project="never"),
            model=MODELS[name](),
        )
        assert read(free, name) > 1e-2  # without a projection they do meet


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
def test_weights_give_way_when_the_projection_is_due(project, every, due):
    "The steering rests after step 10, an epoch has four steps, and the last `once` comes when the steering rests."
    seen = {}

    def look(method, step, optimizer):
        seen[step] = read(method, "llama")

    train(
        JointConfig(
            rank=3, weight_rank=3, project=project, every=every, activations_window=(0.0, 0.5)
        ),
        look,
    )
    assert {step for step, value in seen.items() if step > 10 and value < 1e-6} == due


def test_a_steering_before_its_window_is_left_alone():
    "It shifts nothing yet; from its first step on D is projected. And nothing moves while both halves rest."
    seen, D = {}, {}

    def look(method, step, optimizer):
        seen[step] = read(method, "llama")
        D[step] = copies(method.steering.parameters())

    method, _ = train(JointConfig(rank=3, weight_rank=3, activations_window=(0.5, 1.0)), look)
    new = copies(joint(SPACE["tiny"](), method.config).steering.parameters())
    assert all(alike(new, D[step]) and seen[step] > 1e-2 for step in range(2, 11)) and not alike(
        new, D[11]
    )
    assert all(seen[step] < 1e-6 for step in range(11, 21))

    everything = {}

    def watch(method, step, optimizer):
        everything[step] = copies(
            parameter for group in method.groups() for parameter in group.parameters
        )

    train(
        JointConfig(
            rank=3, weight_rank=3, weights_window=(0.0, 0.5), activations_window=(0.0, 0.5)
        ),
        watch,
    )
    assert not alike(everything[9], everything[10]) and all(
        alike(everything[10], everything[step]) for step in range(11, 21)
    )
