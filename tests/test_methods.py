"Every method: its equation, size, training and files, on small models; what damaged files raise."

import copy
import gc
import json
import os
import subprocess
import warnings
from contextlib import contextmanager
from functools import partial

import children
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import tiny, tokenizer, toy

from steer_nb.core.adapters import make_adapter
from steer_nb.core.hooks import edit
from steer_nb.core.sites import SiteError
from steer_nb.core.steering import steerings
from steer_nb.data.encoding import task_batches
from steer_nb.methods.orthogonal import JointError
from steer_nb.methods.registry import METHODS, apply_method, load_method, method_size
from steer_nb.methods.rows import MethodError
from steer_nb.testing.tiny_models import tiny_model, zoo_types
from steer_nb.training.config import TrainConfig, TrainError
from steer_nb.training.fit import fit

# Architectures: pre- and post-norm, parallel, experts, state space, Conv1D, biases and none

QUICK = ("llama", "gpt2", "gemma3_text", "mixtral", "mamba2", "opt")
FAMILIES = QUICK + (
    "qwen3",
    "falcon",
    "phi",
    "bloom",
    "olmo2",
    "gpt_neox",
    "cohere",
    "granite",
    "stablelm",
    "starcoder2",
    "mpt",
    "lfm2",
    "nemotron_h",
)
HEADS, ATTN = ("lofit", "jola"), ("attn_vector", "attn_linear", "attn_nonlinear")
MLP = tuple(name for name, row in METHODS.items() if row.site == "mlp")
FEW = (  # one of each sort, for all other architectures
    "bitfit",
    "lora",
    "ia3",
    "loreft",
    "lofit",
    "jola",
    "post_block_linear",
    "joint",
)
UNSUPPORTED = (  # methods, error, words of its message, and the architectures that cannot have them
    (FEW, SiteError, "of blocks", "hrm_text xlm"),
    (
        ("loreft", *HEADS, "post_block_linear", "joint"),
        SiteError,
        "its layers are reversible",
        "reformer",
    ),
    (
        MLP,
        SiteError,
        "there is no MLP module",
        "opt bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart mvp pegasus "
        "plbart trocr whisper xglm",
    ),
    (MLP, SiteError, "it has no MLP module", "mamba2 falcon_mamba mamba xlnet zamba2"),
    (
        MLP,
        SiteError,
        "it has parts that are not understood",
        "gemma3n_text inkling2_text longcat_flash zaya",
    ),
    (MLP, SiteError, "its MLP is the sum of", "granitemoehybrid"),
    (ATTN, SiteError, "no 'attn' site", "mamba2"),
    (
        HEADS,
        SiteError,
        "it has no attention module",
        "mamba2 falcon_mamba longcat_flash mamba xlnet zamba2",
    ),
    (
        HEADS,
        SiteError,
        "no output projection with a whole number of heads",
        "deepseek_v4 jetmoe rwkv",
    ),
    (
        ("ia3",),
        MethodError,
        "no modules that compute keys and values",
        "mamba2 axk1 axk2 cpmant ctrl deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
        "dots3_note_text falcon_mamba glm4_moe_lite glm_moe_dsa hy_v4 jetmoe longcat_flash mamba "
        "minicpm3 moshi xlnet youtu",
    ),
    (
        ("ia3",),
        MethodError,
        "no linear layer at the end of its MLP",
        "mixtral cohere2_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoeshared "
        "inkling2_text inkling_text mellum minimax minimax_m2 olmoe qwen3_moe zamba2",
    ),
    (
        ("joint",),
        JointError,
        "does not train the last projection of any block",
        "mamba2 afmoe beam deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe falcon_mamba "
        "glm4_moe glm4_moe_lite glm_moe_dsa longcat_flash mamba solar_open",
    ),
    (  # a router, or the gate of a shared expert: experts in one tensor are not a matrix
        ("joint",),
        JointError,
        "the last matrix of the block",
        "mixtral cohere2_moe ernie4_5_moe flex_olmo gpt_oss granitemoe granitemoe_swa "
        "granitemoeshared hunyuan_v1_moe inkling2_text inkling_text jamba jetmoe laguna lfm2_moe "
        "mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text olmoe phimoe qwen2_moe "
        "qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text zaya",
    ),
    (("joint",), SiteError, "of blocks", "gemma3n_text"),  # once LoRA is on it
)
REPRESENTATIVES = ("xlm", "reformer", "xlnet", "granitemoehybrid", "gemma3n_text", "jetmoe")
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 77, 23], [61, 3, 90, 12, 55, 31]])


def slow_unless(names, quick):
    "The names as parameters of a test, slow but for the quick ones."
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def unsupported(model_type, names):
    "By method, the error that this architecture is to give, and words of its message."
    return {
        name: (error, words)
        for methods, error, words, types in UNSUPPORTED
        if model_type in types.split()
        for name in methods
        if name in names
    }


def try_method(model, name, expected):
    "The method on the model; None if it raises the expected error."
    if name not in expected:
        return apply_method(model, name)
    with pytest.raises(ValueError) as raised:
        apply_method(model, name)
    error, words = expected[name]
    assert type(raised.value) is error and words in str(raised.value), (name, raised.value)
    return None


def logits_of(model, input_ids=INPUT_IDS):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


def one_step(method) -> bool:
    """Whether two steps along the gradient move anything.

    What starts at zero behind a zero moves in the second step."""
    moved = False
    for _ in method.stages():
        method.model.train()
        for step in (1, 2):
            groups = [{"params": group.parameters} for group in method.groups()]
            optimizer = torch.optim.SGD(groups, lr=0.5)
            mask = torch.ones_like(INPUT_IDS)
            logits = method.model(input_ids=INPUT_IDS, attention_mask=mask).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), INPUT_IDS.roll(-1, 1).flatten()
            )
            extra = method.penalty()
            (loss if extra is None else loss + extra).backward()
            moved |= any(
                p.grad is not None and p.grad.abs().max() > 0
                for group in method.groups()
                for p in group.parameters
            )
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                method.after_step(step, step == 2, optimizer)
    return moved


@pytest.mark.parametrize("model_type", slow_unless(FAMILIES, QUICK))
def test_every_method_on_families_of_models(model_type, tmp_path):
    "A new method changes nothing, has the size of its formula, gets gradients and can be saved."
    pristine = tiny_model(model_type).requires_grad_(True)
    base, expected = logits_of(pristine), unsupported(model_type, METHODS)
    for name in METHODS:
        method = try_method(copy.deepcopy(pristine), name, expected)
        if method is None:
            continue
        tolerance = 1e-4 if name == "dora" else 1e-30  # DoRA divides by a norm
        assert (logits_of(method.model) - base).abs().max() < tolerance, name
        assert one_step(method), f"{name}: no gradient reached any of its parameters"
        assert method.num_parameters == method_size(pristine, name), name  # LoFiT's have changed
        method.save(tmp_path / name)
        again = load_method(copy.deepcopy(pristine), tmp_path / name)
        assert torch.equal(logits_of(again.model), logits_of(method.model)), name
        assert not torch.equal(logits_of(method.model), base), name
        assert again.name == name and again.options == method.options
        assert again.num_parameters == method.num_parameters


@pytest.mark.parametrize(
    "model_type",
    slow_unless([name for name in zoo_types() if name not in FAMILIES], REPRESENTATIVES),
)
def test_methods_start_as_nothing_on_every_architecture(model_type):
    try:
        pristine = tiny_model(model_type).requires_grad_(True)
        if sum(p.numel() for p in pristine.parameters()) > 3e7:
            pytest.skip("too large even when small")
        base = logits_of(pristine)
    except Exception as error:  # what a type that does not build here raises
        pytest.skip(f"does not build here: {error}"[:200])
    expected = unsupported(model_type, FEW)
    assert torch.equal(base, logits_of(pristine))  # deterministic by itself
    for name in FEW:
        method = try_method(copy.deepcopy(pristine), name, expected)
        if method is None:
            continue
        difference = (logits_of(method.model) - base).abs().max()
        assert difference < 1e-5, name  # adding a zero can take another kernel
        if name != "lofit":
            assert method.num_parameters == method_size(pristine, name), name


# The equations, on a plain model with weights or activations changed by hand

BATCH = task_batches(tokenizer, toy.train, batch_size=29)[0]
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
ENDS = (BATCH["labels"] != -100).int().argmax(dim=1)  # where each prompt ends


def batch_logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS, labels=BATCH["labels"]).logits


def randomised(name, **options):
    "A method whose trained parameters are random numbers, so that every term counts."
    method, generator = apply_method(tiny(), name, **options), torch.Generator().manual_seed(1)
    for parameter in method.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return method


def lora_weight(m, W):
    return W + m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight


def dora_weight(m, W):
    V = lora_weight(m, W)
    return m.lora_magnitude_vector["default"].weight[:, None] * V / V.norm(dim=1, keepdim=True)


def ia3_weight(m, W):
    scale = m.ia3_l["default"].flatten()
    return W * scale[None, :] if m.is_feedforward else W * scale[:, None]


def loreft(a, h):
    return h + (h @ a.weight.T + a.bias - h @ a.R.T) @ a.R  # h + Rᵀ(W h + b − R h)


def direft(a, h):
    return h + (h @ a.weight.T + a.bias) @ a.project  # h + W₂ᵀ(W₁ h + b)


def jola(a, z):
    add, scale = (
        (torch.sigmoid(g) * 1.2 - 0.1).clamp(0, 1).reshape(-1, 1)
        for g in (a.gate_add, a.gate_scale)
    )
    return (1 + scale * a.scale) * z + add * a.vector


def vector(a, h):
    return h + a.vector


def linear(a, h):
    return h + (a.up @ (a.down @ h.mT)).mT


def nonlinear(a, h):
    read = a.down @ h.mT
    return h + (a.up @ (read / (1 + torch.exp(-read)))).mT


def where(chosen):
    "A change that is made in some columns only: `chosen(column, end of the prompt)`."
    columns = range(INPUTS["input_ids"].shape[1])
    mask = torch.tensor([[chosen(column, int(end)) for column in columns] for end in ENDS])
    return lambda change: lambda a, h: torch.where(mask[..., None], change(a, h), h)


def same_logits(method, plain):
    "Within float32 rounding through two blocks, and not those of the base."
    expected = batch_logits(plain)
    assert (expected - batch_logits(tiny())).abs().max() > 0.02
    assert (batch_logits(method.model) - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    "name, change", [("lora", lora_weight), ("dora", dora_weight), ("ia3", ia3_weight)]
)
def test_peft_methods_are_their_equations(name, change):
    method, plain = randomised(name), tiny()
    for path, module in method.model.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            weight = change(module, module.base_layer.weight.detach())
            plain.get_submodule(path).weight.data.copy_(weight)
    same_logits(method, plain)


EDITS = {
    "loreft": loreft,
    "loreft_block": loreft,
    "direft": direft,
    "loreft_last": where(lambda c, end: c == end - 1)(loreft),
    "loreft_edges": where(lambda c, end: c < end and (c < 2 or c >= end - 3))(loreft),
    "jola": jola,
    **{
        f"{place}_{change.__name__}": change
        for place in ("post_block", "mlp", "attn")
        for change in (vector, linear, nonlinear)
    },
}


@pytest.mark.parametrize("name", EDITS)
def test_shifts_are_their_equations(name):
    options = {"positions": "prefix:2+suffix:3"} if name == "loreft_edges" else {}
    method, plain = randomised(name, **options), tiny()
    adapters = steerings(method.model)["method"].adapters
    with edit(plain, {site: partial(EDITS[name], a) for site, a in adapters.items()}):
        same_logits(method, plain)


def test_bitfit_adds_a_constant_to_what_each_linear_layer_returns():
    method, plain = randomised("bitfit"), tiny()

    def add(module, args, output, bias):
        return output + bias.detach()

    for path, module in method.model.named_modules():
        bias = getattr(module, "bias", None)
        if bias is not None:
            plain.get_submodule(path).register_forward_hook(partial(add, bias=bias))
    same_logits(method, plain)


def test_lofit_adds_a_vector_to_the_chosen_heads():
    heads = [(0, 1), (1, 0), (1, 3)]
    method, plain = randomised("lofit", heads=heads), tiny()
    adapters = {site.layer: a for site, a in steerings(method.model)["method"].adapters.items()}
    vectors = torch.cat([adapters[layer].vector.detach() for layer in (0, 1)])

    def add(module, args, layer):
        z = args[0].clone()
        for (block, head), v in zip(heads, vectors, strict=True):
            if block == layer:
                z[..., head * 8 : (head + 1) * 8] += v
        return (z,)

    for layer, block in enumerate(plain.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(partial(add, layer=layer))
    same_logits(method, plain)


@pytest.mark.parametrize(
    "model_type, last",
    [
        ("gemma3_text", "down_proj"),
        ("qwen3", "down_proj"),
        ("opt", "fc2"),
        ("phi", "fc2"),
        ("llama", "down_proj"),
    ],
)
def test_ia3_scales_keys_values_and_the_last_projection(model_type, last):
    "Not queries, which PEFT's own table has for some of these."
    model = apply_method(tiny_model(model_type), "ia3").model
    adapted = {
        name.split(".")[-1]: module.is_feedforward
        for name, module in model.named_modules()
        if hasattr(module, "ia3_l")
    }
    assert adapted == {"k_proj": False, "v_proj": False, last: True}


# Training


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, tmp_path):
    "The loss falls, only its own parameters change, and the run's folder has what was trained."
    method = apply_method(tiny(), name)
    frozen = {
        path: p.detach().clone()
        for path, p in method.model.named_parameters()
        if not p.requires_grad
    }
    config = TrainConfig(lr=3e-3 if name == "full" else 2e-2, epochs=4, batch_size=8)
    run = fit(method, tokenizer, toy, config, output=tmp_path)
    assert run.best_loss < run.validation[0]["loss"]
    assert run.trainable == method.num_parameters == method_size(tiny(), name, **method.options)
    after = dict(method.model.named_parameters())
    assert all(torch.equal(after[path], parameter) for path, parameter in frozen.items())
    loaded = load_method(tiny(), tmp_path / "method")
    assert torch.equal(batch_logits(loaded.model), batch_logits(method.model))


def break_after(model, passes):
    "Raise `KeyboardInterrupt` after so many forward passes in training."
    seen = []

    def hook(module, args):
        seen.append(module.training)
        if sum(seen) > passes:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    "name, options, passes",
    [
        ("lofit", dict(n_heads=2), 3),  # in the first of its two stages
        ("lofit", dict(n_heads=2), 11),  # in the second
        ("jola", {}, 3),  # random gates
        ("joint", {}, 3),  # projections of parameters and of the optimizer's momentum
        ("joint", dict(project="once", every=2), 4),  # it was made before the break
    ],
)
def test_a_resumed_training_is_bit_identical(name, options, passes, tmp_path):
    reference, broken, again = (apply_method(tiny(), name, **options) for _ in range(3))
    config = TrainConfig(lr=1e-2, epochs=2, batch_size=8)
    expected = fit(reference, tokenizer, toy, config)
    break_after(broken.model, passes)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer, toy, config, output=tmp_path, checkpoint_every=0)
    run = fit(again, tokenizer, toy, config, output=tmp_path, checkpoint_every=0)
    assert run.resumed == [passes % 8]  # eight steps in each stage
    assert run.curve == expected.curve and run.validation == expected.validation
    assert run.best_step == expected.best_step and again.options == reference.options
    for p, q in zip(again.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(p, q)


TOGETHER = (
    ("joint", {"rank": 2, "weight_rank": 2}),
    ("joint", {"rank": 2, "weight_rank": 2, "project": "penalty"}),
    ("lofit", {"n_heads": 2}),
)


def train_together(path):
    "Train each method of `TOGETHER` in float64, and write what came out."
    found = []
    for name, options in TOGETHER:
        torch.manual_seed(0)
        method = apply_method(tiny().double(), name, **options)
        config = TrainConfig(lr=1e-2, epochs=2, batch_size=8)
        run = fit(method, tokenizer, toy, config)
        values = {
            key: p.detach().flatten()[:5].tolist()
            for key, p in method.model.named_parameters()
            if p.requires_grad
        }
        found.append([[point["loss"] for point in run.curve], values, run.processes])
    if os.environ.get("RANK", "0") == "0":
        with open(path, "w") as file:
            json.dump(found, file)


def test_two_processes_train_what_one_trains(tmp_path):
    "Stages, a penalty and a projection; in float64, where only the order of sums differs."
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for done in (
        children.run(train_together, one, environment={"ACCELERATE_USE_CPU": "true"}),
        *children.run_processes(train_together, 2, two),
    ):
        assert done.returncode == 0, done.stderr[-2000:]
    found = zip(json.loads(one.read_text()), json.loads(two.read_text()), strict=True)
    for (losses, values, processes), (losses2, values2, processes2) in found:
        assert (processes, processes2) == (1, 2) and values.keys() == values2.keys()
        assert max(abs(a - b) for a, b in zip(losses, losses2, strict=True)) < 1e-6
        for key in values:
            pairs = zip(values[key], values2[key], strict=True)
            # AdamW turns the rounding of a tiny gradient into a step
            assert max(abs(a - b) for a, b in pairs) < 1e-4


def test_reft_rotations_stay_orthonormal():
    "Exactly, up to rounding, after every step: by parametrisation and not by a penalty."
    method, seen = apply_method(tiny(), "loreft", rank=4), []

    def look(step, ends_epoch, optimizer):
        adapters = steerings(method.model)["method"].adapters.values()
        seen.extend(float((a.R @ a.R.T - torch.eye(4)).abs().max()) for a in adapters)

    method.after_step = look
    fit(method, tokenizer, toy, TrainConfig(lr=2e-2, epochs=4, batch_size=8))
    assert len(seen) == 32 and max(seen) < 1e-6


def test_jolas_penalty_closes_gates():
    shares = {}
    for l0 in (0.0, 5.0):
        method = apply_method(tiny(), "jola", l0=l0)
        fit(method, tokenizer, toy, TrainConfig(lr=5e-2, epochs=8, batch_size=8))
        adapters = steerings(method.model)["method"].adapters.values()
        shares[l0] = float(sum(a.expected_open() for a in adapters)) / 16
    assert shares[5.0] < shares[0.0] - 0.1


# LoFiT


@contextmanager
def seen_at_choice(method):
    "Two dicts, which get the trained parameters before and after the heads are chosen."
    before, after, choose = {}, {}, method.choose

    def trained():
        named = method.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def watched():
        before.update(trained())
        choose()
        after.update(trained())

    method.choose = watched
    yield before, after


def heads_that_move(model):
    "The (layer, head) pairs that the steering's own hook changes."
    seen, moved = {}, set()

    def keep(module, args, layer):
        seen[layer] = args[0].clone()

    def compare(module, args, layer):
        changed = (args[0] != seen[layer]).any(0).any(0).nonzero()
        moved.update((layer, int(n) // 8) for n in changed)

    for layer, block in enumerate(model.model.layers):
        projection = block.self_attn.o_proj
        projection.register_forward_pre_hook(partial(keep, layer=layer), prepend=True)
        projection.register_forward_pre_hook(partial(compare, layer=layer))
    model(torch.arange(3, 9)[None])
    return moved


def test_lofit_trains_vectors_on_the_heads_with_the_largest_scales(tmp_path):
    """Four of eight heads reach the stream at all, so that no others can be chosen.

    Of the four it must be the two with the longest scales at the end of the first stage."""
    live = {(0, 1), (0, 2), (1, 0), (1, 3)}
    base = tiny()
    with torch.no_grad():
        for layer, block in enumerate(base.model.layers):
            for head in range(4):
                if (layer, head) not in live:
                    block.self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] = 0
    weights = {name: p.clone() for name, p in base.state_dict().items()}
    method = apply_method(base, "lofit", n_heads=2)
    with seen_at_choice(method) as (scales, new):
        config = TrainConfig(lr=3e-2, epochs=3, batch_size=8)
        fit(method, tokenizer, toy, config, output=tmp_path / "run")

    rows = {
        (int(name.split("layers.")[1].split(".")[0]), head): row
        for name, scale in scales.items()
        for head, row in enumerate(scale)
    }
    lengths = {head: float(row.norm()) for head, row in rows.items()}
    assert len(scales) == 2 and len(lengths) == 8
    assert {head for head, length in lengths.items() if length > 0} == live
    ranked = sorted(live, key=lengths.get)
    assert lengths[ranked[2]] > 1.1 * lengths[ranked[1]]  # no tie
    for other in (torch.sum, torch.max):  # another criterion would choose others
        values = {head: float(other(rows[head])) for head in live}
        assert set(sorted(live, key=values.get)[2:]) != set(ranked[2:])
    assert set(method.heads) == set(ranked[2:])

    trained = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    assert trained.keys() == new.keys() and sum(p.numel() for p in trained.values()) == 2 * 8
    assert all(not vector.any() for vector in new.values())
    assert all((vector.norm(dim=-1) > 0).all() for vector in trained.values())
    after = method.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert heads_that_move(method.model) == set(method.heads)
    saved = load_file(tmp_path / "run" / "method" / "steering.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 2 * 8
    assert len(list((tmp_path / "run" / "method").glob("*.safetensors"))) == 1


def test_lofits_penalty_shortens_the_scales():
    length = {}
    for l1 in (0.0, 0.01):
        method = apply_method(tiny(), "lofit", n_heads=2, l1=l1)
        with seen_at_choice(method) as (scales, _):
            fit(method, tokenizer, toy, TrainConfig(lr=3e-2, epochs=3, batch_size=8))
        length[l1] = sum(float(scale.abs().sum()) for scale in scales.values())
    assert 0 < length[0.01] < 0.9 * length[0.0], length


# Wrong options, and damaged files


def test_a_failed_method_leaves_no_trace():
    model = tiny_model("llama").requires_grad_(True)
    attributes, modules = set(vars(model)), [*model.named_modules()]
    parameters = [*model.named_parameters()]
    for name, options in (
        ("joint", dict(rank=64)),
        ("lora", dict(targets=["nothing"])),
        ("joint", dict(targets=["q_proj"])),
        ("lofit", dict(heads=[[0, 9]])),
    ):
        with pytest.raises(ValueError):
            apply_method(model, name, **options)
        assert set(vars(model)) == attributes and [*model.named_modules()] == modules, name
        now = zip(parameters, model.named_parameters(), strict=True)
        assert all(a == b and p is q and q.requires_grad for (a, p), (b, q) in now), name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_method(model, "lora")  # PEFT would warn if something of it were left


@pytest.mark.parametrize(
    "name, options",
    [
        ("lofit", dict(n_heads=2.5)),
        ("lofit", dict(n_heads=True)),
        ("lofit", dict(n_heads=9)),
        ("lofit", dict(l1=-1.0)),
        ("lofit", dict(heads=5)),
        ("jola", dict(l0="a")),
        ("lora", dict(rank=2.5)),
        ("lora", dict(rank=0)),
        ("lora", dict(alpha="x")),
        ("lora", dict(targets=5)),
        ("lora", dict(targets=[])),
        ("joint", dict(weights_window=3)),
        ("joint", dict(weights="full", weight_layers=1)),
        ("joint", dict(weights="full", weight_layers=[2])),
        ("post_block", dict(layers=object())),
    ],
)
def test_wrong_options_raise_an_error(name, options):
    with pytest.raises(ValueError):
        apply_method(tiny_model("llama"), name, **options)


def test_options_are_kept_as_they_are_saved():
    method = apply_method(tiny_model("llama"), "post_block", layers=range(1))
    assert method.name == "post_block_linear" and method.options["layers"] == [0]
    method = apply_method(tiny_model("llama"), "lora", targets="q_proj")
    size = method_size(tiny_model("llama"), "lora", targets="q_proj")
    assert method.num_parameters == size == 2 * 8 * 64


def test_a_damaged_folder_raises_an_error(tmp_path):
    method = apply_method(tiny_model("llama"), "joint")
    method.save(tmp_path / "joint")
    other_schema = '{"schema": 9, "name": "joint", "options": {}, "base": null}'
    for name, damage in (
        ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-40])),
        ("steering.safetensors", lambda p: p.write_bytes(b"")),
        ("method.json", lambda p: p.write_text("[" * 100_000)),
        ("method.json", lambda p: p.write_text(other_schema)),
    ):
        path = tmp_path / "joint" / name
        whole = path.read_bytes()
        damage(path)
        model = tiny_model("llama")
        with pytest.raises(ValueError):
            load_method(model, tmp_path / "joint")
        assert not steerings(model) and not any("lora" in key for key, _ in model.named_modules())
        path.write_bytes(whole)
    load_method(tiny_model("llama"), tmp_path / "joint")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_a_damaged_full_model_leaves_the_base_as_it_was(tmp_path, damage):
    method = apply_method(tiny_model("llama"), "full")
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(1)
    method.save(tmp_path / "full")
    path = tmp_path / "full" / "trainable.safetensors"
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    if damage == "missing":
        del tensors[last]
    if damage == "extra":
        tensors["another"] = torch.zeros(1)
    if damage == "shape":
        tensors[last] = tensors[last][:1].clone()
    if damage == "nan":
        tensors[last].view(-1)[0] = float("nan")
    save_file(tensors, path)
    model = tiny_model("llama")
    with pytest.raises(TrainError):
        load_method(model, tmp_path / "full")
    before = tiny_model("llama").parameters()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


TAMPERED = [
    dict(options=None),
    dict(options=[]),
    dict(name=["lora"]),
    dict(base=None),
    dict(base={"name": "x"}),
    *(
        dict(options=options)
        for options in ({"rank": 4}, {"rank": "4"}, {"targets": 5}, {"alpha": 1000}, {"rnk": 4})
    ),
]


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_method_raises_an_error(tmp_path, change):
    apply_method(tiny_model("llama"), "lora").save(tmp_path / "lora")
    path = tmp_path / "lora" / "method.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    model = tiny_model("llama")
    with pytest.raises(ValueError):
        load_method(model, tmp_path / "lora")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_saved_method_replaces_another(tmp_path):
    apply_method(tiny_model("llama"), "joint").save(tmp_path)
    apply_method(tiny_model("llama"), "bitfit").save(tmp_path, overwrite=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["method.json", "trainable.safetensors"]


# No second copy of the model


def taken(model, make):
    "What `make` returns, and the bytes of new tensors outside of the model's own memory."
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    gc.freeze()  # what exists already is not looked at
    try:
        made = make()
        gc.collect()
        storages = [
            one.untyped_storage()
            for one in gc.get_objects()
            if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"
        ]
    finally:
        gc.unfreeze()
    new = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    return made, sum(new.values())


SMALL = {
    name: {option: 2 for option in ("rank", "weight_rank") if option in METHODS[name].options}
    for name in METHODS
    if name != "full"
}


@pytest.mark.parametrize(
    "name, options", [*SMALL.items(), ("joint", dict(weights="full", weight_layers=[1]))]
)
def test_no_second_copy_of_the_model(tmp_path, name, options):
    """Neither in memory nor in the folder.

    PEFT's and LoReFT's buffers are 16 bytes here; a base of 100 kB would stand out."""
    assert sum(4 * p.numel() for p in tiny_model("llama").parameters()) > 90_000
    for make in (
        lambda model: apply_method(model, name, **options),
        lambda model: load_method(model, tmp_path),
    ):
        model = tiny_model("llama")
        own = {id(p): p.data_ptr() for p in model.parameters()}
        method, more = taken(model, partial(make, model))
        assert own.items() <= {id(p): p.data_ptr() for p in method.model.parameters()}.items()
        trained = {id(p): 4 * p.numel() for p in method.model.parameters() if p.requires_grad}
        new = sum(size for key, size in trained.items() if key not in own)
        # of weights that are trained themselves, joint training keeps the start
        start = sum(size for key, size in trained.items() if key in own)
        assert new <= more - start <= new + 64
        assert bool(start) == (options.get("weights") == "full")
        if not any(tmp_path.iterdir()):
            assert one_step(method)
            method.save(tmp_path)
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    tensors = [tensor for file in files for tensor in file.values()]
    size = 4 * method_size(tiny_model("llama"), name, **method.options)
    assert sum(4 * tensor.numel() for tensor in tensors) == size
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    header = 192 * len(tensors) + 64 * len(files)  # a name, a shape and two offsets for each
    assert size <= written <= size + header


# LoReFT and DiReFT against the code of their authors

PYREFT = """
import sys
import torch, pyreft
from safetensors.torch import save_file
torch.manual_seed(0)
found = {}
for word, dtype in (("float32", torch.float32), ("float64", torch.float64)):
    torch.set_default_dtype(dtype)  # in which it makes the orthonormal rows
    for name, options in (("Loreft", {}), ("Direft", {}), ("Nodireft", {"add_bias": False})):
        intervention = getattr(pyreft, name + "Intervention")
        edit = intervention(embed_dim=48, low_rank_dimension=5, dtype=dtype, **options)
        edit = edit.to(dtype).eval()
        with torch.no_grad():
            for key, parameter in edit.named_parameters():
                new = torch.randn_like(parameter)
                if key.endswith("original"):  # torch's parametrisation keeps signs on the diagonal
                    new = parameter + new.tril(-1)
                parameter.copy_(new)
            h = torch.randn(2, 7, 48, dtype=dtype)
            rows = edit.proj_layer.weight if name == "Nodireft" else edit.rotate_layer.weight.T
            source = edit.learned_source
            parts = {"h": h, "rows": rows, "weight": source.weight, "bias": source.bias}
            for part, tensor in {**parts, "out": edit(h)}.items():
                found[f"{name} {word} {part}"] = tensor.clone().contiguous()
save_file(found, sys.argv[1])
"""  # a program, since it runs in the Python of another environment


@pytest.fixture(scope="module")
def pyreft(tmp_path_factory):
    "What pyreft computes, with weights and activations that it drew itself."
    path = tmp_path_factory.mktemp("pyreft") / "found.safetensors"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["STEER_NB_PYREFT_PYTHON"], "-c", PYREFT, path],
        capture_output=True,
        text=True,
        env={**environment, "WANDB_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(path)


@pytest.mark.skipif(
    not os.environ.get("STEER_NB_PYREFT_PYTHON"),
    reason="needs pyreft 0.1.0 and transformers 4.45 in another environment",
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name, kind", [("Loreft", "loreft"), ("Direft", "direft"), ("Nodireft", "direft")]
)
def test_reft_is_what_pyreft_computes(pyreft, name, kind, dtype):
    """LoReFT with the same R, W and b. DiReFT is pyreft's `Nodireft` (any W₂, as in the paper) and,
    where W₂ is orthonormal, its `Direft`.

    Tolerance: sums of 48 products of numbers of size 1, and of 5, then rounded to the dtype: some
    tens of its precision relative to the largest output."""
    h, rows, weight, bias, out = (
        pyreft[f"{name} {dtype} {part}"] for part in ("h", "rows", "weight", "bias", "out")
    )
    precision = torch.finfo(h.dtype).eps
    adapter = make_adapter(kind, (48,), rank=5).to(h.dtype)
    with torch.no_grad():
        adapter.weight.copy_(weight)
        adapter.bias.copy_(bias)
        (adapter.rotation if kind == "loreft" else adapter.project).copy_(rows)
        shifted = h + adapter(h)
    if name != "Nodireft":
        assert (rows @ rows.T - torch.eye(5)).abs().max() < 10 * precision
    assert (out - h).abs().max() > 1
    assert (shifted - out).abs().max() < 50 * precision * out.abs().max()
