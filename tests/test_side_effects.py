"""Side effects are compared with the definitions, computed for one text at a time.

All in float64: 1e-9 is far above the rounding of other batch shapes, and far below any effect."""

import math
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from toy import tiny, tokenizer

from steer_nb import METHODS, Example, SideEffects, apply_method, evaluate, side_effects, steer
from steer_nb.core.passes import prompt_ends
from steer_nb.core.steering import steerings
from steer_nb.data.examples import TaskError
from steer_nb.data.wheels import AssetError
from steer_nb.evaluation.choices import EvaluateError
from steer_nb.testing.toy_task import toy_task
from steer_nb.training.method import Method
from steer_nb.training.saving import other_parameters

TEXTS = ["1 2 3 4 5", "max of 3 7 = 7", "9 8 7 6 5 4 3 2 1 0 max of 1", "5 5", "0 1 2 3 4 5 6 7"]
EXACT = 1e-9


def perturb(method: Method, scale: float = 0.1) -> Method:
    "Change what is trained at random, the same each time."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return method


def steered(scale: float = 0.3):
    "A model with a steering that acts."
    model = tiny().double()
    steering = steer(model, rank=4)
    perturb(Method(model), scale)
    return model, steering


@torch.no_grad()
def log_probabilities(model, ids: list[int], prompt: int = 1) -> torch.Tensor:
    "Of the token after each; the steering takes the first so many as the prompt."
    with prompt_ends(model, prompt):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def continuation(model, ids: list[int], new_tokens: int) -> list[int]:
    "Greedy tokens, with the token that ends them."
    new = []
    while len(new) < new_tokens and tokenizer.eos_token_id not in new:
        new.append(int(log_probabilities(model, ids + new, len(ids))[-1].argmax()))
    return new


def by_hand(unchanged, changed, text: str, new_tokens: int) -> dict:
    "The numbers of one text, from two pairs of a model and a context in which it is used."
    ids, found = tokenizer(text).input_ids, []
    for model, context in (unchanged, changed):
        with context():
            new = continuation(model, ids[: len(ids) // 2], new_tokens)
            found.append((log_probabilities(model, ids), new))
    (p, old), (q, new) = found
    pairs = list(zip(old, new, strict=False))
    differ = [n for n, (a, b) in enumerate(pairs) if a != b]
    return {
        "tokens": len(ids) - 1,
        "kl": sum(float((p[n].exp() * (p[n] - q[n])).sum()) for n in range(len(ids) - 1)),
        "before": -sum(float(p[n, ids[n + 1]]) for n in range(len(ids) - 1)),
        "after": -sum(float(q[n, ids[n + 1]]) for n in range(len(ids) - 1)),
        "steps": max(len(old), len(new)),
        "equal": sum(a == b for a, b in pairs),
        "prefix": differ[0] if differ else len(pairs),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_one_text_at_a_time_by_hand(batch_size):
    model, steering = steered()
    found = side_effects(model, steering, TEXTS, tokenizer, new_tokens=6, batch_size=batch_size)
    sides = (model, steering.disabled), (model, nullcontext)
    rows = [by_hand(*sides, text, 6) for text in TEXTS]
    for row, expected in zip(found.texts, rows, strict=True):
        assert row.keys() == expected.keys()
        assert all(abs(row[name] - expected[name]) < EXACT for name in row)
    tokens = sum(row["tokens"] for row in rows)
    before, after = (sum(row[name] for row in rows) / tokens for name in ("before", "after"))
    assert abs(found.kl - sum(row["kl"] for row in rows) / tokens) < EXACT
    assert abs(found.loss_change - (after - before)) < EXACT
    for value, nats in zip(found.perplexity, (before, after), strict=True):
        assert abs(value - math.exp(nats)) < 1e-6 * value
    steps = sum(row["steps"] for row in rows)
    assert found.agreement == sum(row["equal"] for row in rows) / steps
    assert found.agreed_tokens == sum(row["prefix"] for row in rows) / len(rows)
    assert 0 < found.agreement < 1  # else the last two lines could not fail
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high


def test_an_end_counts_as_a_token():
    "What the unchanged model says first is made the end token; the changed one never says it."
    model, steering = steered()
    ids = tokenizer("1 2 3 4").input_ids[:2]
    with steering.disabled():
        first = continuation(model, ids, 1)[0]
    assert first not in continuation(model, ids, 4)
    model.generation_config.eos_token_id = first
    row = side_effects(model, steering, ["1 2 3 4"], tokenizer, new_tokens=4).texts[0]
    assert (row["steps"], row["equal"], row["prefix"]) == (4, 0, 0)
    steering.strength = 0
    row = side_effects(model, steering, ["1 2 3 4"], tokenizer, new_tokens=4).texts[0]
    assert (row["steps"], row["equal"], row["prefix"]) == (1, 1, 1)


def base_of(name: str, method: Method):
    "The model to compare a method with: its own, or a copy if its weights are trained."
    return tiny().double() if other_parameters(method.model) else method.model


@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_method_has_no_effect_and_a_changed_one_has_that_of_its_model(name):
    method = apply_method(tiny().double(), name)
    base = base_of(name, method)
    fresh = side_effects(base, method, TEXTS, tokenizer, new_tokens=4)
    if name == "dora":  # its norms are computed again, with rounding
        assert abs(fresh.kl) < EXACT and abs(fresh.loss_change) < EXACT
    else:
        assert fresh.kl == fresh.loss_change == 0
    assert fresh.agreement == 1 and len(set(fresh.perplexity)) <= 1 + (name == "dora")
    perturb(method, 0.05)
    flags = [p.requires_grad for p in method.model.parameters()]
    found = side_effects(base, method, TEXTS, tokenizer, new_tokens=4)
    assert flags == [p.requires_grad for p in method.model.parameters()]
    sides = (tiny().double(), nullcontext), (method.model, nullcontext)
    expected = [by_hand(*sides, text, 4) for text in TEXTS]
    for row, own in zip(found.texts, expected, strict=True):
        assert all(abs(row[key] - own[key]) < EXACT for key in row), name


def test_of_several_steerings_one_or_all():
    model, first = steered()
    second = steer(model, name="second", kind="vector")
    next(second.parameters()).data.fill_(0.1)
    alone = side_effects(model, second, TEXTS, tokenizer, new_tokens=0)
    both = side_effects(model, None, TEXTS, tokenizer, new_tokens=0)
    sides = (tiny().double(), nullcontext), (model, nullcontext)
    expected = [by_hand(*sides, text, 0) for text in TEXTS]
    assert abs(both.kl * both.tokens - sum(row["kl"] for row in expected)) < EXACT
    assert 0 < alone.kl != both.kl and both.agreement is None
    second.remove()
    one = side_effects(model, first, TEXTS, tokenizer, new_tokens=0)
    assert one == side_effects(model, None, TEXTS, tokenizer, new_tokens=0)


def test_batches_of_tokens_need_no_tokenizer():
    model, steering = steered()
    batch = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    expected = side_effects(model, steering, TEXTS, tokenizer, new_tokens=4)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for batches in ([batch], [{"input_ids": batch["input_ids"][2:3]}]):
        found = side_effects(model, steering, batches, new_tokens=4)
        wanted = expected.texts if len(found.texts) == len(TEXTS) else expected.texts[2:3]
        for row, own in zip(found.texts, wanted, strict=True):
            assert all(abs(row[key] - own[key]) < EXACT for key in row)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[:, :-2] = -100
    labelled = side_effects(model, steering, [{**batch, "labels": labels}], new_tokens=0)
    assert [row["tokens"] for row in labelled.texts] == [2, 2, 2, 1, 2]


def test_the_completion_of_an_example_counts():
    model, steering = steered()
    example = Example("max of 3 7 =", " 7", (" 7", " 3"), 0, id="one")
    found = side_effects(model, steering, [example], tokenizer, new_tokens=3).texts[0]
    ids = tokenizer("max of 3 7 = 7").input_ids
    q, new = log_probabilities(model, ids, 5), continuation(model, ids[:-1], 3)
    with steering.disabled():
        p, old = log_probabilities(model, ids), continuation(model, ids[:-1], 3)
    assert found["tokens"] == 1
    assert abs(found["kl"] - float((p[-2].exp() * (p[-2] - q[-2])).sum())) < EXACT
    assert abs(found["after"] + float(q[-2, ids[-1]])) < EXACT
    assert found["equal"] == sum(a == b for a, b in zip(old, new, strict=False))


def test_a_long_text_is_cut_off_at_the_context():
    model = tiny("gpt2").double()  # 32 positions
    steering = steer(model, kind="vector")
    perturb(Method(model))
    long = " ".join("0123456789" * 5)
    cut = " ".join(long.split()[:32])
    found, expected = (
        side_effects(model, steering, [text], tokenizer, new_tokens=20).texts
        for text in (long, cut)
    )
    assert found == expected and found[0]["tokens"] == 31


def test_another_task_is_scored_with_and_without():
    model, steering = steered()
    task = toy_task(n_test=20)
    before, after = side_effects(model, steering, TEXTS, tokenizer, task=task, new_tokens=0).task
    assert after.predictions == evaluate(model, tokenizer, task).predictions
    with steering.disabled():
        assert before.predictions == evaluate(model, tokenizer, task).predictions
    assert before.predictions != after.predictions


def test_display():
    model, steering = steered()
    found = side_effects(model, steering, TEXTS, tokenizer, task=toy_task(n_test=4), new_tokens=4)
    assert isinstance(found, SideEffects) and f"KL {found.kl:.4f}" in repr(found)
    page = found._repr_markdown_()
    for part in ("nats per token", "perplexity", "of 4", "accuracy on digits, n = 4", "5 texts"):
        assert part in page
    assert len(found.frame()) == 5


WRONG = {
    "one text": (lambda m, s: side_effects(m, s, "1 2", tokenizer), TaskError, "a list of texts"),
    "no text": (lambda m, s: side_effects(m, s, [], tokenizer), TaskError, "at least one"),
    "one token": (lambda m, s: side_effects(m, s, ["1"], tokenizer), TaskError, "two tokens"),
    "one batch": (
        lambda m, s: side_effects(m, s, {"input_ids": torch.ones(1, 3)}),
        AssetError,
        "tokenizer=",
    ),
    "no tokenizer": (lambda m, s: side_effects(m, s, TEXTS), AssetError, "pass tokenizer="),
    "another model": (
        lambda m, s: side_effects(tiny(), s, TEXTS, tokenizer),
        EvaluateError,
        "on another model",
    ),
    "no steering": (
        lambda m, s: side_effects(tiny(), None, TEXTS, tokenizer),
        EvaluateError,
        "nothing to measure",
    ),
    "full": (
        lambda m, s: side_effects(m, apply_method(m, "full"), TEXTS, tokenizer),
        EvaluateError,
        "unchanged copy",
    ),
    "vocabulary": (
        lambda m, s: side_effects(m, tiny(vocab_size=40).double(), TEXTS, tokenizer),
        EvaluateError,
        "vocabularies",
    ),
    "new_tokens": (
        lambda m, s: side_effects(m, s, TEXTS, tokenizer, new_tokens=-1),
        EvaluateError,
        "new_tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call(*steered())


def test_a_steering_that_cannot_act():
    model, steering = steered()
    steering.enabled = False
    with pytest.raises(EvaluateError, match="disabled"):
        side_effects(model, steering, TEXTS, tokenizer)
    steering.remove()
    with pytest.raises(ValueError, match="removed"):
        side_effects(model, steering, TEXTS, tokenizer)


def test_after_an_error_the_model_is_as_before():
    method = apply_method(tiny().double(), "joint")
    model = method.model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    next(steerings(model)["joint"].parameters()).data.fill_(float("nan"))
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(EvaluateError, match="NaN for example 'text"):
        side_effects(model, None, TEXTS, tokenizer)
    assert steerings(model)["joint"].enabled and torch.is_grad_enabled()
    assert modes == [module.training for module in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)
