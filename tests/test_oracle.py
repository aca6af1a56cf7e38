"""Oracle shifts and distillation (T5, T8, T9, T10) against independent computations.

Also: padding does not count, memory does not grow with the batches, models are restored."""

import copy
import gc
import inspect
import math
import tempfile
import warnings

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from steer_nb.core.adapters import AdapterError
from steer_nb.core.config import SteeringConfig
from steer_nb.core.hooks import capture, edit
from steer_nb.core.loading import load_steering
from steer_nb.core.sites import Site, SiteError, blocks
from steer_nb.core.steering import steer, steerings
from steer_nb.testing.tiny_models import tiny_model
from steer_nb.theory import paired_runs
from steer_nb.theory.distill import fit_oracle, tokens_needed
from steer_nb.theory.glu import pre_mlp_service
from steer_nb.theory.oracle import (
    OracleError,
    kl_divergence,
    logit_divergence,
    oracle_divergence,
    oracle_shifts,
    projector,
    shifted,
)
from steer_nb.theory.paired_runs import token_weights
from steer_nb.theory.profiles import error_growth, shift_profile
from steer_nb.theory.regression import (
    LinearMap,
    Moments,
    effective_tokens,
    fit_maps,
    r2,
    residual,
    spectrum,
)

TYPES = ("llama", "gemma3_text", "gpt_neox", "phi", "gpt2", "qwen3", "mixtral")
FLOAT32 = 1e-5  # norms compute in float32 whatever the model's dtype; relative
LONG = torch.randint(3, 100, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noisy(model, scale=0.3, seed=1):
    "A copy with noise on the weights of its blocks."
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in blocks(changed).parameters():
            if p.numel() > 1:
                p += (
                    scale
                    * p.std()
                    * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                )
    return changed


def tiny(kind, **changes):
    "A tiny model with weights that are large enough to matter."
    model = tiny_model(kind, initializer_range=0.2, **changes).double()
    if "mixtral" in kind:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def pair(kind="llama", layers=3, dtype=torch.float64):
    "A tiny base and its noisy copy."
    base = tiny(kind, num_hidden_layers=layers).to(dtype)
    return base, noisy(base)


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def padded(ids, count=4, left=False):
    "Ids and mask; the last half of the rows is cut to `count` tokens and padded with 0."
    ids, mask, half = ids.clone(), torch.ones_like(ids), len(ids) // 2
    if left:
        ids[half:] = torch.roll(ids[half:], -count, 1)
    columns = slice(0, ids.shape[1] - count) if left else slice(count, None)
    ids[half:, columns], mask[half:, columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def close(a, b, tolerance=FLOAT32):
    return ((a - b).norm() <= tolerance * b.norm()).item()


def state(model):
    "The hooks, modes and flags of a model that a measurement must not change."
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training)
        for m in model.modules()
    ]
    return hooks, [p.requires_grad for p in model.parameters()], list(steerings(model))


# T5


@pytest.mark.parametrize("kind", TYPES)
def test_the_oracle_gives_the_tuned_logits(kind):
    base, tuned = pair(kind)
    batch = padded(LONG)
    real = batch["attention_mask"].bool()
    shifts = oracle_shifts(base, tuned, batch)
    assert set(shifts) == {Site(layer, "block") for layer in range(3)}
    expected, start = logits(tuned, **batch)[real], logits(base, **batch)[real]
    assert not close(start, expected, 0.1)
    with shifted(base, shifts), capture(base) as got:
        found = logits(base, **batch)[real]
    with capture(tuned) as want:
        logits(tuned, **batch)
    assert close(found, expected)
    for site in shifts:
        assert close(got[site][real], want[site][real]) and (shifts[site][~real] == 0).all()
    assert close(logits(base, **batch)[real], start, 0)  # nothing stays


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_differences_of_unshifted_runs_are_right_at_the_last_block_only(kind):
    base, tuned = pair(kind)
    with capture(base) as before:
        start = logits(base, input_ids=LONG)
    with capture(tuned) as after:
        goal = logits(tuned, input_ids=LONG)
    naive = {site: after[site] - before[site] for site in after}
    with shifted(base, {Site(2, "block"): naive[Site(2, "block")]}):
        assert close(logits(base, input_ids=LONG), goal)
    with shifted(base, naive):
        assert (logits(base, input_ids=LONG) - goal).norm() > 0.3 * (start - goal).norm()


@pytest.mark.parametrize("kind", TYPES)
def test_other_sites_do_not_restore_the_logits(kind):
    base, tuned = pair(kind)
    left = oracle_divergence(base, tuned, [{"input_ids": LONG}])
    assert (
        left["block"] < 1e-9 < min(left[at] for at in ("mlp", "attn", "heads"))
        and left["none"] > 1e-3
    )
    for at in ("mlp", "attn", "heads"):  # yet the activation there is the tuned model's
        shifts = oracle_shifts(base, tuned, {"input_ids": LONG}, at)
        with shifted(base, shifts), capture(base, at=at) as got:
            logits(base, input_ids=LONG)
        with capture(tuned, at=at) as want:
            logits(tuned, input_ids=LONG)
        for site in shifts:
            assert close(got[site], want[site])


def test_a_shift_of_one_layer_makes_up_for_that_layer():
    base, tuned = pair()
    shifts = oracle_shifts(base, tuned, {"input_ids": LONG}, layers=[1])
    with capture(base) as before:
        logits(base, input_ids=LONG)
    with capture(tuned) as after:
        logits(tuned, input_ids=LONG)
    site = Site(1, "block")
    assert set(shifts) == {site} and torch.equal(shifts[site], after[site] - before[site])


def test_bfloat16_is_reproduced_exactly():
    base, tuned = pair(dtype=torch.bfloat16)
    shifts = oracle_shifts(base, tuned, {"input_ids": LONG})
    assert shifts[Site(0, "block")].dtype == torch.float32
    with shifted(base, shifts):
        assert torch.equal(logits(base, input_ids=LONG), logits(tuned, input_ids=LONG))


# Padding


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_counts_nowhere(kind, left):
    base, tuned = pair(kind)
    batch = padded(LONG, 4, left)
    ids = batch["input_ids"]
    if left:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    apart = [{"input_ids": ids[:3]}, {"input_ids": ids[3:, -4:] if left else ids[3:, :4]}]
    assert math.isclose(
        logit_divergence(tuned, base, [batch]),
        logit_divergence(tuned, base, apart),
        rel_tol=FLOAT32,
    )
    one = fit_oracle(base, tuned, [batch], rank=3, ridge=0.1, holdout=0)
    got = [row["r2"] for row in one.fit.rows], [p.detach().clone() for p in one.parameters()]
    assert one.fit.rows[0]["tokens"] == 27 + 12
    one.remove()
    other = fit_oracle(base, tuned, apart, rank=3, ridge=0.1, holdout=0)
    assert np.allclose(got[0], [row["r2"] for row in other.fit.rows], rtol=1e-4)
    saved = (got[1][i : i + 3] for i in range(0, len(got[1]), 3))
    for adapter, (down, up, bias) in zip(other.adapters.values(), saved, strict=True):
        assert close(up @ down, adapter.up @ adapter.down, 1e-4) and close(bias, adapter.bias, 1e-4)
    growth, sizes = error_growth(base, tuned, batch), error_growth(base, tuned, apart[1])
    assert torch.allclose(growth.measured[:, 3:], sizes.measured, rtol=1e-4)
    assert all((w[~batch["attention_mask"].bool()] == 0).all() for w in token_weights(tuned, batch))


# T9


def batch_solution(s, shift, w, rank, ridge, bias=True):
    "Reduced-rank regression on all tokens at once, by numpy: the matrix and the constant."
    s, shift, w = (np.asarray(x, dtype=np.float64) for x in (s, shift, w))
    w = w / w.sum()
    mean_s, mean_shift = (w @ s, w @ shift) if bias else (0 * s[0], 0 * shift[0])
    x, y = np.sqrt(w)[:, None] * (s - mean_s), np.sqrt(w)[:, None] * (shift - mean_shift)
    x, y = (
        np.vstack([x, np.sqrt(ridge * (x**2).sum() / x.shape[1]) * np.eye(x.shape[1])]),
        np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]),
    )
    full = np.linalg.lstsq(x, y, rcond=None)[0].T
    right = np.linalg.svd(x @ full.T, full_matrices=False)[2][:rank].T
    matrix = right @ right.T @ full
    return matrix, mean_shift - matrix @ mean_s


def sample(tokens=300, width=10, heads=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, width) if heads is None else (tokens, heads, width)
    s = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        @ torch.randn(width, width, generator=generator, dtype=torch.float64)
        + 5
    )
    return (
        s,
        torch.tanh(s @ torch.randn(width, width, generator=generator, dtype=torch.float64)) + 2,
        torch.rand(tokens, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank, ridge", [(1, 0.0), (4, 0.01), (10, 0.3), (0, 0.0)])
def test_streamed_moments_give_the_batch_solution(rank, ridge, bias):
    s, shift, w = sample()
    moments = Moments()
    for part in torch.arange(300).split(47):
        moments.add(s[part], shift[part], w[part])
    (fitted,) = fit_maps(moments, rank, [ridge], bias)
    matrix, constant = batch_solution(s, shift, w, rank, ridge, bias)
    assert np.allclose(fitted.up @ fitted.down, matrix, rtol=1e-7, atol=1e-9) and np.allclose(
        fitted.bias, constant, rtol=1e-7, atol=1e-9
    )
    rest = (w @ (shift - fitted(s)).square()).sum() / w.sum()
    spread = (w @ (shift - w @ shift / w.sum()).square()).sum() / w.sum()
    assert math.isclose(residual(moments, fitted), rest, rel_tol=1e-9) and math.isclose(
        r2(moments, fitted), 1 - rest / spread, rel_tol=1e-7, abs_tol=1e-9
    )
    assert math.isclose(effective_tokens(moments), w.sum() ** 2 / w.square().sum(), rel_tol=1e-12)
    values = np.linalg.eigvalsh(np.cov(shift.T.numpy(), aweights=w.numpy()))[::-1]
    assert np.allclose(spectrum(moments), values / values.sum(), atol=1e-12)


def test_moments_of_heads_are_moments_of_each_head():
    s, shift, w = sample(heads=3)
    (fitted,) = fit_maps(Moments().add(s, shift, w), 2, [0.01])
    for head in range(3):
        matrix, constant = batch_solution(s[:, head], shift[:, head], w, 2, 0.01)
        assert np.allclose(
            (fitted.up @ fitted.down)[head], matrix, rtol=1e-7, atol=1e-9
        ) and np.allclose(fitted.bias[head], constant, rtol=1e-7, atol=1e-9)


def test_no_other_map_of_the_rank_does_better():
    s, shift, w = sample()
    moments = Moments().add(s, shift, w)
    (fitted,) = fit_maps(moments, 3)
    generator, best = torch.Generator().manual_seed(1), residual(moments, fitted)
    for scale in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other = LinearMap(
                *(
                    part + scale * torch.randn(part.shape, generator=generator, dtype=part.dtype)
                    for part in (fitted.up, fitted.down, fitted.bias)
                )
            )
            assert residual(moments, other) > best


def test_moments_add_up_and_weights_count():
    s, shift, w = sample()
    whole = Moments().add(s, shift, w)
    two = Moments().add(s[:100], shift[:100], w[:100]) + Moments().add(
        s[100:], shift[100:], w[100:]
    )
    assert torch.allclose(two.total, whole.total, rtol=1e-12) and (two.tokens, two.squares) == (
        300,
        pytest.approx(whole.squares),
    )
    twice = Moments().add(s, shift, torch.full((300,), 2.0)).total
    assert torch.allclose(
        twice, Moments().add(torch.cat([s, s]), torch.cat([shift, shift])).total, rtol=1e-12
    )
    none = Moments().add(s, shift, (torch.arange(300) < 50).double())
    assert (
        torch.allclose(none.total, Moments().add(s[:50], shift[:50]).total, rtol=1e-12)
        and effective_tokens(none) == 50
    )


def test_too_few_tokens_give_the_solution_of_least_norm():
    s, shift, _ = sample(4)
    (fitted,) = fit_maps(Moments().add(s, shift), 10)
    assert torch.allclose(fitted(s), shift, atol=1e-6)
    assert np.allclose(
        fitted.up @ fitted.down, batch_solution(s, shift, np.ones(4), 10, 0.0)[0], atol=1e-6
    )


# The fit


def slow_fit(base, tuned, batches, at, rank, ridge):
    "The sequential fit by whole passes for each layer, on all tokens at once."
    maps = {}

    def act(site):
        def change(h):
            matrix, constant = maps[site]
            if at == "heads":
                return h + torch.einsum("bshi,hoi->bsho", h, matrix) + constant
            return h + h @ matrix.T + constant

        return change

    for layer in range(len(blocks(base))):
        site, pairs = Site(layer, at), []
        for batch in batches:
            with (
                edit(base, {done: act(done) for done in maps}),
                capture(base, at=at, layers=[layer]) as own,
            ):
                logits(base, **batch)
            with capture(tuned, at=at, layers=[layer]) as goal:
                logits(tuned, **batch)
            pairs.append((own[site].flatten(0, 1), (goal[site] - own[site]).flatten(0, 1)))
        s, shift = (torch.cat(part) for part in zip(*pairs, strict=True))
        w = np.ones(len(s))
        if at == "heads":
            found = [
                batch_solution(s[:, head], shift[:, head], w, rank, ridge)
                for head in range(s.shape[1])
            ]
            maps[site] = tuple(torch.tensor(np.stack(part)) for part in zip(*found, strict=True))
        else:
            maps[site] = tuple(
                torch.tensor(part) for part in batch_solution(s, shift, w, rank, ridge)
            )
    return maps


CASES = [
    *((kind, "block") for kind in (*TYPES, "bloom")),
    *(("llama", at) for at in ("mlp", "attn", "heads")),
    ("gemma3_text", "mlp"),
    ("phi", "attn"),
    ("gpt2", "heads"),
]


@pytest.mark.parametrize("kind, at", CASES)
def test_running_block_by_block_equals_a_pass_for_each_layer(kind, at):
    base, tuned = pair(kind)
    batches = [{"input_ids": LONG}, {"input_ids": LONG[:4, :5] + 1}]
    expected = slow_fit(base, tuned, batches, at, 3, 0.05)
    before = logits(base, input_ids=LONG)
    steering = fit_oracle(base, tuned, batches, at=at, rank=3, ridge=0.05, holdout=0)
    for site, adapter in steering.adapters.items():
        assert close(adapter.up @ adapter.down, expected[site][0], 1e-4) and close(
            adapter.bias, expected[site][1], 1e-4
        )  # float32 norms, three layers
    steering.remove()
    assert torch.equal(logits(base, input_ids=LONG), before)


@pytest.mark.parametrize("at", ["block", "mlp", "heads"])
def test_teacher_forcing_fits_each_layer_on_the_oracle(at):
    base, tuned = pair()
    both = torch.cat([LONG, LONG + 1])
    shifts, pairs = oracle_shifts(base, tuned, {"input_ids": both}, at), {}
    with capture(tuned, at=at) as goal:
        logits(tuned, input_ids=both)
    for site, shift in shifts.items():
        pairs[site] = goal[site] - shift, shift
    steering = fit_oracle(
        base,
        tuned,
        [{"input_ids": LONG}, {"input_ids": LONG + 1}],
        at=at,
        rank=3,
        ridge=0.05,
        holdout=0,
        mode="teacher_forced",
    )
    for site, adapter in steering.adapters.items():
        s, shift = (part.flatten(0, 1) for part in pairs[site])
        if at == "heads":
            s, shift, adapter.up, adapter.down, adapter.bias = (
                torch.nn.Parameter(x)
                for x in (s[:, 1], shift[:, 1], adapter.up[1], adapter.down[1], adapter.bias[1])
            )
        matrix, constant = batch_solution(s.detach(), shift.detach(), np.ones(len(s)), 3, 0.05)
        assert close(adapter.up @ adapter.down, torch.tensor(matrix), 1e-4) and close(
            adapter.bias, torch.tensor(constant), 1e-4
        )


def test_parallel_fits_each_layer_on_the_unsteered_base():
    base, tuned = pair()
    both = torch.cat([LONG, LONG + 1])
    with capture(base) as own:
        logits(base, input_ids=both)
    with capture(tuned) as goal:
        logits(tuned, input_ids=both)
    steering = fit_oracle(
        base,
        tuned,
        [{"input_ids": LONG}, {"input_ids": LONG + 1}],
        rank=3,
        ridge=0.05,
        holdout=0,
        mode="parallel",
    )
    for site, adapter in steering.adapters.items():
        s, shift = own[site].flatten(0, 1), (goal[site] - own[site]).flatten(0, 1)
        matrix, constant = batch_solution(s, shift, np.ones(len(s)), 3, 0.05)
        assert close(adapter.up @ adapter.down, torch.tensor(matrix), 1e-4) and close(
            adapter.bias, torch.tensor(constant), 1e-4
        )


@pytest.mark.parametrize("at, base_runs", [("block", 1), ("mlp", 2), ("heads", 2)])
def test_blocks_run_once_or_twice_for_each_batch(at, base_runs):
    base, tuned = pair(layers=5)
    batches, counts = [{"input_ids": LONG}] * 3, {}
    for model in (base, tuned):
        for block in blocks(model):

            def count(*args, model=model, forward=block.mlp.forward):
                counts[model] = counts.get(model, 0) + 1
                return forward(*args)

            block.mlp.forward = count
    fit_oracle(base, tuned, batches, at=at, rank=2)
    assert counts[tuned] <= 5 * 3 + 5  # and one pass of the first batch, as a check
    assert counts[base] <= base_runs * 5 * 3


def test_only_the_layers_asked_for_are_steered():
    base, tuned = pair(layers=5)
    batches = [{"input_ids": LONG}]
    steering = fit_oracle(base, tuned, batches, rank=2, layers=[1, 4], ridge=0.1, holdout=0)
    assert (
        [site.layer for site in steering.adapters]
        == [1, 4]
        == [row["layer"] for row in steering.fit.rows]
    )
    got = steering.adapters[Site(4, "block")]
    with capture(tuned) as goal:
        logits(tuned, input_ids=LONG)
    saved = got.up.detach().clone(), got.bias.detach().clone()
    with torch.no_grad():
        got.up.zero_()
        got.bias.zero_()
    with capture(base) as own:
        logits(base, input_ids=LONG)
    site = Site(4, "block")
    matrix, constant = batch_solution(
        own[site].flatten(0, 1), (goal[site] - own[site]).flatten(0, 1), np.ones(54), 2, 0.1
    )
    assert close(saved[0] @ got.down, torch.tensor(matrix), 1e-4) and close(
        saved[1], torch.tensor(constant), 1e-4
    )


@pytest.mark.parametrize("kind", ["vector", "full", "linear"])
def test_kinds_and_further_use(kind, tmp_path):
    base, tuned = pair()
    ids = torch.randint(3, 100, (40, 9), generator=torch.Generator().manual_seed(5))
    steering = fit_oracle(
        base,
        tuned,
        [{"input_ids": part} for part in ids.split(8)],
        kind=kind,
        rank=4,
        bias=kind == "linear",
    )
    assert steering.config == SteeringConfig(kind=kind, rank=4, bias=kind == "linear")
    assert not any(
        p.requires_grad for name, p in base.named_parameters() if "steering" not in name
    ) and all(p.requires_grad for p in steering.parameters())
    held = [row["r2_held_out"] for row in steering.fit.rows]
    if kind == "vector":
        assert max(abs(row["r2"]) for row in steering.fit.rows) < 1e-9 > max(held)
    after = logits(base, input_ids=ids)
    steering.save(tmp_path / "saved")
    steering.remove()
    assert not close(logits(base, input_ids=ids), after, 0.01) and all(
        p.requires_grad for p in base.parameters()
    )
    again = load_steering(base, tmp_path / "saved")
    assert close(logits(base, input_ids=ids), after)
    optimizer = torch.optim.SGD(again.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        loss = base(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[0]


def test_a_fit_reduces_the_divergence():
    base, tuned = pair()
    ids = torch.randint(3, 100, (160, 9), generator=torch.Generator().manual_seed(5))
    batches, tests = (
        [{"input_ids": part} for part in ids[:128].split(16)],
        [{"input_ids": ids[128:]}],
    )
    left = {"none": logit_divergence(tuned, base, tests)}
    for mode in ("parallel", "teacher_forced", "sequential"):
        steering = fit_oracle(base, tuned, batches, rank=16, mode=mode)
        left[mode] = logit_divergence(tuned, base, tests)
        assert all(
            row["tokens"] == 115 * 9 and row["held_out"] == 13 * 9 for row in steering.fit.rows
        )
        steering.remove()
    assert left["sequential"] < left["teacher_forced"] < left["parallel"] < left["none"]


def test_too_few_tokens_for_the_rank_raise_a_warning():
    base, tuned = pair()
    assert (
        tokens_needed(32) == 33
        and tokens_needed(32, bias=False) == tokens_needed(32, "full") == 32
        and tokens_needed(32, "vector") == 1
    )
    with pytest.warns(UserWarning, match="9 tokens do not determine a map of rank 8: it takes 33"):
        fit_oracle(base, tuned, [{"input_ids": LONG[:1]}], rank=8, ridge=0.1, holdout=0).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_oracle(base, tuned, [{"input_ids": LONG}], rank=8)


def test_fewer_tokens_than_dimensions_fit_but_do_not_carry_over():
    "The reason for the warning: a map of rank 2, fitted on 20 and on 33 tokens of 32 dimensions."
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(32, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 32, generator=generator, dtype=torch.float64
    )
    tokens = torch.randn(200, 32, generator=generator, dtype=torch.float64)
    others = Moments().add(tokens[100:], tokens[100:] @ matrix.T)
    for count, low, high in ((20, -10, 0.9), (33, 1 - 1e-8, 1.1)):
        seen = Moments().add(tokens[:count], tokens[:count] @ matrix.T)
        (fitted,) = fit_maps(seen, 2)
        assert r2(seen, fitted) > 1 - 1e-8 and low < r2(others, fitted) < high


def test_other_steerings_stay_on_and_count():
    base, tuned = pair()
    other = steer(base, SteeringConfig(kind="vector"), name="other")
    for p in other.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(0))
    batches, before = [{"input_ids": LONG}, {"input_ids": LONG + 1}], logits(base, input_ids=LONG)
    expected = slow_fit(base, tuned, batches, "block", 3, 0.05)
    steering = fit_oracle(base, tuned, batches, rank=3, ridge=0.05, holdout=0, name="more")
    for site, adapter in steering.adapters.items():
        assert close(adapter.up @ adapter.down, expected[site][0], 1e-4)
    steering.remove()
    assert list(steerings(base)) == ["other"] and torch.equal(logits(base, input_ids=LONG), before)


def test_forwards_that_accelerate_replaced_are_put_back():
    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    base, tuned = pair()
    expected = fit_oracle(
        copy.deepcopy(base), tuned, [{"input_ids": LONG}], rank=3, ridge=0.1, holdout=0
    )
    for block in blocks(base):
        add_hook_to_module(block, Count())
    forwards = [vars(block)["forward"] for block in blocks(base)]
    steering = fit_oracle(base, tuned, [{"input_ids": LONG}], rank=3, ridge=0.1, holdout=0)
    assert Count.calls == 3 and [vars(block)["forward"] for block in blocks(base)] == forwards
    for a, b in zip(steering.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gemma3n_text", "xlnet"])
def test_other_layouts(kind):
    base = tiny(kind)
    tuned = noisy(base)
    steering = fit_oracle(
        base, tuned, [{"input_ids": LONG, "attention_mask": torch.ones_like(LONG)}] * 2, rank=3
    )
    assert steering.fit.rows[0]["r2"] > 0 and steering.fit.rows[0]["tokens"] + steering.fit.rows[0][
        "held_out"
    ] == 2 * 54 * (4 if kind == "gemma3n_text" else 1)  # each stream counts
    batch = {"input_ids": LONG, "attention_mask": torch.ones_like(LONG)}
    growth = error_growth(base, tuned, batch)
    assert growth.measured.shape == (2, 6) and (growth.measured <= growth.bound * (1 + 1e-9)).all()
    steering.remove()
    shifts = oracle_shifts(base, tuned, batch)
    with shifted(base, shifts), capture(base) as got:
        logits(base, **batch)
    with capture(tuned) as want:
        logits(tuned, **batch)
    assert close(got[Site(1, "block")], want[Site(1, "block")])


def test_bfloat16_models_are_fitted_in_float64():
    base, tuned = pair(dtype=torch.bfloat16)
    ids = torch.randint(3, 100, (40, 9), generator=torch.Generator().manual_seed(5))
    before = logit_divergence(tuned, base, [{"input_ids": ids}])
    steering = fit_oracle(base, tuned, [{"input_ids": part} for part in ids.split(8)], rank=8)
    assert {p.dtype for p in steering.parameters()} == {torch.float32} and logit_divergence(
        tuned, base, [{"input_ids": ids}]
    ) < before


# Weights


def test_weights_are_gradients_of_drawn_log_likelihoods():
    base, tuned = pair()
    batch = padded(LONG)
    batch["labels"] = torch.full_like(LONG, -100)
    batch["labels"][:, 3] = 5
    found = token_weights(tuned, batch, seed=3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for layer in range(3):
        added = torch.zeros(6, 9, 32, dtype=torch.float64, requires_grad=True)
        with edit(tuned, {Site(layer, "block"): lambda h, added=added: h + added}):
            log_p = tuned(**inputs).logits[:, 2].log_softmax(-1)
        drawn = torch.multinomial(
            log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(3)
        )
        (by_hand,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), added)
        norms = by_hand.norm(dim=-1)
        assert torch.allclose(
            found[layer],
            norms * batch["attention_mask"].sum(1, keepdim=True) / norms.sum(1, keepdim=True),
            rtol=1e-6,
        )
    assert (
        (found[2][:, :2] == 0).all() and (found[2][:, 3:] == 0).all() and (found[2][:, 2] > 0).all()
    )  # nothing comes after the last block
    assert all(p.grad is None for p in tuned.parameters())


def test_weighted_fits_are_better_at_labelled_tokens():
    base, tuned = pair()
    ids = torch.randint(3, 100, (64, 9), generator=torch.Generator().manual_seed(5))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 5
    parts = zip(ids.split(8), labels.split(8), strict=True)
    batches, left = [{"input_ids": some, "labels": wanted} for some, wanted in parts], {}
    for weights in (None, "loss"):
        steering = fit_oracle(base, tuned, batches, rank=8, weights=weights, ridge=1e-3)
        left[weights] = logit_divergence(tuned, base, batches)
        steering.remove()
    assert left["loss"] < left[None]


# Divergence


def test_divergence_is_the_mean_over_what_counts():
    base, tuned = pair()
    batch = padded(LONG)
    p, q = (logits(model, **batch).log_softmax(-1) for model in (tuned, base))
    each = (p.exp() * (p - q)).sum(-1)
    assert math.isclose(
        logit_divergence(tuned, base, [batch]),
        each[batch["attention_mask"].bool()].mean(),
        rel_tol=1e-6,
    )
    labels = torch.full_like(LONG, -100)
    labels[0, 4], labels[1, 0], labels[2, 8] = 7, 7, 7  # the first token is not predicted
    each = torch.stack([each[0, 3], each[2, 7]]) if batch["attention_mask"][2, 7] else each[0, 3]
    assert math.isclose(
        logit_divergence(tuned, base, iter([{**batch, "labels": labels}])),
        each.mean(),
        rel_tol=1e-6,
    )
    assert logit_divergence(base, base, [batch]) == 0
    many = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))  # several parts
    p, q = many.double().log_softmax(-1), (2 * many).double().log_softmax(-1)
    assert math.isclose(kl_divergence(many, 2 * many), (p.exp() * (p - q)).sum(), rel_tol=1e-12)
    with pytest.raises(OracleError, match="no token"):
        logit_divergence(tuned, base, [])


# T8


@pytest.mark.parametrize("kind", TYPES)
def test_a_map_after_the_block_does_what_one_after_the_mlp_does(kind):
    "The stream is in one subspace by its embeddings and an edit, the MLP's output in another."
    model, generator = tiny(kind), torch.Generator().manual_seed(1)
    stream, branch = (torch.randn(32, k, generator=generator, dtype=torch.float64) for k in (15, 9))

    def onto(basis):
        return torch.linalg.qr(basis)[0] @ torch.linalg.qr(basis)[0].T

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.copy_(module.weight @ onto(stream))
    up, down = (
        torch.randn(32, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, 32, generator=generator, dtype=torch.float64),
    )
    kept = {Site(0, "attn"): lambda h: h @ onto(stream), Site(0, "mlp"): lambda h: h @ onto(branch)}

    def found(at=None, down=None):
        with edit(model, kept):
            if at is None:
                return logits(model, input_ids=LONG)
            steering = steer(model, SteeringConfig(site=at, rank=3, layers=[0]))
            adapter = steering.adapters[Site(0, at)]
            adapter.up.data, adapter.down.data = up.clone(), down.clone()
            try:
                return logits(model, input_ids=LONG)
            finally:
                steering.remove()

    expected = found("mlp", down)
    assert not close(found(), expected, 0.02) and not close(found("block", down), expected, 0.02)
    assert close(found("block", down @ projector(branch, stream)), expected)


def test_projectors():
    generator = torch.Generator().manual_seed(0)
    onto, along = (torch.randn(8, k, generator=generator, dtype=torch.float64) for k in (3, 4))
    p = projector(onto, along)
    assert (
        torch.allclose(p @ p, p)
        and torch.allclose(p @ onto, onto)
        and torch.allclose(p @ along, torch.zeros_like(along), atol=1e-12)
    )
    for wrong in (
        torch.cat([along, onto @ torch.ones(3, 1, dtype=torch.float64)], 1),
        torch.eye(8, dtype=torch.float64),
    ):
        with pytest.raises(OracleError, match="intersect"):
            projector(onto, wrong)


# T10


@pytest.mark.parametrize("kind", TYPES)
def test_the_measured_error_is_under_the_bound(kind):
    base, tuned = pair(kind)
    batch = padded(LONG)
    fit_oracle(base, tuned, [batch], rank=4)
    growth, real = error_growth(base, tuned, batch), batch["attention_mask"].bool()
    assert growth.measured.shape == (3, 6) and (growth.measured <= growth.bound * (1 + 1e-9)).all()
    with capture(base) as own:
        logits(base, **batch)
    with capture(tuned) as goal:
        logits(tuned, **batch)
    for layer in range(3):
        site = Site(layer, "block")
        by_hand = ((own[site] - goal[site]) * real[..., None]).flatten(1).norm(dim=1)
        assert torch.allclose(growth.measured[layer], by_hand, rtol=1e-9)
        below = Site(layer - 1, "block") if layer else None
        held = {below: lambda h, below=below: goal[below]} if layer else {}
        with edit(base, held), capture(base) as restarted:
            logits(base, **batch)  # the steered block on the tuned prefix
        assert torch.allclose(
            growth.local[layer],
            ((restarted[site] - goal[site]) * real[..., None]).flatten(1).norm(dim=1),
            rtol=1e-5,
        )
        if layer:
            assert torch.allclose(
                growth.factor[layer],
                ((own[site] - restarted[site]) * real[..., None]).flatten(1).norm(dim=1)
                / growth.measured[layer - 1],
                rtol=1e-5,
            )
    by_formula = sum(growth.local[j] * growth.factor[j + 1 :].prod(0) for j in range(3))
    assert torch.allclose(growth.bound[-1], by_formula, rtol=1e-12)


def test_an_exact_steering_has_no_error():
    base, _ = pair()
    growth = error_growth(base, copy.deepcopy(base), {"input_ids": LONG})
    assert (growth.measured == 0).all() and (growth.bound == 0).all()


# Profiles, and maps before the MLP


def test_a_profile_has_every_layer_site_and_rank():
    base, tuned = pair()
    batches = [
        {"input_ids": part}
        for part in torch.randint(
            3, 100, (40, 9), generator=torch.Generator().manual_seed(5)
        ).split(8)
    ]
    before, profile = state(base), shift_profile(base, tuned, batches, ranks=(1, 4, 32, 64))
    assert len(profile.rows) == 3 * 3 * 3 and state(base) == before
    table = profile.frame().set_index(["site", "layer", "rank"])
    for at in ("block", "mlp", "attn"):
        for layer in range(3):
            assert (
                table.loc[(at, layer, 1), "share"]
                < table.loc[(at, layer, 4), "share"]
                < table.loc[(at, layer, 32), "share"]
                == pytest.approx(1)
            )
    steering = fit_oracle(base, tuned, batches, rank=4, mode="teacher_forced", holdout=0.2)
    for row in steering.fit.rows:
        assert table.loc[("block", row["layer"], 4), "r2_held_out"] == pytest.approx(
            row["r2_held_out"], rel=1e-6
        )


def test_a_profile_forces_blocks_without_the_site_too():
    base = tiny_model("lfm2").double()
    tuned = noisy(base)
    batches = [{"input_ids": LONG}, {"input_ids": LONG + 1}]
    alone, among = (
        shift_profile(base, tuned, batches, sites=sites, ranks=(1, 2)).frame()
        for sites in (("attn",), ("block", "attn"))
    )
    among = among[among.site == "attn"].reset_index(drop=True)
    assert (
        len(alone) == len(among) > 0
        and np.allclose(alone["size"], among["size"], rtol=1e-9)
        and np.allclose(alone["r2"], among["r2"], atol=1e-9)
    )
    with pytest.raises(OracleError, match="none of the ranks"):
        shift_profile(base, tuned, batches, ranks=(64,))


def test_share_that_a_map_before_the_mlp_explains():
    base, _ = pair()
    mlp, generator = base.model.layers[0].mlp, torch.Generator().manual_seed(0)
    u = torch.randn(120, 32, generator=generator, dtype=torch.float64)
    matrix = torch.randn(32, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 32, generator=generator, dtype=torch.float64
    )
    _, shift = torch.func.jvp(mlp, (u,), (u @ matrix.T,))  # which a map of rank 2 makes
    served = pre_mlp_service(mlp, u, shift, ranks=(1, 2), steps=300)
    assert served[1] < 0.95 and served[2] > 0.999
    noise = torch.randn(
        120, 32, generator=generator, dtype=torch.float64
    )  # which no map of u makes
    assert pre_mlp_service(mlp, u, noise, ranks=(2,))[2] < 0.1


# Memory and side effects


class Made:
    "Batches that are generated when they are iterated."

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            yield {
                "input_ids": torch.randint(
                    3, 100, (4, 16), generator=torch.Generator().manual_seed(number)
                )
            }


def live_bytes():
    "The bytes of all live tensors that Python's garbage collector tracks, each storage once."
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("weights", [None, "loss"])
def test_memory_does_not_grow_with_the_batches(weights, monkeypatch):
    base, tuned = pair(layers=2)
    run, peaks, calls = paired_runs.run_forward, [], []

    def watched(*args, **kwargs):
        if len(calls) % 5 == 0:
            peaks.append(live_bytes())
        calls.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(paired_runs, "run_forward", watched)
    highest = {}
    gc.collect()
    gc.freeze()  # objects that exist already are not looked at: that takes most of the time
    try:
        for count in (3, 12):
            peaks.clear()
            fit_oracle(base, tuned, Made(count), rank=2, weights=weights).remove()
            highest[count] = max(peaks)
    finally:
        gc.unfreeze()
    one = 4 * 16 * 32 * 8  # the activation of one batch
    assert highest[3] > 0 and highest[12] - highest[3] < one


@pytest.mark.parametrize("training", [False, True])
def test_models_are_left_as_they_were(training):
    base, tuned = pair()
    base.train(training)
    tuned.model.layers[1].train(training)
    tuned.model.embed_tokens.weight.requires_grad_(False)
    before = state(base), state(tuned)
    steering = fit_oracle(base, tuned, [{"input_ids": LONG}], rank=2, weights="loss")
    assert [p.requires_grad for p in tuned.parameters()] == before[1][1] and state(tuned) == before[
        1
    ]
    steering.remove()
    assert state(base) == before[0]
    broken = copy.deepcopy(tuned)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(
        OracleError, match="tuned model's activation is not finite at layer 1, 'block'"
    ):
        fit_oracle(base, broken, [{"input_ids": LONG}], rank=2)
    assert (state(base), state(tuned)) == before and state(broken) == before[1]
    with pytest.raises(OracleError, match="layer 1, 'block'"):
        oracle_shifts(base, broken, {"input_ids": LONG})
    broken = copy.deepcopy(base)
    broken.model.layers[2].self_attn.o_proj.weight.data[0, 0] = math.inf
    with pytest.raises(OracleError, match="base's activation is not finite at layer 2, 'attn'"):
        fit_oracle(broken, tuned, [{"input_ids": LONG}], at="attn", rank=2)
    assert state(broken) == before[0]


def test_nothing_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    base, tuned = pair()
    fit_oracle(base, tuned, [{"input_ids": LONG}], rank=2).remove()
    with pytest.raises(OracleError):
        fit_oracle(base, noisy(base, math.nan), [{"input_ids": LONG}], rank=2)
    assert list(tmp_path.iterdir()) == []


# Wrong calls

BATCHES = [{"input_ids": LONG}]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batches=(batch for batch in BATCHES)), "pass list"),
        (dict(batches=BATCHES[0]), r"pass \[batch\]"),
        (dict(batches=[]), "no batches"),
        (dict(batches=3), "pass list"),
        (dict(batches=[{"input_ids": LONG[:0]}]), "batch 0: the batch is empty"),
        (dict(batches=[{}]), "batch 0"),
        (dict(batches=[{"input_ids": LONG, "attention_mask": 0 * LONG}]), "padding only"),
        (dict(batches=[{"input_ids": LONG[:1]}]), "held-out sequences, and none of"),
        (dict(holdout=0), "held-out sequences, and none of"),
        (dict(holdout=1.0), "holdout is"),
        (dict(kind="nonlinear"), "no closed form"),
        (dict(kind="lora"), "no kind 'lora'"),
        (dict(mode="both"), "no mode"),
        (dict(weights="all"), "no weights"),
        (dict(ridge=-1), "ridge is"),
        (dict(ridge="big"), "ridge is"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    base, tuned = pair()
    before = state(base)
    with pytest.raises(OracleError, match=message):
        fit_oracle(base, tuned, **{"batches": BATCHES, **arguments})
    assert state(base) == before


def test_wrong_models_are_refused():
    base, tuned = pair()
    others = {
        "same model": base,
        "architecture is 'qwen3'": tiny_model("qwen3", num_hidden_layers=3),
        "number of blocks is 2": tiny_model("llama"),
        "hidden size is 64": tiny_model("llama", num_hidden_layers=3, hidden_size=64),
        "vocabulary is 90": tiny_model("llama", num_hidden_layers=3, vocab_size=90),
    }
    for message, other in others.items():
        for function, given in (
            (fit_oracle, BATCHES),
            (shift_profile, BATCHES),
            (oracle_shifts, BATCHES[0]),
            (error_growth, BATCHES[0]),
        ):
            with pytest.raises(OracleError, match=message):
                function(base, other, given)
    with pytest.raises(OracleError, match="vocabularies"):
        logit_divergence(base, tiny_model("llama", vocab_size=90), [{"input_ids": LONG % 90}])


def test_places_and_ranks_that_do_not_exist_are_refused():
    base, tuned = pair()
    with pytest.raises(SiteError, match="did you mean 'block'"):
        fit_oracle(base, tuned, BATCHES, at="blocks")
    with pytest.raises(SiteError, match="layer 7"):
        fit_oracle(base, tuned, BATCHES, layers=[7])
    with pytest.raises(AdapterError, match="rank 33"):
        fit_oracle(base, tuned, BATCHES, rank=33)
    opt = tiny_model("opt")
    with pytest.raises(SiteError, match="fc1"):
        shift_profile(opt, noisy(opt), BATCHES)


def test_batches_that_change_between_the_rounds_are_refused():
    class Shuffled:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter([{"input_ids": LONG + self.rounds % 2}, {"input_ids": LONG}])

    class Short(Shuffled):
        def __iter__(self):
            self.rounds += 1
            return iter([{"input_ids": LONG}] * (2 if self.rounds < 4 else 1))

    base, tuned = pair()
    for kind in (Shuffled, Short):
        with pytest.raises(OracleError, match="pass list"):
            fit_oracle(base, tuned, kind())


def test_models_that_need_more_than_the_block_below_are_refused():
    base, tuned = pair()
    for model in (base, tuned):  # a block that reads what another one wrote on the side
        first, second = model.model.layers[0], model.model.layers[1]
        first.mlp.register_forward_hook(
            lambda module, args, output, model=model: model.__dict__.update(side=args[0])
        )
        second.register_forward_hook(lambda module, args, output, model=model: output + model.side)
    with pytest.raises(OracleError, match="cannot be run block by block: Site"):
        fit_oracle(base, tuned, [{"input_ids": LONG}, {"input_ids": LONG + 1}])


def test_public_functions_have_annotations():
    for function in (oracle_shifts, fit_oracle, logit_divergence, shift_profile, error_growth):
        parameters = inspect.signature(function).parameters.values()
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters), function
