"Every method on every architecture of the zoo that has the sites it needs, a PEFT model merged, and a joint training's cost."
import copy
import warnings

import pytest
import torch

from steer_nb.joint import JointConfig, JointError, joint, project
from steer_nb.methods import METHODS, MethodError, apply_method, load_method, method_size
from steer_nb.sites import SiteError
from steer_nb.steering import steerings
from steer_nb.zoo import INPUT_IDS, check_type, tiny_model, zoo_types

FAMILIES = ("llama", "gpt2", "gemma3_text", "qwen3", "opt", "falcon", "mixtral", "phi", "bloom", "olmo2", "mamba2", "gpt_neox", "cohere", "granite",
            "stablelm", "starcoder2", "mpt", "lfm2", "nemotron_h")      # pre- and post-norm, parallel, experts, state space, Conv1D, no bias and bias

REFUSED = {"mamba2": ("ia3", "joint", "dora"), "mixtral": ("dora", "joint")}    # by PEFT or for want of keys, values or a last projection


def loss_of(model, input_ids=INPUT_IDS):
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), input_ids.roll(-1, 1).flatten())      # the last token counts too


def logits_of(model):
    with torch.no_grad(): return model.eval()(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_methods_on_families(model_type, tmp_path):
    pristine = tiny_model(model_type).requires_grad_(True)
    base, done = logits_of(pristine), []
    for name in METHODS:
        model = copy.deepcopy(pristine)
        try: method = apply_method(model, name)
        except SiteError: continue
        except ValueError as error:
            assert name in REFUSED.get(model_type, ()), (name, error)
            continue
        assert (logits_of(method.model) - base).abs().max() < (1e-4 if name == "dora" else 1e-30), name       # DoRA divides by a norm
        learned = one_step(method)
        assert method.num_parameters == method_size(pristine, name), name                   # LoFiT's after it has chosen
        assert learned, f"{name}: no gradient reached any of its parameters"
        method.save(tmp_path / name)
        again = load_method(copy.deepcopy(pristine), tmp_path / name)
        assert torch.equal(logits_of(again.model), logits_of(method.model)), name
        assert not torch.equal(logits_of(method.model), base), name
        done.append(name)
    assert {"full", "bitfit", "lora", "post_block_linear"} <= set(done)


def one_step(method) -> bool:
    "Move along the gradient, twice: what starts at zero behind a zero moves in the second step. Whether anything moved."
    moved = set()
    for _ in method.stages():
        method.model.train()
        for step in (1, 2):
            parameters = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
            optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
            extra = method.penalty()
            (loss_of(method.model) + (0 if extra is None else extra)).backward()
            moved |= {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad(): method.after_step(step, step == 2, optimizer)
    return bool(moved)


@pytest.mark.parametrize("model_type", [name for name in zoo_types() if name not in FAMILIES])
def test_methods_start_as_nothing_everywhere(model_type):
    try:
        pristine = tiny_model(model_type).requires_grad_(True)
        if sum(p.numel() for p in pristine.parameters()) > 3e6: pytest.skip("too large even when small")
        base = logits_of(pristine)
    except Exception as error: pytest.skip(f"does not build here: {error}"[:200])
    if not torch.equal(base, logits_of(pristine)): pytest.skip("not deterministic by itself")
    for name in ("bitfit", "lora", "ia3", "loreft", "lofit", "jola", "post_block_linear", "joint"):
        model = copy.deepcopy(pristine)
        try: method = apply_method(model, name)
        except (SiteError, MethodError, JointError): continue
        assert (logits_of(method.model) - base).abs().max() < 1e-5, name      # adding a zero can take another kernel
        if name != "lofit": assert method.num_parameters == method_size(pristine, name), name


def test_the_projection_holds_with_a_norm_before_the_stream():
    "Gemma's post-norm: D is orthogonal to what LoRA adds to the stream, measured at the block's output, and not to B itself."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers: layer.post_feedforward_layernorm.weight.normal_()
    method = joint(model, JointConfig(weight_rank=2, rank=3))
    with torch.no_grad():
        for module in method.writers.values(): module.lora_B["default"].weight.normal_()
    project(method)
    for (site, adapter), module in zip(method.steering.adapters.items(), method.writers.values()):
        norm = method.model.base_model.model.model.layers[site.layer].post_feedforward_layernorm
        y = torch.randn(1000, 32)                                        # what the projection puts out without LoRA
        coefficients = torch.randn(1000, 2)
        scale = (y + coefficients @ module.lora_B["default"].weight.T).square().mean(-1, keepdim=True).sqrt()     # undo RMS: what remains is linear
        scale0 = y.square().mean(-1, keepdim=True).sqrt()
        added = norm(y + coefficients @ module.lora_B["default"].weight.T) * scale - norm(y) * scale0
        read = (added @ adapter.down.T).norm() / (added.norm() * adapter.down.norm())
        assert read < 1e-5                                               # float32, and the norm's epsilon
        raw = (module.lora_B["default"].weight.T @ adapter.down.T).norm() / (module.lora_B["default"].weight.norm() * adapter.down.norm())
        assert raw > 1e-2


@pytest.mark.parametrize("project_", ["steps", "never"])
def test_nothing_is_projected_while_lora_writes_nothing(project_):
    method = joint(tiny_model("llama"), JointConfig(project=project_))
    before = [adapter.down.detach().clone() for adapter in method.steering.adapters.values()]
    optimizer = torch.optim.AdamW(method.steering.parameters())
    with torch.no_grad(): method.after_step(1, True, optimizer)
    assert all(torch.equal(a, b.down) for a, b in zip(before, method.steering.adapters.values()))


def test_a_failed_method_leaves_no_trace():
    model = tiny_model("llama").requires_grad_(True)
    attributes, modules, parameters = set(vars(model)), [*model.named_modules()], [*model.named_parameters()]
    for name, options in (("joint", dict(rank=64)), ("lora", dict(targets=["nothing"])), ("joint", dict(targets=["q_proj"])), ("lofit", dict(heads=[[0, 9]]))):
        with pytest.raises(ValueError): apply_method(model, name, **options)
        assert set(vars(model)) == attributes and [*model.named_modules()] == modules, name
        assert all(a == b and p is q and q.requires_grad for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True)), name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_method(model, "lora")                                      # PEFT would warn if something of it were left


def test_a_damaged_folder_is_refused(tmp_path):
    method = apply_method(tiny_model("llama"), "joint")
    method.save(tmp_path / "joint")
    for name, damage in (("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-40])),
                         ("steering.safetensors", lambda p: p.write_bytes(b"")), ("method.json", lambda p: p.write_text("[" * 100_000)),
                         ("method.json", lambda p: p.write_text('{"schema": 9, "name": "joint", "options": {}, "base": null}'))):
        path = tmp_path / "joint" / name
        whole = path.read_bytes()
        damage(path)
        model = tiny_model("llama")
        with pytest.raises(ValueError): load_method(model, tmp_path / "joint")
        assert not steerings(model) and not any("lora" in key for key, _ in model.named_modules())
        path.write_bytes(whole)
    load_method(tiny_model("llama"), tmp_path / "joint")
