"Every method on every architecture of the zoo that has the sites it needs, damaged files, and methods in several processes."
import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from safetensors.torch import load_file, save_file

from steer_nb.joint import JointConfig, JointError, joint, project
from steer_nb.methods import METHODS, MethodError, apply_method, load_method, method_size
from steer_nb.sites import SiteError
from steer_nb.steering import steerings
from steer_nb.train import TrainError
from steer_nb.zoo import INPUT_IDS, check_type, tiny_model, zoo_types
from test_train import TOY

FAMILIES = ("llama", "gpt2", "gemma3_text", "qwen3", "opt", "falcon", "mixtral", "phi", "bloom", "olmo2", "mamba2", "gpt_neox", "cohere", "granite",
            "stablelm", "starcoder2", "mpt", "lfm2", "nemotron_h")      # pre- and post-norm, parallel, experts, state space, Conv1D, no bias and bias

HEADS, ATTN, MLP = {"lofit", "jola"}, {"attn_vector", "attn_linear", "attn_nonlinear"}, {"mlp_vector", "mlp_linear", "mlp_nonlinear", "loreft", "loreft_last", "loreft_edges", "direft"}
LACKS = {   # what a family cannot have: a site, keys and values, or one last projection (experts)
    "opt": MLP, "mamba2": MLP | ATTN | HEADS | {"ia3", "joint"}, "mixtral": {"joint", "ia3"},
}


def loss_of(model, input_ids=INPUT_IDS):
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), input_ids.roll(-1, 1).flatten())      # the last token counts too


def logits_of(model):
    with torch.no_grad(): return model.eval()(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_methods_on_families(model_type, tmp_path):
    pristine = tiny_model(model_type).requires_grad_(True)
    base, refused = logits_of(pristine), {}
    for name in METHODS:
        model = copy.deepcopy(pristine)
        try: method = apply_method(model, name)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert (logits_of(method.model) - base).abs().max() < (1e-4 if name == "dora" else 1e-30), name       # DoRA divides by a norm
        learned = one_step(method)
        assert method.num_parameters == method_size(pristine, name), name                   # LoFiT's after it has chosen
        assert learned, f"{name}: no gradient reached any of its parameters"
        method.save(tmp_path / name)
        again = load_method(copy.deepcopy(pristine), tmp_path / name)
        assert torch.equal(logits_of(again.model), logits_of(method.model)), name
        assert not torch.equal(logits_of(method.model), base), name
    assert refused.keys() == LACKS.get(model_type, set()), refused


def one_step(method) -> bool:
    "Move along the gradient, twice: what starts at zero behind a zero moves in the second step. Whether anything moved."
    moved = set()
    for _ in method.stages():
        method.model.train()
        for step in (1, 2):
            parameters = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
            optimizer = torch.optim.SGD([{"params": group.parameters} for group in method.groups()], lr=0.5)
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
    applied = set()
    for name in ("bitfit", "lora", "ia3", "loreft", "lofit", "jola", "post_block_linear", "joint"):
        model = copy.deepcopy(pristine)
        try: method = apply_method(model, name)
        except (SiteError, MethodError, JointError): continue
        assert (logits_of(method.model) - base).abs().max() < 1e-5, name      # adding a zero can take another kernel
        if name != "lofit": assert method.num_parameters == method_size(pristine, name), name
        applied.add(name)
    if check_type(model_type).result == "checked": assert {"bitfit", "lora", "post_block_linear"} <= applied


def test_the_projection_holds_with_a_norm_before_the_stream():
    "Gemma's post-norm: D is orthogonal to what LoRA adds to the stream, measured at the block's output, and not to B itself."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers: layer.post_feedforward_layernorm.weight.normal_()
    method = joint(model, JointConfig(weight_rank=2, rank=3))
    with torch.no_grad():
        for module, _ in method.writers.values(): module.lora_B["default"].weight.normal_()
    project(method)
    for (site, adapter), (module, _) in zip(method.steering.adapters.items(), method.writers.values()):
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


@pytest.mark.parametrize("project_", ["steps", "once", "epoch"])
def test_nothing_is_projected_while_lora_writes_nothing(project_):
    method = joint(tiny_model("llama"), JointConfig(project=project_))
    before = [adapter.down.detach().clone() for adapter in method.steering.adapters.values()]
    optimizer = torch.optim.AdamW([{"params": group.parameters} for group in method.groups()])
    with torch.no_grad(): method.after_step(1, True, optimizer)
    assert all(torch.equal(a, b.down) for a, b in zip(before, method.steering.adapters.values()))
    with torch.no_grad():
        for module, _ in method.writers.values(): module.lora_B["default"].weight.normal_()
        method.after_step(1, True, optimizer)
    assert not any(torch.equal(a, b.down) for a, b in zip(before, method.steering.adapters.values()))


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


@pytest.mark.parametrize("model_type, keys, last", [("gemma3_text", "kv", "down_proj"), ("qwen3", "kv", "down_proj"), ("opt", "kv", "fc2"), ("phi", "kv", "fc2"), ("llama", "kv", "down_proj")])
def test_ia3_scales_keys_values_and_the_last_projection(model_type, keys, last):
    "Not queries, which PEFT's own table has for some of these."
    model = apply_method(tiny_model(model_type), "ia3").model
    adapted = {name.split(".")[-1]: module.is_feedforward for name, module in model.named_modules() if hasattr(module, "ia3_l")}
    assert adapted == {**{f"{key}_proj": False for key in keys}, last: True}


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_a_damaged_full_model_leaves_the_base_as_it_was(tmp_path, damage):
    method = apply_method(tiny_model("llama"), "full")
    with torch.no_grad(): [p.add_(1) for p in method.model.parameters()]
    method.save(tmp_path / "full")
    path = tmp_path / "full" / "trainable.safetensors"
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    if damage == "missing": del tensors[last]
    if damage == "extra": tensors["another"] = torch.zeros(1)
    if damage == "shape": tensors[last] = tensors[last][:1].clone()
    if damage == "nan": tensors[last].view(-1)[0] = float("nan")
    save_file(tensors, path)
    model = tiny_model("llama")
    with pytest.raises(TrainError): load_method(model, tmp_path / "full")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model("llama").parameters()))


@pytest.mark.parametrize("change", [dict(options=None), dict(options=[]), dict(name=["lora"]), dict(base=None), dict(base={"name": "x"})]
                         + [dict(options=options) for options in ({"rank": 4}, {"rank": "4"}, {"targets": 5}, {"alpha": 1000}, {"rnk": 4})])
def test_a_tampered_method_is_refused(tmp_path, change):
    apply_method(tiny_model("llama"), "lora").save(tmp_path / "lora")
    path = tmp_path / "lora" / "method.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    model = tiny_model("llama")
    with pytest.raises(ValueError): load_method(model, tmp_path / "lora")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_options_are_checked_before_training():
    for name, options in (("lofit", dict(n_heads=2.5)), ("lofit", dict(n_heads=True)), ("lofit", dict(l1=-1.0)), ("jola", dict(l0="a")), ("lora", dict(rank=2.5)), ("lora", dict(alpha="x")),
                          ("lora", dict(targets=5)), ("joint", dict(weights_window=3)), ("joint", dict(weights="full", weight_layers=1)), ("post_block", dict(layers=object()))):
        with pytest.raises(ValueError): apply_method(tiny_model("llama"), name, **options)
    assert apply_method(tiny_model("llama"), "post_block", layers=range(1)).options["layers"] == [0]
    assert apply_method(tiny_model("llama"), "lora", targets="q_proj").num_parameters == method_size(tiny_model("llama"), "lora", targets="q_proj") == 2 * 8 * 64


def test_experts_train_jointly_without_a_projection():
    method = apply_method(tiny_model("mixtral"), "joint", project="never")
    assert one_step(method) and method.num_parameters > 0


def test_a_saved_method_replaces_another(tmp_path):
    apply_method(tiny_model("llama"), "joint").save(tmp_path)
    apply_method(tiny_model("llama"), "bitfit").save(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["method.json", "trainable.safetensors"]


TOGETHER = TOY + '''
import json
from steer_nb.methods import apply_method
name, options, path = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
method = apply_method(tiny().double(), name, **options)
run = fit(method, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2, batch_size=8))
values = {key: p.detach().flatten()[:5].tolist() for key, p in method.model.named_parameters() if p.requires_grad}
if int(__import__("os").environ.get("RANK", 0)) == 0: open(path, "w").write(json.dumps([[point["loss"] for point in run.curve], values, run.processes]))
'''


@pytest.mark.parametrize("name, options", [("joint", {"rank": 2, "weight_rank": 2}), ("joint", {"rank": 2, "weight_rank": 2, "project": "penalty"}), ("lofit", {"n_heads": 2})])
def test_two_processes_train_what_one_trains(tmp_path, name, options):
    "Stages, a penalty and a projection after each step; in float64, where only the order of sums differs."
    script, found = tmp_path / "train.py", []
    script.write_text(TOGETHER)
    for count, launch in ((1, ()), (2, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))):
        path = tmp_path / str(count)
        done = subprocess.run([sys.executable, *launch, script, name, json.dumps(options), path], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(path.read_text()))
    (losses, values, one), (losses2, values2, two) = found
    assert (one, two) == (1, 2) and values.keys() == values2.keys()
    assert max(abs(a - b) for a, b in zip(losses, losses2, strict=True)) < 1e-6
    assert max(abs(a - b) for key in values for a, b in zip(values[key], values2[key])) < 1e-4      # AdamW turns a rounding of a tiny gradient into a step
