"""Sums and merges of steerings, against hooks that compute the same shifts one by one.

Float64 models: norms compute in float32 whatever the model's dtype, so that activations of two
routes agree to about 1e-7 relative; single adapters are compared at 1e-12."""

import copy

import numpy as np
import pytest
import torch

from steer_nb import (
    SteerError,
    capture,
    load_steering,
    merge_steerings,
    steer,
    steerings,
    sum_steerings,
    tiny_model,
)
from steer_nb.core.adapters import KINDS, AdapterError
from steer_nb.core.errors import SteeringError
from steer_nb.core.hooks import edit
from steer_nb.core.steering import SteeringSum
from steer_nb.testing.tiny_models import INPUT_IDS

EXACT = dict(rtol=0, atol=1e-12)  # float64: a few roundings of numbers near 1
AFFINE = ["vector", "linear", "full", "loreft", "direft", "scale"]
PAIRS = [(one, other) for one in AFFINE for other in AFFINE]


def model_of(model_type="gpt2", **changes):
    return tiny_model(model_type, num_hidden_layers=3, **changes).double()


def filled(model, name, strength=1.0, **options):
    "A steering with random parameters, different for each name."
    steering = steer(model, name=name, **options)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for parameter in steering.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(noise, alpha=0.2)
    steering.strength = strength
    return steering


def logits(model, enabled=()):
    "Of the model with only these steerings enabled."
    names = [steering.name for steering in enabled]
    for name, steering in steerings(model).items():
        steering.enabled = name in names
    with torch.no_grad():
        return model(INPUT_IDS).logits


def shift_of(steering, site, h):
    "What one adapter does to activations, by its own forward; zero where there is none."
    adapter = steering.adapters.get(site)
    return torch.zeros_like(h) if adapter is None else steering.strength * adapter(h)


def activations(steering, count=7):
    "Random activations for one adapter of each site."
    generator = torch.Generator().manual_seed(3)
    return {
        site: torch.randn(count, *adapter.shape, generator=generator, dtype=torch.float64)
        for site, adapter in steering.adapters.items()
    }


def assert_sum(total, weighted):
    "The shift is the sum of weight × shift at every site, for random activations."
    with torch.no_grad():
        for site, h in activations(total).items():
            expected = sum(weight * shift_of(one, site, h) for weight, one in weighted)
            torch.testing.assert_close(total.adapters[site](h), expected, **EXACT)


def assert_together(merged, ordered):
    "The shift is what the steerings do one after the other."
    with torch.no_grad():
        for site, h in activations(merged).items():
            after = h
            for one in ordered:
                after = after + shift_of(one, site, after)
            torch.testing.assert_close(merged.adapters[site](h), after - h, **EXACT)


@pytest.mark.parametrize("kinds", PAIRS, ids="+".join)
@pytest.mark.parametrize("site", ["block", "heads"])
def test_sums_and_merges_of_affine_kinds_are_exact(kinds, site):
    model = model_of()
    a = filled(model, "a", 0.7, kind=kinds[0], site=site, rank=2)
    b = filled(model, "b", -1.3, kind=kinds[1], site=site, rank=3, bias=kinds[1] == "linear")
    assert_sum(sum_steerings(a + 0.5 * b), [(1, a), (0.5, b)])
    assert_together(merge_steerings([a, b]), [a, b])


def test_the_kind_and_the_rank_of_a_sum():
    model = model_of()
    one = {kind: filled(model, kind, kind=kind, rank=3) for kind in KINDS}

    def found(*kinds):
        config = sum_steerings(
            sum(one[kind] for kind in kinds), name="-".join(["sum", *kinds])
        ).config
        return config.kind, config.rank, config.bias

    assert found("vector")[0] == "vector" and found("scale")[0] == "scale"
    assert found("linear") == ("linear", 3, False)
    assert found("linear", "vector") == ("linear", 3, True)
    assert found("linear", "loreft", "direft") == ("linear", 9, True)
    assert found("full", "linear")[0] == found("scale", "linear")[0] == "full"
    assert found("full", "vector") == ("linear", 32, True)  # the width is 32
    assert found("nonlinear", "vector") == ("nonlinear", 3, True)


def test_the_effect_on_the_model_is_that_of_hooks_on_the_unsteered_activation():
    model = model_of("llama")
    a = filled(model, "a", 0.6, rank=2)
    b = filled(model, "b", kind="loreft", rank=3, layers=[0, 2])
    c = filled(model, "c", kind="vector", layers=[1])
    total = sum_steerings(a - 2 * b + c / 4)

    def add(site):
        weighted = ((1, a), (-2, b), (0.25, c))
        return lambda h: h + sum(weight * shift_of(one, site, h) for weight, one in weighted)

    logits(model)  # all are disabled
    with edit(model, {site: add(site) for site in a.adapters}), torch.no_grad():
        expected = model(INPUT_IDS).logits
    torch.testing.assert_close(logits(model, [total]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["all", "last", "suffix:2"])
@pytest.mark.parametrize("site", ["block", "mlp", "attn", "heads"])
def test_a_merge_has_the_effect_of_the_steerings_together(site, positions):
    model = model_of("granite")  # its branches are multiplied before they are added
    where = {"site": site, "positions": positions}
    c = filled(model, "c", kind="vector", **where)
    a = filled(model, "a", 0.5, rank=2, **where)
    b = filled(model, "b", 2.0, kind="direft", rank=2, **where, layers=[1, 2])
    together = logits(model, [a, b, c])
    merged = merge_steerings([b, a, c])  # given in another order: that on the model counts
    torch.testing.assert_close(logits(model, [merged]), together, rtol=0, atol=1e-6)
    total = sum_steerings(a + b + c)
    assert (logits(model, [total]) - together).abs().max() > 1e-4  # it is something else


def test_for_vectors_the_sum_is_what_they_do_together():
    model = model_of()
    a, b = (filled(model, name, kind="vector") for name in "ab")
    together = logits(model, [a, b])
    total = sum_steerings(a + b)
    torch.testing.assert_close(logits(model, [total]), together, rtol=0, atol=1e-12)
    merged = merge_steerings([a, b])
    for site, adapter in total.adapters.items():
        assert torch.equal(adapter.vector, a.adapters[site].vector + b.adapters[site].vector)
        assert torch.equal(adapter.vector, merged.adapters[site].vector)


def test_nonlinear_adapters_of_one_activation_are_stacked():
    model = model_of()
    a = filled(model, "a", 0.5, kind="nonlinear", rank=2, activation="gelu", bias=True)
    b = filled(model, "b", kind="nonlinear", rank=3, activation="gelu", layers=[2])
    c = filled(model, "c", kind="vector", layers=[0, 1])
    total = sum_steerings(2 * b - a + c)
    assert (total.config.rank, total.config.activation) == (5, "gelu")
    assert_sum(total, [(-1, a), (2, b), (1, c)])


def test_missing_layers_and_heads_are_zero():
    model = model_of()
    a = filled(model, "a", kind="vector", layers=[0])
    b = filled(model, "b", rank=2, layers=[2])
    total = sum_steerings(a + b)
    assert total.config.layers == (0, 2)
    assert_sum(total, [(1, a), (1, b)])

    c = filled(model, "c", site="heads", rank=2, heads=[(0, 1), (0, 3), (2, 2)])
    d = filled(model, "d", kind="loreft", site="heads", rank=2, heads=[(0, 1), (0, 2), (1, 0)])
    together = logits(model, [c, d])
    merged = merge_steerings([c, d])
    assert merged.config.heads == ((0, 1), (0, 2), (0, 3), (1, 0), (2, 2))
    torch.testing.assert_close(logits(model, [merged]), together, rtol=0, atol=1e-6)
    e = filled(model, "e", kind="vector", site="heads", layers=[1])
    wide = sum_steerings(c + e, name="wide")
    assert wide.config.heads is None and wide.config.layers == (0, 1, 2)
    one, other, both = logits(model, [c]), logits(model, [e]), logits(model, [wide])
    base = logits(model)
    assert not torch.allclose(one, base) and not torch.allclose(other, base)
    assert torch.allclose(both, logits(model, [c, e]), atol=1e-6)  # no head has both


def test_the_rules_of_arithmetic():
    model = model_of()
    a = filled(model, "a", 0.5, rank=2)
    b = filled(model, "b", kind="loreft", rank=2)
    c = filled(model, "c", kind="vector")
    same = {
        "commutative": (a + b, b + a),
        "associative": ((a + b) + c, a + (b + c)),
        "distributive": (3 * (a + b), 3 * a + 3 * b),
        "difference": (a - b, a + -1 * b),
        "quotient": ((a + b) / 4, 0.25 * a + 0.25 * b),
        "mean": (sum([a, b, c]) / 3, (a + b + c) / 3),
        "numpy": (np.float64(0.5) * a, a * 0.5),
        "repeated": (a + b + a, 2 * a + b),
        "zero": (a + 0 * b, a + b - b),
    }
    for name, (one, other) in same.items():
        one, other = sum_steerings(one, name=f"{name}-1"), sum_steerings(other, name=f"{name}-2")
        assert one.config == other.config
        with torch.no_grad():
            for site, h in activations(one).items():
                torch.testing.assert_close(one.adapters[site](h), other.adapters[site](h), **EXACT)
    nothing = sum_steerings(a - a, name="nothing")
    assert torch.equal(logits(model, [nothing]), logits(model))
    assert repr(a - 0.5 * (b + c)) == "1 * 'a' + -0.5 * 'b' + -0.5 * 'c'"
    first = a + b
    first * 2, first + c, -first  # none of these changes it
    assert isinstance(first, SteeringSum) and [weight for weight, _ in first.terms] == [1, 1]


def test_the_terms_and_the_model_stay_as_they_were(tmp_path):
    model = model_of()
    a, b = filled(model, "a", 0.5, rank=2), filled(model, "b", kind="vector", layers=[1])
    before, state = logits(model, [a, b]), copy.deepcopy(model.state_dict())
    total = sum_steerings(a + 2 * b)
    assert not total.enabled and total.strength == 1
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, before)  # a and b still act
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert (a.strength, a.enabled, b.strength) == (0.5, True, 1)

    steered = logits(model, [total])
    total.save(tmp_path / "total")
    for steering in (a, b, total):
        steering.remove()
    loaded = load_steering(model, tmp_path / "total")
    assert torch.equal(logits(model, [loaded]), steered)


def test_steerings_from_two_folders(tmp_path):
    source = model_of()
    for name in "ab":
        filled(source, name, 0.5, rank=2).save(tmp_path / name)
    model = model_of()
    a, b = (load_steering(model, tmp_path / name) for name in "ab")
    assert_sum(sum_steerings(a + 0.5 * b), [(1, a), (0.5, b)])


def test_the_result_can_be_trained_further():
    model = model_of().float()
    merged = merge_steerings([filled(model, "a", rank=2), filled(model, "b", rank=2)])
    logits(model, [merged])
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in merged.parameters())


def test_the_base_is_frozen_if_it_was():
    for freeze in (True, False):
        model = model_of()
        a = steer(model, kind="vector", name="a", freeze=freeze)
        sum_steerings(2 * a)
        own = [p for name, p in model.named_parameters() if ".steering." not in name]
        assert {parameter.requires_grad for parameter in own} == {not freeze}


def test_fewer_ranks_are_the_best_of_their_number():
    model = model_of()
    a, b = filled(model, "a", rank=3), filled(model, "b", kind="loreft", rank=4)
    exact, short = merge_steerings([a, b]), merge_steerings([a, b], name="short", rank=2)
    assert (short.config.kind, short.config.rank) == ("linear", 2) and not exact.rank_errors
    for site, adapter in exact.adapters.items():
        up, down, constant = (tensor.numpy() for tensor in adapter.affine())
        left, values, right = np.linalg.svd(up @ down)
        best = (left[:, :2] * values[:2]) @ right[:2]
        up, down, kept = (tensor.numpy() for tensor in short.adapters[site].affine())
        np.testing.assert_allclose(up @ down, best, atol=1e-12)
        np.testing.assert_allclose(kept, constant, atol=1e-12)
        lost = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        assert abs(short.rank_errors[site] - lost) < 1e-12 and lost > 0.01
    full = filled(model, "full", kind="full")
    assert sum_steerings(full + a, name="low", rank=5).config.kind == "linear"


def test_more_ranks_than_dimensions_are_not_kept():
    model = model_of()
    a, b = filled(model, "a", rank=20), filled(model, "b", rank=20)
    total = sum_steerings(a - b)
    assert total.config.rank == 32
    assert_sum(total, [(1, a), (-1, b)])


ERRORS = {
    "site": (lambda m: dict(a={}, b={"site": "mlp"}), "differ in site: 'a' has 'block', 'b'"),
    "positions": (lambda m: dict(a={}, b={"positions": "last"}), "differ in positions"),
    "jola": (lambda m: dict(a={}, b={"kind": "jola"}), "no adapter holds the kinds jola, linear"),
    "nonlinear": (lambda m: dict(a={}, b={"kind": "nonlinear"}), "linear, nonlinear together"),
    "activation": (
        lambda m: {
            "a": {"kind": "nonlinear", "activation": "relu"},
            "b": {"kind": "nonlinear", "activation": "tanh"},
        },
        "differ in activation",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_no_single_adapter_holds_is_an_error(case):
    options, message = ERRORS[case]
    model = model_of()
    a, b = (filled(model, name, **one) for name, one in options(model).items())
    keys, before = set(model.state_dict()), logits(model, [a, b])
    with pytest.raises(SteeringError, match=message):
        sum_steerings(a + b)
    assert set(model.state_dict()) == keys and list(steerings(model)) == ["a", "b"]
    assert torch.equal(logits(model, [a, b]), before)


def test_other_errors():
    model, other = model_of(), model_of()
    a, b, far = filled(model, "a", rank=2), filled(model, "b", kind="vector"), filled(other, "far")
    bent = filled(model, "bent", kind="nonlinear", rank=20)
    bent_too = filled(model, "bent-too", kind="nonlinear", rank=20)
    cases = {
        "has a steering 'a' already": lambda: sum_steerings(a + b, name="a"),
        "1 to 64 letters": lambda: sum_steerings(a + b, name="a b"),
        "'far' is on another model than 'a'": lambda: sum_steerings(a + far),
        "rank is 3; it must be an integer from 1 to 2": lambda: sum_steerings(a + b, rank=3),
        "rank= is for linear maps": lambda: sum_steerings(2 * b, rank=1),
        "the sum is of steerings": lambda: sum_steerings([a, b]),
        "'far' is on another model than 'b'": lambda: merge_steerings([b, far]),
        "merge each steering once, not a, a": lambda: merge_steerings([a, a]),
        "merge two or more steerings, not ": lambda: merge_steerings([a]),
        "not .Steering 'a'.*, 2 . 'b'": lambda: merge_steerings([a, 2 * b]),
        "'bent' is nonlinear": lambda: merge_steerings([b, bent]),
        "the weight of a steering is nan": lambda: float("nan") * a,
        "the weight of a steering is Steering": lambda: a * b,
    }
    keys = set(model.state_dict())
    for message, call in cases.items():
        with pytest.raises(SteeringError, match=message):
            call()
    with pytest.raises(AdapterError, match="rank 40 is more than the 32 dimensions"):
        sum_steerings(bent + bent_too)
    for wrong in (lambda: a + 1, lambda: 1 - a, lambda: a + None):
        with pytest.raises(TypeError):
            wrong()
    total = a + b
    b.remove()
    with pytest.raises(SteerError, match="'b' was removed"):
        sum_steerings(total)
    assert set(model.state_dict()) == {key for key in keys if "steer_b." not in key}


def test_capture_sees_the_sum_of_the_shifts():
    model = model_of()
    a, b = (filled(model, name, kind="vector", layers=[0]) for name in "ab")
    total, (site,) = sum_steerings(3 * a - b), a.adapters
    seen = {}
    for name, enabled in {"base": [], "total": [total]}.items():
        with capture(model, layers=[0]) as acts:
            logits(model, enabled)
        seen[name] = acts[site]
    expected = 3 * a.adapters[site].vector - b.adapters[site].vector
    moved = (seen["total"] - seen["base"]).flatten(0, 1)
    torch.testing.assert_close(moved, expected.expand_as(moved), **EXACT)


def test_layers_that_all_parts_skip():
    model = tiny_model("llama", num_hidden_layers=4)
    a, b = (
        steer(model, kind="vector", skip=skip, name=n) for n, skip in (("a", (0, 1)), ("b", (0,)))
    )
    assert [site.layer for site in sum_steerings(a + 0.5 * b).adapters] == [1, 2, 3]
    assert [site.layer for site in sum_steerings(2 * a, name="twice").adapters] == [2, 3]
