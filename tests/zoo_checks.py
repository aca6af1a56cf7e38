"""What must hold of a steered model, whatever its architecture. Used by test_zoo.py.

Each check compares with plain PyTorch hooks or with the model's own output, and raises
`AssertionError` with a reason."""

import re

import torch
from torch import nn

from steer_nb.core.hooks import capture, edit
from steer_nb.core.passes import prompt_ends
from steer_nb.core.sites import (
    SITES,
    Site,
    SiteError,
    available_sites,
    blocks,
    hidden_size,
    locate,
)
from steer_nb.core.steering import steer
from steer_nb.testing.tiny_models import INPUT_IDS

NORM = r"Norm(1P|Gated)?$"


def logits(model: nn.Module, input_ids: torch.Tensor = INPUT_IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


def first(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def vector_for(model: nn.Module) -> torch.Tensor:
    return torch.randn(hidden_size(model), generator=torch.Generator().manual_seed(3))


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def check_capture(model: nn.Module) -> None:
    "`capture` returns what plain hooks see; a layer without the site raises `SiteError`."
    sites, seen, handles = available_sites(model), {}, []
    places = {}
    for at in SITES:
        for layer in range(len(blocks(model))):
            site = Site(layer, at)
            if layer in sites[at]:
                places[site] = locate(model, site)
                continue
            try:
                locate(model, site)
            except SiteError:
                continue
            raise AssertionError(f"no SiteError at {site}")

    def remember(site, value):
        seen[site] = first(value).clone()

    for site, place in places.items():
        module = place.module
        if place.side == "input":
            hook = lambda module, args, site=site: remember(site, args)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda module, args, output, site=site: remember(site, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with capture(model, at=[at for at in SITES if sites[at]]) as acts:
        logits(model)
    for handle in handles:
        handle.remove()
    require(set(acts) == set(places), "capture has other sites")
    for site, place in places.items():
        got = acts[site].flatten(-2) if place.parts else acts[site]
        require(torch.equal(got, seen[site] * place.scale), f"capture at {site}")
        require(site.at != "heads" or acts[site].shape[-2] == place.parts, "the number of heads")


def check_zero_start(model: nn.Module, base: torch.Tensor) -> None:
    "New adapters at all sites change no logit, and neither does their removal: bit-identical."
    finite = bool(base.isfinite().all())
    require(finite and torch.equal(base, logits(model)), "the model itself is not deterministic")
    sites = available_sites(model)
    added = [steer(model, site=at, rank=2, name=at) for at in SITES if sites[at]]
    require(torch.equal(logits(model), base), "a new steering changes the logits")
    for steering in added:
        steering.remove()
    require(torch.equal(logits(model), base), "a removed steering changes the logits")


def check_vector(model: nn.Module, base: torch.Tensor) -> None:
    "A vector at the last block's output equals adding it in a plain hook."
    vector, layer = vector_for(model), len(blocks(model)) - 1

    def by_hand(module, args, output):
        streams = first(output).shape[-1] // len(vector)  # some have them side by side
        shifted = first(output) + vector.repeat(streams)
        if isinstance(output, torch.Tensor):
            return shifted
        return type(output)((shifted, *output[1:]))

    handle = blocks(model)[layer].register_forward_hook(by_hand)
    expected = logits(model)
    handle.remove()
    steering = steer(model, kind="vector", layers=[-1])
    next(steering.parameters()).data.copy_(vector)
    same = torch.equal(logits(model), expected) and not torch.equal(expected, base)
    require(same, "a vector at block is not the same as by hand")
    steering.remove()


def check_last_position(model: nn.Module, base: torch.Tensor) -> str:
    "Steering the last token changes its logits and no others. Returns '', or why it cannot."
    steering = steer(model, kind="vector", positions="last", layers=[-1])
    next(steering.parameters()).data.copy_(vector_for(model))
    try:
        changed = (logits(model) != base).any(-1)
    except SiteError:
        raise
    except ValueError as error:
        return str(error)
    finally:
        steering.remove()
    only_last = bool(changed[:, -1].all()) and not changed[:, :-1].any()
    require(only_last, "positions='last' changed other tokens")
    return ""


# How a block is put together


def branches(model: nn.Module, layer: int) -> list[str]:
    "Which of attn and mlp are sites in this layer."
    has = available_sites(model)
    return [at for at in ("attn", "mlp") if layer in has[at]]


def watch(model: nn.Module, layer: int, edits: dict | None = None) -> tuple[dict, list, list]:
    """One forward pass. Returns, by name, the block's input x, its output h, and its sites; every
    tensor of x's size that entered a module of the block; and every one that left a norm."""
    block, seen, entered, normed = blocks(model)[layer], {}, [], []

    def keep(module, args, kwargs, output):
        x = args[0] if args else kwargs.get("hidden_states")
        if module is block:
            seen.update(x=x.clone(), h=first(output).clone())
        elif isinstance(x, torch.Tensor):
            entered.append(x.clone())
            if re.search(NORM, type(module).__name__):
                normed.append(output.clone())

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in block.modules()]
    at = branches(model, layer)
    try:
        with edit(model, edits or {}), capture(model, at=at, layers=[layer]) as acts:
            logits(model)
    finally:
        for handle in handles:
            handle.remove()
    if locate(model, Site(layer, "block")).parts:
        streams = (-1, hidden_size(model))
        seen = {name: tensor.unflatten(-1, streams) for name, tensor in seen.items()}
    shape = seen["x"].shape

    def alike(tensors):  # some modules flatten the tokens
        return [t.reshape(shape) for t in tensors if t.numel() == shape.numel()]

    found = {**seen, **{site.at: tensor for site, tensor in acts.items()}}
    return found, alike(entered), alike(normed)


def sum_seen(branch: torch.Tensor, sums: list, residuals: list) -> bool:
    "Whether some sum is a residual, times a number, plus what the branch adds."
    for total in sums:
        for residual in residuals:
            rest = total - branch.reshape(total.shape)
            factor = (rest * residual).sum() / (residual * residual).sum()
            if factor > 0.1 and (rest - factor * residual).norm() < 1e-4 * branch.norm():
                return True  # float32 sums
    return False


def arrives(model: nn.Module, layer: int, at: str) -> bool:
    """Whether a vector added at the site is added to the stream: to h, or in multiples to several
    streams. For the attention, what the MLP adds is held fixed meanwhile."""
    vector, mlp = vector_for(model), Site(layer, "mlp")
    with capture(model, at=branches(model, layer), layers=[layer]) as base:
        logits(model)
    held = {mlp: lambda h: base[mlp]} if at == "attn" and mlp in base else {}

    def streams(edits):
        seen, entered, _ = watch(model, layer, edits)
        return [seen["h"]] + (entered if seen["h"].ndim > 3 else [])

    shifted = {**held, Site(layer, at): lambda h: h + vector}
    for before, after in zip(streams({}), streams(shifted), strict=True):
        shift = after - before
        share = (shift @ vector / (vector @ vector))[..., None] if shift.ndim > 3 else 1.0
        if shift.norm() > 0 and (shift - share * vector).norm() < 1e-4 * shift.norm():
            return True
    return False


def branch_form(model: nn.Module, layer: int) -> str:
    """How the block's output is computed from its sites.

    'x + a + m'; 'sums inside' (of a residual and a branch, entering or leaving a module); 'v
    arrives' or 'streams' (a vector added at each site is found in the output); '' without branch
    sites."""
    has = branches(model, layer)
    if not has:
        return ""
    seen, entered, normed = watch(model, layer)
    x, h = seen["x"], seen["h"]
    if x.ndim == 3:
        added = sum(seen[at].reshape(x.shape) for at in has)
        if (h - x - added).norm() < 1e-4 * (h - x).norm():
            return "x + a + m" if len(has) == 2 else f"x + {has[0][0]}"
        if all(sum_seen(seen[at], [h, *entered], [x, *entered, *normed]) for at in has):
            return "sums inside"
    for at in has:
        require(arrives(model, layer, at), f"a vector at {at} is not in the stream of {layer}")
    return "v arrives" if x.ndim == 3 else "streams"


# Generation


def greedy(model: nn.Module, steps: int) -> torch.Tensor:
    "Greedy decoding that computes everything again at each step; the prompt's end is given."
    tokens = INPUT_IDS
    with prompt_ends(model, INPUT_IDS.shape[1]):
        for _ in range(steps):
            best = logits(model, tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens


def generate(model: nn.Module, steps: int, use_cache: bool = True) -> torch.Tensor:
    "Greedy decoding by the model's `generate`."
    with torch.no_grad():
        return model.generate(
            input_ids=INPUT_IDS,
            attention_mask=torch.ones_like(INPUT_IDS),
            do_sample=False,
            num_beams=1,
            max_new_tokens=steps,
            eos_token_id=-1,
            use_cache=use_cache,
        )


def check_generate(model: nn.Module, positions: tuple[str, ...], steps: int) -> str:
    """Steered, `generate` with a cache gives what computing everything again gives.

    Computing again is done by hand where that gives the unsteered model's tokens, else by
    `generate` without a cache (some models get other position numbers from `generate`). Returns
    '', or why the model cannot be asked."""
    model.generation_config.forced_eos_token_id = None  # BART's family ends every text with it
    try:
        unsteered = generate(model, steps)
    except Exception as error:
        return f"its own generate fails: {reason(error)}"
    again = greedy
    if not torch.equal(again(model, steps), unsteered):

        def again(model, steps):
            return generate(model, steps, use_cache=False)

        if not torch.equal(again(model, steps), unsteered):
            return "its own cached tokens differ"
    for name in positions:
        steering = steer(model, rank=2, positions=name)
        generator = torch.Generator().manual_seed(0)
        for p in steering.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        same = torch.equal(generate(model, steps), again(model, steps))
        require(same, f"generate with positions={name!r}")
        steering.remove()
    return ""


def reason(error: Exception) -> str:
    "An error in one line."
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
