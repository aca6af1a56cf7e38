"""Vectors from contrasts, against NumPy on activations that are captured one text at a time.

Models are float64 where numbers are compared: norms compute in float32 whatever the model's dtype,
so that a batch and single texts agree to about 1e-7 relative."""

import numpy as np
import pytest
import torch

from steer_nb import (
    SteerError,
    capture,
    contrast_vector,
    load_steering,
    steer,
    steerings,
    sum_steerings,
    tiny_model,
)
from steer_nb.core.errors import SteeringError
from steer_nb.core.hooks import edit
from steer_nb.core.sites import Site, SiteError
from steer_nb.methods.contrast import (
    DIRECTIONS,
    ContrastError,
    held_out_scores,
    separation_row,
    steering_vector,
    text_activations,
)
from steer_nb.testing.toy_task import word_tokenizer

WORDS = [f"w{n}" for n in range(97)]  # with the special tokens 100, the tiny models' vocabulary
METHODS = list(DIRECTIONS)
CLOSE = dict(rtol=1e-6, atol=1e-8)  # the float32 norms of a float64 model


def tokenizer_of(side="right"):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.padding_side = side
    return tokenizer


def random_texts(count, seed, low=0, high=97):
    "Distinct texts of 2 to 9 words."
    chance = np.random.default_rng(seed)
    texts = {}
    while len(texts) < count:
        words = chance.integers(low, high, chance.integers(2, 10))
        texts[" ".join(f"w{word}" for word in words)] = None
    return list(texts)


POSITIVE, NEGATIVE = random_texts(12, 0, 0, 60), random_texts(12, 1, 40, 97)


def by_hand(model, texts, site, choose):
    "The mean over `choose(activations of one text)`, each text alone: (texts, *shape), NumPy."
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer_of()(text).input_ids])
        with torch.no_grad(), capture(model, site.at, [site.layer]) as acts:
            model(ids)
        found.append(choose(acts[site][0].numpy()).mean(0))
    return np.stack(found)


def numpy_vector(positive, negative, method):
    "The vector by other algorithms: eigenvectors for pca, Newton's method for the probe."
    gap = positive.mean(0) - negative.mean(0)
    if method == "mean":
        return gap
    if method == "pca":
        pairs = positive - negative
        unit = np.linalg.eigh(pairs.T @ pairs)[1][:, -1]
        return unit * (unit @ gap)
    rows, labels = np.concatenate([positive, negative]), np.repeat([1.0, 0.0], len(positive))
    centred = rows - rows.mean(0)
    z = np.column_stack([centred / np.sqrt((centred**2).mean()), np.ones(len(rows))])
    penalty = np.diag([1.0] * (z.shape[1] - 1) + [0.0])  # the intercept is free
    weights = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ weights))
        gradient = z.T @ (p - labels) + penalty @ weights
        hessian = (z * (p * (1 - p))[:, None]).T @ z + penalty
        weights -= np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-12
    unit = weights[:-1] / np.linalg.norm(weights[:-1])
    return unit * (unit @ gap)


CHOICES = {
    "last": lambda h: h[-1:],
    "all": lambda h: h,
    "prefix:2": lambda h: h[:2],
    "suffix:3": lambda h: h[-3:],
    "prefix:1+suffix:1": lambda h: h[[0, -1]],
}


@pytest.mark.parametrize("positions", CHOICES)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_vectors_are_those_of_numpy_on_single_texts(model_type, positions):
    model = tiny_model(model_type).double()
    for method in METHODS:
        found = contrast_vector(
            model, tokenizer_of(), POSITIVE, NEGATIVE, method, positions, layers="all", batch_size=5
        )
        assert list(found.adapters) == [Site(0, "block"), Site(1, "block")]
        for site, adapter in found.adapters.items():
            with found.disabled():
                acts = [
                    by_hand(model, texts, site, CHOICES[positions])
                    for texts in (POSITIVE, NEGATIVE)
                ]
            expected = numpy_vector(*acts, method)
            rtol = 1e-4 if method == "probe" else 1e-5  # L-BFGS stops at a gradient of 1e-8
            scale = np.abs(expected).max()
            np.testing.assert_allclose(adapter.vector.detach(), expected, rtol, atol=rtol * scale)
        found.remove()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "llama", "mamba", "xlnet"])
def test_padding_and_batches_change_nothing(model_type):
    model = tiny_model(model_type).double()
    texts = {str(number): text for number, text in enumerate(POSITIVE)}
    results = [
        text_activations(model, tokenizer_of(side), texts, "all", batch_size=size)
        for side, size in (("left", 12), ("right", 12), ("left", 1), ("right", 5))
    ]
    for other in results[1:]:
        for site, act in results[0].items():
            torch.testing.assert_close(other[site], act, **CLOSE)


def test_the_parts_of_pairs():
    model, tokenizer = tiny_model("gpt2").double(), tokenizer_of("left")
    pairs = {"short": ("w1 w2", "w3"), "long": ("w4 w5 w6", "w7 w8 w9 w10")}
    sizes = {"short": (2, 1), "long": (3, 4)}
    site = Site(1, "block")
    whole = [" ".join(pair) for pair in pairs.values()]
    for positions, choose in {
        "prompt": lambda h, prompt: h[:prompt],
        "completion": lambda h, prompt: h[prompt:],
        "last": lambda h, prompt: h[-1:],
        "all": lambda h, prompt: h,
        "suffix:2": lambda h, prompt: h[-2:],
    }.items():
        found = text_activations(model, tokenizer, pairs, positions)[site]
        expected = [
            by_hand(model, [text], site, lambda h, n=prompt, choose=choose: choose(h, n))[0]
            for text, (prompt, _) in zip(whole, sizes.values(), strict=True)
        ]
        np.testing.assert_allclose(found, np.stack(expected), **CLOSE)


def test_chat_messages():
    model, tokenizer = tiny_model("llama").double(), tokenizer_of()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w90' if m.role == 'user' else 'w91' }} {{ m.content }} <eos> "
        "{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
    )
    user = {"role": "user", "content": "w1 w2"}
    answered = [user, {"role": "assistant", "content": "w3 w4"}]
    site, texts = Site(0, "block"), {"asked": [user], "answered": answered}

    def expect(positions, *rows):
        found = text_activations(model, tokenizer, texts, positions)[site]
        expected = [by_hand(model, [text], site, choose)[0] for text, choose in rows]
        np.testing.assert_allclose(found, np.stack(expected), **CLOSE)

    question, whole = "w90 w1 w2 <eos> w91", "w90 w1 w2 <eos> w91 w3 w4 <eos>"
    expect("all", (question, lambda h: h), (whole, lambda h: h))
    expect("last", (question, lambda h: h[-1:]), (whole, lambda h: h[-1:]))
    expect("prompt", (question, lambda h: h), (whole, lambda h: h[:5]))
    del texts["asked"]
    expect("completion", (whole, lambda h: h[5:]))


@pytest.mark.parametrize("site", ["mlp", "attn", "heads"])
def test_other_sites(site):
    model = tiny_model("granite").double()  # it multiplies its branches
    found = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, site=site, layers=[1])
    (at,) = found.adapters
    with found.disabled():
        acts = [by_hand(model, texts, at, lambda h: h[-1:]) for texts in (POSITIVE, NEGATIVE)]
    expected = numpy_vector(*acts, "mean")
    assert found.adapters[at].vector.shape == expected.shape
    np.testing.assert_allclose(found.adapters[at].vector.detach(), expected, **CLOSE)
    assert found.config.kind == "vector" and found.config.site == site and found.strength == 1


def test_the_steering_adds_its_vector():
    model = tiny_model("llama").double()
    found = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, layers=[0])
    ids, (site,) = torch.tensor([[5, 6, 7]]), found.adapters
    found.strength = -2
    with torch.no_grad():
        steered = model(ids).logits
        with found.disabled(), edit(model, {site: lambda h: h - 2 * found.adapters[site].vector}):
            torch.testing.assert_close(model(ids).logits, steered, **CLOSE)
        with found.disabled():
            assert not torch.allclose(model(ids).logits, steered)


def planted(model, layer, direction, size=1.0):
    """Edits that add ±size·direction at one block, to the texts that contain w0 or w1.

    Returns a context manager."""
    seen = {}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(ids=kwargs["input_ids"]), with_kwargs=True
    )
    first = tokenizer_of()("w0").input_ids[0]

    def add(h):
        sign = (seen["ids"] == first).any(1).to(h) - (seen["ids"] == first + 1).any(1).to(h)
        return h + size * sign[:, None, None] * direction

    return edit(model, {Site(layer, "block"): add})


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found(method):
    model = tiny_model("llama", num_hidden_layers=3).double()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction /= direction.norm()
    bodies = random_texts(40, 2, 2)
    texts = [f"{mark} {body}" for mark, body in zip(["w0", "w1"] * 20, bodies, strict=True)]
    with planted(model, 1, direction):
        found = contrast_vector(
            model, tokenizer_of(), texts[::2], texts[1::2], method, layers="best"
        )
    assert found.separation.best == found.config.layers[0] >= 1
    rows = {row["layer"]: row for row in found.separation.rows}
    assert rows[1]["auroc"] == rows[1]["accuracy"] == 1 and rows[1]["low"] > 0.9
    assert rows[0]["auroc"] < 0.9
    found.remove()
    with planted(model, 1, direction):
        found = contrast_vector(model, tokenizer_of(), texts[::2], texts[1::2], method, layers=[1])
    vector = found.adapters[Site(1, "block")].vector.detach()
    cosine = vector @ direction / vector.norm()
    assert cosine > 0.99
    assert abs(vector @ direction - 2) < 0.1  # from −1 to 1; the texts themselves differ a little


@pytest.mark.parametrize("method", METHODS)
def test_the_length_is_the_gap_along_the_vector(method):
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(30, 8, generator=generator, dtype=torch.float64) + 1
    negative = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    vector = steering_vector(positive, negative, method)
    unit = vector / vector.norm()
    gap = (positive @ unit).mean() - (negative @ unit).mean()
    torch.testing.assert_close(vector.norm(), gap)
    torch.testing.assert_close(steering_vector(negative, positive, method), -vector)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("counts", [(11, 11), (3, 3), (9, 14)])
def test_held_out_numbers_by_loops(method, counts):
    if method == "pca" and counts[0] != counts[1]:
        return
    generator = torch.Generator().manual_seed(1)
    classes = [
        torch.randn(count, 6, generator=generator, dtype=torch.float64) + shift
        for count, shift in zip(counts, (0.5, 0), strict=True)
    ]
    folds = min(5, *counts)
    scores = [[], []]
    for label, acts in enumerate(classes):
        for number, act in enumerate(acts):
            fitted = [
                np.stack([a for n, a in enumerate(c.numpy()) if n % folds != number % folds])
                for c in classes
            ]
            if method == "probe":
                vector = steering_vector(*map(torch.from_numpy, fitted), method).numpy()
            else:
                vector = numpy_vector(*fitted, method)
            middle = (fitted[0].mean(0) + fitted[1].mean(0)) / 2
            scores[label].append((act.numpy() - middle) @ vector / (vector @ vector))
    found = held_out_scores(*classes, method)
    for own, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-8, atol=1e-8)
    row = separation_row(*classes, method)
    right = sum(score > 0 for score in scores[0]) + sum(score < 0 for score in scores[1])
    pairs = [high > low for high in scores[0] for low in scores[1]]
    assert row["accuracy"] == right / sum(counts) and row["low"] < row["accuracy"] < row["high"]
    assert abs(row["auroc"] - np.mean(pairs)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_random_labels_do_not_separate(method):
    "More dimensions than texts: a vector separates the texts that it comes from, not others."
    values, fitted = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randn(2, 40, 64, generator=generator, dtype=torch.float64)
        values.append(separation_row(*classes, method)["auroc"])
        vector = steering_vector(*classes, method)
        gaps = (classes[0] @ vector)[:, None] > classes[1] @ vector
        fitted.append(gaps.double().mean().item())
    # AUROC of 40 + 40 texts has a standard error of 0.065, the mean of 20 one of 0.015
    assert abs(np.mean(values) - 0.5) < 0.06
    if method != "pca":
        assert np.mean(fitted) > 0.85


def test_unequal_numbers_of_texts():
    model = tiny_model("llama")
    for method in ("mean", "probe"):
        found = contrast_vector(
            model, tokenizer_of(), POSITIVE[:7], NEGATIVE, method, layers="best", name=method
        )
        assert "7 and 12 texts" in repr(found.separation)


def test_best_is_the_layer_that_separates_best():
    model = tiny_model("llama", num_hidden_layers=4)
    found = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, layers="best")
    frame = found.separation.frame()
    assert frame.layer.tolist() == [0, 1, 2, 3] and len(found.adapters) == 1
    best = frame.sort_values(["auroc", "d_prime"]).layer.iloc[-1]
    assert found.config.layers == (best,) == (found.separation.best,)
    everywhere = contrast_vector(
        model, tokenizer_of(), POSITIVE, NEGATIVE, layers=np.array([-1, 0]), name="some"
    )
    assert everywhere.config.layers == (0, 3) and len(everywhere.separation.rows) == 2
    assert found.separation._repr_png_().startswith(b"\x89PNG")


def test_a_steering_on_the_model_acts_while_texts_are_read():
    model = tiny_model("llama").double()
    other = steer(model, kind="full", layers=[0], name="other")
    other.adapters[Site(0, "block")].matrix.data.copy_(torch.eye(32))
    doubled = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, layers=[0], name="b")
    doubled.enabled = False
    with other.disabled():
        plain = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, layers=[0], name="a")
    one, two = (s.adapters[Site(0, "block")].vector for s in (plain, doubled))
    torch.testing.assert_close(two, 2 * one, **CLOSE)


def test_it_is_saved_and_added_like_any_steering(tmp_path):
    model = tiny_model("llama")
    a = contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, name="a")
    b = contrast_vector(model, tokenizer_of(), NEGATIVE, POSITIVE, name="b")
    a.save(tmp_path / "a")
    vectors = {site: adapter.vector.detach().clone() for site, adapter in a.adapters.items()}
    zero = sum_steerings(a - a)
    assert all(not adapter.vector.any() for adapter in zero.adapters.values())
    for steering in (a, b, zero):
        steering.remove()
    loaded = load_steering(model, tmp_path / "a")
    assert all(torch.equal(loaded.adapters[site].vector, v) for site, v in vectors.items())


def nan_model():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    return model


long_text = " ".join(["w5"] * 65)  # the tiny models read 64 tokens
same_prompt = [("w1 w2", f"w{n}") for n in range(3, 9)]
CASES = {
    "pca compares pairs|compares pairs": dict(method="pca", negative=NEGATIVE[:5]),
    "method|no method 'median'": dict(method="median"),
    "few|positive has 1 texts; it takes at least 2": dict(positive=POSITIVE[:1]),
    "string|positive is a list of texts": dict(positive="w1 w2"),
    "same|negative 0 is the same text as positive 3": dict(negative=POSITIVE[3:6]),
    "twice|positive 2 is the same text as positive 0": dict(
        positive=[*POSITIVE[:2], POSITIVE[0], *POSITIVE[4:6]]
    ),
    "long|positive 1 has 65 tokens, and the model's context is 64": dict(
        positive=[POSITIVE[0], long_text]
    ),
    "empty|negative 1 is '', which has no token": dict(negative=[NEGATIVE[0], ""]),
    "form|negative 1 is 3: give a text": dict(negative=[NEGATIVE[0], 3]),
    "completion|has no token of positive": dict(positions="completion"),
    "equal|the same activations": dict(
        positive=same_prompt[:3], negative=same_prompt[3:], positions="prompt"
    ),
    "finite|is not finite at layer 1": dict(model=nan_model),
    "streams|several residual streams": dict(model=lambda: tiny_model("gemma3n_text")),
    "batch|batch_size is 0": dict(batch_size=0),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    model = CASES[case].get("model", lambda: tiny_model("llama"))()
    given = dict(positive=POSITIVE, negative=NEGATIVE) | CASES[case]
    given.pop("model", None)
    keys = set(model.state_dict())
    with pytest.raises(ContrastError, match=case.partition("|")[2]):
        contrast_vector(model, tokenizer_of(), **given)
    assert set(model.state_dict()) == keys and not steerings(model)


def test_errors_of_the_steering():
    model = tiny_model("llama")
    steer(model, name="here")
    for error, given in (
        (SteeringError, dict(name="here")),
        (SteeringError, dict(positions="middle")),
        (SiteError, dict(layers=[7])),
        (SiteError, dict(site="head")),
        (SteerError, dict(layers="worst")),
    ):
        with pytest.raises(error):
            contrast_vector(model, tokenizer_of(), POSITIVE, NEGATIVE, **given)
    assert list(steerings(model)) == ["here"]


def test_a_steering_on_the_model_sees_where_the_pairs_end():
    "One that acts on completions acts while completions are read: as with `prompt_ends` by hand."
    model = tiny_model("llama").double()
    other = steer(model, kind="vector", layers=[0], positions="completion", name="other")
    next(other.parameters()).data.normal_(generator=torch.Generator().manual_seed(0))
    pairs = [list(zip(texts, texts[1:5], strict=False)) for texts in (POSITIVE, NEGATIVE)]
    found = contrast_vector(model, tokenizer_of(), *pairs, positions="completion", layers=[1])
    vector = next(found.parameters()).detach().clone()
    found.remove()
    other.enabled = False
    without = contrast_vector(model, tokenizer_of(), *pairs, positions="completion", layers=[1])
    assert (vector - next(without.parameters())).abs().max() > 1e-3
