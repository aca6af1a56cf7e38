"Every method on every architecture of the zoo that has the sites it needs, damaged files, and methods in several processes."

import copy
import gc
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import TOY

from steer_nb.core.adapters import make_adapter
from steer_nb.core.sites import SiteError
from steer_nb.core.steering import steerings
from steer_nb.methods.joint import JointConfig, joint
from steer_nb.methods.orthogonal import JointError, project
from steer_nb.methods.registry import METHODS, apply_method, load_method, method_size
from steer_nb.methods.rows import MethodError
from steer_nb.testing.tiny_models import INPUT_IDS, check_type, tiny_model, zoo_types
from steer_nb.training.config import TrainConfig, TrainError
from steer_nb.training.fit import fit

FAMILIES = (
    "llama",
    "gpt2",
    "gemma3_text",
    "qwen3",
    "opt",
    "falcon",
    "mixtral",
    "phi",
    "bloom",
    "olmo2",
    "mamba2",
    "gpt_neox",
    "cohere",
    "granite",
    "stablelm",
    "starcoder2",
    "mpt",
    "lfm2",
    "nemotron_h",
)  # pre- and post-norm, parallel, experts, state space, Conv1D, no bias and bias

HEADS, ATTN = ("lofit", "jola"), ("attn_vector", "attn_linear", "attn_nonlinear")
MLP = (
    "mlp_vector",
    "mlp_linear",
    "mlp_nonlinear",
    "loreft",
    "loreft_last",
    "loreft_edges",
    "direft",
)
FEW = (
    "bitfit",
    "lora",
    "ia3",
    "loreft",
    "lofit",
    "jola",
    "post_block_linear",
    "joint",
)  # one of each sort, for all other architectures
REFUSED = (  # methods, the error and its words, and the architectures that cannot have them; every other pair must work
    (FEW, SiteError, "no single stack of blocks", "hrm_text xlm"),
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
        "opt bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper xglm",
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
        "no modules that make keys and values",
        "mamba2 axk1 axk2 cpmant ctrl deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note_text falcon_mamba glm4_moe_lite glm_moe_dsa hy_v4 jetmoe "
        "longcat_flash mamba minicpm3 moshi xlnet youtu",
    ),
    (
        ("ia3",),
        MethodError,
        "no last projection of an MLP",
        "mixtral cohere2_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoeshared inkling2_text inkling_text mellum minimax minimax_m2 olmoe qwen3_moe zamba2",
    ),
    (
        ("joint",),
        JointError,
        "does not train the last projection of any block",
        "mamba2 afmoe beam deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe falcon_mamba glm4_moe glm4_moe_lite glm_moe_dsa longcat_flash mamba solar_open",
    ),
    (
        ("joint",),
        JointError,
        "the last matrix of the block",  # a router, the gate of a shared expert: experts in one tensor are no matrix
        "mixtral cohere2_moe ernie4_5_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe inkling2_text inkling_text jamba jetmoe laguna "
        "lfm2_moe mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp "
        "qwen4_exp_text zaya",
    ),
    (("joint",), SiteError, "no single stack of blocks", "gemma3n_text"),  # once LoRA is on it
)
TOO_LARGE = {"phi4_multimodal", "roc_bert"}  # even when small


def refusals(model_type, names):
    "By method, the error that this architecture is to give, and its words."
    return {
        name: (error, words)
        for names_, error, words, types in REFUSED
        if model_type in types.split()
        for name in names_
        if name in names
    }


def try_method(model, name, expected):
    "The method on the model; None if it is refused as expected. Any other error, and a method that is not refused, fails."
    if name not in expected:
        return apply_method(model, name)
    with pytest.raises(ValueError) as raised:
        apply_method(model, name)
    error, words = expected[name]
    assert type(raised.value) is error and words in str(raised.value), (name, raised.value)


def loss_of(model, input_ids=INPUT_IDS):
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), input_ids.roll(-1, 1).flatten()
    )  # the last token counts too


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_methods_on_families(model_type, tmp_path):
    pristine = tiny_model(model_type).requires_grad_(True)
    base, expected = logits_of(pristine), refusals(model_type, METHODS)
    for name in METHODS:
        method = try_method(copy.deepcopy(pristine), name, expected)
        if method is None:
            continue
        assert (logits_of(method.model) - base).abs().max() < (1e-4 if name == "dora" else 1e-30), (
            name
        )  # DoRA divides by a norm
        learned = one_step(method)
        assert method.num_parameters == method_size(pristine, name), (
            name
        )  # LoFiT's after it has chosen
        assert learned, f"{name}: no gradient reached any of its parameters"
        method.save(tmp_path / name)
        again = load_method(copy.deepcopy(pristine), tmp_path / name)
        assert torch.equal(logits_of(again.model), logits_of(method.model)), name
        assert not torch.equal(logits_of(method.model), base), name


def one_step(method) -> bool:
    "Move along the gradient, twice: what starts at zero behind a zero moves in the second step. Whether anything moved."
    moved = set()
    for _ in method.stages():
        method.model.train()
        for step in (1, 2):
            parameters = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
            optimizer = torch.optim.SGD(
                [{"params": group.parameters} for group in method.groups()], lr=0.5
            )
            extra = method.penalty()
            (loss_of(method.model) + (0 if extra is None else extra)).backward()
            moved |= {
                name
                for name, p in parameters.items()
                if p.grad is not None and p.grad.abs().max() > 0
            }
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                method.after_step(step, step == 2, optimizer)
    return bool(moved)


@pytest.mark.parametrize("model_type", [name for name in zoo_types() if name not in FAMILIES])
def test_methods_start_as_nothing_everywhere(model_type):
    checked = check_type(model_type)
    if checked.result == "not built":
        pytest.skip(f"does not build here: {checked.note}"[:200])
    pristine = tiny_model(model_type).requires_grad_(True)
    if model_type in TOO_LARGE:
        pytest.skip("too large even when small")
    base, expected = logits_of(pristine), refusals(model_type, FEW)
    assert torch.equal(base, logits_of(pristine))  # deterministic by itself
    for name in FEW:
        method = try_method(copy.deepcopy(pristine), name, expected)
        if method is None:
            continue
        assert (logits_of(method.model) - base).abs().max() < 1e-5, (
            name
        )  # adding a zero can take another kernel
        if name != "lofit":
            assert method.num_parameters == method_size(pristine, name), name


def test_the_projection_holds_with_a_norm_before_the_stream():
    "Gemma's post-norm: D is orthogonal to what LoRA adds to the stream, measured at the block's output, and not to B itself."
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.normal_()
    method = joint(model, JointConfig(weight_rank=2, rank=3))
    with torch.no_grad():
        for module, _ in method.writers.values():
            module.lora_B["default"].weight.normal_()
    project(method)
    for (site, adapter), (module, _) in zip(
        method.steering.adapters.items(), method.writers.values()
    ):
        norm = method.model.base_model.model.model.layers[site.layer].post_feedforward_layernorm
        y = torch.randn(1000, 32)  # what the projection puts out without LoRA
        coefficients = torch.randn(1000, 2)
        scale = (
            (y + coefficients @ module.lora_B["default"].weight.T)
            .square()
            .mean(-1, keepdim=True)
            .sqrt()
        )  # undo RMS: what remains is linear
        scale0 = y.square().mean(-1, keepdim=True).sqrt()
        added = (
            norm(y + coefficients @ module.lora_B["default"].weight.T) * scale - norm(y) * scale0
        )
        read = (added @ adapter.down.T).norm() / (added.norm() * adapter.down.norm())
        assert read < 1e-5  # float32, and the norm's epsilon
        raw = (module.lora_B["default"].weight.T @ adapter.down.T).norm() / (
            module.lora_B["default"].weight.norm() * adapter.down.norm()
        )
        assert raw > 1e-2


@pytest.mark.parametrize("project_", ["steps", "once", "epoch"])
def test_nothing_is_projected_while_lora_writes_nothing(project_):
    method = joint(tiny_model("llama"), JointConfig(project=project_))
    before = [adapter.down.detach().clone() for adapter in method.steering.adapters.values()]
    optimizer = torch.optim.AdamW([{"params": group.parameters} for group in method.groups()])
    with torch.no_grad():
        method.after_step(1, True, optimizer)
    assert all(torch.equal(a, b.down) for a, b in zip(before, method.steering.adapters.values()))
    with torch.no_grad():
        for module, _ in method.writers.values():
            module.lora_B["default"].weight.normal_()
        method.after_step(1, True, optimizer)
    assert not any(
        torch.equal(a, b.down) for a, b in zip(before, method.steering.adapters.values())
    )


def test_a_failed_method_leaves_no_trace():
    model = tiny_model("llama").requires_grad_(True)
    attributes, modules, parameters = (
        set(vars(model)),
        [*model.named_modules()],
        [*model.named_parameters()],
    )
    for name, options in (
        ("joint", dict(rank=64)),
        ("lora", dict(targets=["nothing"])),
        ("joint", dict(targets=["q_proj"])),
        ("lofit", dict(heads=[[0, 9]])),
    ):
        with pytest.raises(ValueError):
            apply_method(model, name, **options)
        assert set(vars(model)) == attributes and [*model.named_modules()] == modules, name
        assert all(
            a == b and p is q and q.requires_grad
            for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True)
        ), name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_method(model, "lora")  # PEFT would warn if something of it were left


def test_a_damaged_folder_is_refused(tmp_path):
    method = apply_method(tiny_model("llama"), "joint")
    method.save(tmp_path / "joint")
    for name, damage in (
        ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-40])),
        ("steering.safetensors", lambda p: p.write_bytes(b"")),
        ("method.json", lambda p: p.write_text("[" * 100_000)),
        (
            "method.json",
            lambda p: p.write_text('{"schema": 9, "name": "joint", "options": {}, "base": null}'),
        ),
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


@pytest.mark.parametrize(
    "model_type, keys, last",
    [
        ("gemma3_text", "kv", "down_proj"),
        ("qwen3", "kv", "down_proj"),
        ("opt", "kv", "fc2"),
        ("phi", "kv", "fc2"),
        ("llama", "kv", "down_proj"),
    ],
)
def test_ia3_scales_keys_values_and_the_last_projection(model_type, keys, last):
    "Not queries, which PEFT's own table has for some of these."
    model = apply_method(tiny_model(model_type), "ia3").model
    adapted = {
        name.split(".")[-1]: module.is_feedforward
        for name, module in model.named_modules()
        if hasattr(module, "ia3_l")
    }
    assert adapted == {**{f"{key}_proj": False for key in keys}, last: True}


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_a_damaged_full_model_leaves_the_base_as_it_was(tmp_path, damage):
    method = apply_method(tiny_model("llama"), "full")
    with torch.no_grad():
        [p.add_(1) for p in method.model.parameters()]
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
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model("llama").parameters())
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(options=None),
        dict(options=[]),
        dict(name=["lora"]),
        dict(base=None),
        dict(base={"name": "x"}),
    ]
    + [
        dict(options=options)
        for options in ({"rank": 4}, {"rank": "4"}, {"targets": 5}, {"alpha": 1000}, {"rnk": 4})
    ],
)
def test_a_tampered_method_is_refused(tmp_path, change):
    apply_method(tiny_model("llama"), "lora").save(tmp_path / "lora")
    path = tmp_path / "lora" / "method.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    model = tiny_model("llama")
    with pytest.raises(ValueError):
        load_method(model, tmp_path / "lora")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_options_are_checked_before_training():
    for name, options in (
        ("lofit", dict(n_heads=2.5)),
        ("lofit", dict(n_heads=True)),
        ("lofit", dict(l1=-1.0)),
        ("jola", dict(l0="a")),
        ("lora", dict(rank=2.5)),
        ("lora", dict(alpha="x")),
        ("lora", dict(targets=5)),
        ("joint", dict(weights_window=3)),
        ("joint", dict(weights="full", weight_layers=1)),
        ("post_block", dict(layers=object())),
    ):
        with pytest.raises(ValueError):
            apply_method(tiny_model("llama"), name, **options)
    assert apply_method(tiny_model("llama"), "post_block", layers=range(1)).options["layers"] == [0]
    assert (
        apply_method(tiny_model("llama"), "lora", targets="q_proj").num_parameters
        == method_size(tiny_model("llama"), "lora", targets="q_proj")
        == 2 * 8 * 64
    )


def test_experts_train_jointly_without_a_projection():
    method = apply_method(tiny_model("mixtral"), "joint", project="never")
    assert one_step(method) and method.num_parameters > 0


def test_a_saved_method_replaces_another(tmp_path):
    apply_method(tiny_model("llama"), "joint").save(tmp_path)
    apply_method(tiny_model("llama"), "bitfit").save(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "method.json",
        "trainable.safetensors",
    ]


TOGETHER = (
    TOY
    + """
import json
from steer_nb.methods.registry import apply_method
name, options, path = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
method = apply_method(tiny().double(), name, **options)
run = fit(method, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2, batch_size=8))
values = {key: p.detach().flatten()[:5].tolist() for key, p in method.model.named_parameters() if p.requires_grad}
if int(__import__("os").environ.get("RANK", 0)) == 0: open(path, "w").write(json.dumps([[point["loss"] for point in run.curve], values, run.processes]))
"""
)


@pytest.mark.parametrize(
    "name, options",
    [
        ("joint", {"rank": 2, "weight_rank": 2}),
        ("joint", {"rank": 2, "weight_rank": 2, "project": "penalty"}),
        ("lofit", {"n_heads": 2}),
    ],
)
def test_two_processes_train_what_one_trains(tmp_path, name, options):
    "Stages, a penalty and a projection after each step; in float64, where only the order of sums differs."
    script, found = tmp_path / "train.py", []
    script.write_text(TOGETHER)
    for count, launch in (
        (1, ()),
        (2, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    ):
        path = tmp_path / str(count)
        done = subprocess.run(
            [sys.executable, *launch, script, name, json.dumps(options), path],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "CUDA_VISIBLE_DEVICES": "",
                "TQDM_DISABLE": "1",
            },
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(path.read_text()))
    (losses, values, one), (losses2, values2, two) = found
    assert (one, two) == (1, 2) and values.keys() == values2.keys()
    assert max(abs(a - b) for a, b in zip(losses, losses2, strict=True)) < 1e-6
    assert (
        max(abs(a - b) for key in values for a, b in zip(values[key], values2[key])) < 1e-4
    )  # AdamW turns a rounding of a tiny gradient into a step


# No second copy of the model


def taken(model, make):
    "What `make` returns, and the bytes of the tensors that are there since and do not lie in the model's own memory."
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    gc.freeze()  # what is here already is not looked at
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
    return made, sum(
        {
            storage.data_ptr(): storage.nbytes()
            for storage in storages
            if storage.data_ptr() not in own
        }.values()
    )


SMALL = {
    name: {option: 2 for option in ("rank", "weight_rank") if option in METHODS[name].options}
    for name in METHODS
    if name != "full"
}


@pytest.mark.parametrize(
    "name, options", [*SMALL.items(), ("joint", dict(weights="full", weight_layers=[1]))]
)
def test_no_second_copy_of_the_model(tmp_path, name, options):
    "Neither in memory nor in the folder. PEFT's and LoReFT's buffers are 16 bytes here; a base of 100 kB would stand out."
    pristine = dict(tiny_model("llama").named_parameters())
    assert sum(4 * p.numel() for p in pristine.values()) > 90_000
    for step in ("apply", "load"):
        model = tiny_model("llama")
        own = {id(p): p.data_ptr() for p in model.parameters()}
        method, more = taken(
            model,
            lambda: (
                apply_method(model, name, **options)
                if step == "apply"
                else load_method(model, tmp_path)
            ),
        )
        there = {id(p): p.data_ptr() for p in method.model.parameters()}
        assert own.items() <= there.items()
        trained = {id(p): 4 * p.numel() for p in method.model.parameters() if p.requires_grad}
        new = sum(size for one, size in trained.items() if one not in own)
        start = sum(
            size for one, size in trained.items() if one in own
        )  # of weights that are trained themselves, joint training keeps the start
        assert new <= more - start <= new + 64 and bool(start) == (options.get("weights") == "full")
        if step == "apply":
            assert one_step(method)
            method.save(tmp_path)
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    tensors = [tensor for file in files for tensor in file.values()]
    size = 4 * method_size(tiny_model("llama"), name, **method.options)
    assert sum(4 * tensor.numel() for tensor in tensors) == size
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert (
        size <= written <= size + 192 * len(tensors) + 64 * len(files)
    )  # safetensors' header: a name, a shape and two offsets for each


# LoReFT and DiReFT against the code of their authors

PYREFT = """
import sys
import torch, pyreft
from safetensors.torch import save_file
torch.manual_seed(0)
found = {}
for word, dtype in (("float32", torch.float32), ("float64", torch.float64)):
    torch.set_default_dtype(dtype)                                # in which it makes the orthonormal rows
    for name, options in (("Loreft", {}), ("Direft", {}), ("Nodireft", {"add_bias": False})):
        edit = getattr(pyreft, name + "Intervention")(embed_dim=48, low_rank_dimension=5, dtype=dtype, **options).to(dtype).eval()
        with torch.no_grad():
            for key, parameter in edit.named_parameters():        # torch's orthogonal parametrisation keeps signs on the diagonal: they stay
                parameter.copy_(parameter + torch.randn_like(parameter).tril(-1) if key.endswith("original") else torch.randn_like(parameter))
            h = torch.randn(2, 7, 48, dtype=dtype)
            rows = edit.proj_layer.weight if name == "Nodireft" else edit.rotate_layer.weight.T
            for part, tensor in (("h", h), ("rows", rows), ("weight", edit.learned_source.weight), ("bias", edit.learned_source.bias), ("out", edit(h))):
                found[f"{name} {word} {part}"] = tensor.clone().contiguous()
save_file(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def pyreft(tmp_path_factory):
    "What pyreft computes, with weights and activations that it drew itself."
    path = tmp_path_factory.mktemp("pyreft") / "found.safetensors"
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # that is for our own Python
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
    """LoReFT with the same R, W and b. DiReFT is pyreft's `Nodireft` (any W₂, as in the paper) and, where W₂ is orthonormal, its `Direft`.

    Tolerance: sums of 48 products of numbers of size 1, and of 5, then rounded to the dtype: some tens of its precision relative to the largest output."""
    h, rows, weight, bias, out = (
        pyreft[f"{name} {dtype} {part}"] for part in ("h", "rows", "weight", "bias", "out")
    )
    precision = torch.finfo(h.dtype).eps
    adapter = make_adapter(kind, (48,), rank=5).to(h.dtype)
    with torch.no_grad():
        for parameter, value in zip(
            (
                adapter.weight,
                adapter.bias,
                adapter.rotation if kind == "loreft" else adapter.project,
            ),
            (weight, bias, rows),
        ):
            parameter.copy_(value)
        shifted = h + adapter(h)
    if name != "Nodireft":
        assert (rows @ rows.T - torch.eye(5)).abs().max() < 10 * precision
    assert (out - h).abs().max() > 1
    assert (shifted - out).abs().max() < 50 * precision * out.abs().max()


# LoFiT, trained


def test_lofit_trains_vectors_on_the_heads_that_learned_the_largest_scales(tmp_path):
    "Four of eight heads reach the stream at all: no other can be chosen, and of the four the two whose scales are longest at the end of the first stage."
    space, live = {}, {(0, 1), (0, 2), (1, 0), (1, 3)}
    exec(TOY, space)
    base = space["tiny"]()
    with torch.no_grad():
        for layer, block in enumerate(base.model.layers):
            for head in range(4):
                if (layer, head) not in live:
                    block.self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] = 0
    before, stages = {name: p.clone() for name, p in base.state_dict().items()}, []
    method = apply_method(base, "lofit", n_heads=2)
    choose = method.choose

    def watched():
        stages.append(
            {
                name: p.detach().clone()
                for name, p in method.model.named_parameters()
                if p.requires_grad
            }
        )
        choose()
        stages.append(
            {
                name: p.detach().clone()
                for name, p in method.model.named_parameters()
                if p.requires_grad
            }
        )

    method.choose = watched
    fit(
        method,
        space["tokenizer"],
        space["toy"],
        TrainConfig(lr=3e-2, epochs=3, batch_size=8),
        output=tmp_path / "run",
    )

    scales, new = stages  # at the end of the first stage, and at the start of the second
    rows = {
        (int(name.split("layers.")[1].split(".")[0]), head): row.tolist()
        for name, scale in scales.items()
        for head, row in enumerate(scale)
    }
    lengths = {head: sum(x * x for x in row) ** 0.5 for head, row in rows.items()}
    assert len(scales) == 2 and len(lengths) == 8
    assert {head for head, length in lengths.items() if length > 0} == live
    ranked = sorted(live, key=lengths.get)
    assert lengths[ranked[2]] > 1.1 * lengths[ranked[1]]  # no tie
    assert all(
        set(sorted(live, key=lambda head: other(rows[head]))[2:]) != set(ranked[2:])
        for other in (sum, max)
    )  # so it is the length that counts
    assert set(method.heads) == set(ranked[2:])

    trained = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    assert trained.keys() == new.keys() and sum(p.numel() for p in trained.values()) == 2 * 8
    assert all(not vector.any() for vector in new.values()) and all(
        (vector.norm(dim=-1) > 0).all() for vector in trained.values()
    )
    assert all(
        torch.equal(tensor, method.model.state_dict()[name]) for name, tensor in before.items()
    )  # not a bit of the base
    seen, moved = {}, set()
    for layer, block in enumerate(
        method.model.model.layers
    ):  # before and after the steering's own hook
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.__setitem__(layer, args[0].clone()), prepend=True
        )

        def compare(module, args, layer=layer):
            moved.update(
                (layer, int(n) // 8) for n in (args[0] != seen[layer]).any(0).any(0).nonzero()
            )

        block.self_attn.o_proj.register_forward_pre_hook(compare)
    method.model(torch.arange(3, 9)[None])
    assert moved == set(method.heads)
    saved = load_file(tmp_path / "run" / "method" / "steering.safetensors")
    assert (
        sum(tensor.numel() for tensor in saved.values()) == 2 * 8
        and len(list((tmp_path / "run" / "method").glob("*.safetensors"))) == 1
    )


def test_lofits_penalty_shortens_the_scales():
    space = {}
    exec(TOY, space)
    length = {}
    for l1 in (0.0, 0.01):
        method = apply_method(space["tiny"](), "lofit", n_heads=2, l1=l1)
        choose = method.choose

        def watched():
            length[l1] = sum(
                float(scale.detach().abs().sum())
                for scale in steerings(method.model)["scales"].parameters()
            )
            choose()

        method.choose = watched
        fit(method, space["tokenizer"], space["toy"], TrainConfig(lr=3e-2, epochs=3, batch_size=8))
    assert 0 < length[0.01] < 0.9 * length[0.0], length
