"""Conversions are exact or raise an error.

On many architectures, after saving and loading, beside other steerings, and in llama.cpp itself."""

import copy
import warnings
from functools import cache

import engines
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from steer_nb.convert.bias import to_bias
from steer_nb.convert.gguf import to_control_vector, to_gguf_lora
from steer_nb.convert.lora import Lora, from_lora, to_lora
from steer_nb.convert.nearest_lora import nearest_lora
from steer_nb.convert.projections import ConvertError
from steer_nb.core.config import SteeringConfig
from steer_nb.core.hooks import edit
from steer_nb.core.sites import Site
from steer_nb.core.steering import steer, steerings
from steer_nb.data.models import load_model
from steer_nb.data.wheels import gguf_file
from steer_nb.testing.tiny_models import INPUT_IDS, tiny_model

EXACT = 1e-6  # relative, in a float64 model: RMSNorm computes in float32


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(model_type, dtype=torch.float64, **changes):
    "A tiny model whose biases are not zero."
    model, generator = tiny_model(model_type, **changes).to(dtype), torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def randomise(steering, scale=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in steering.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
    return steering


def put(model, name="default", seed=1, **config):
    return randomise(steer(model, SteeringConfig(**config), name=name), seed=seed)


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# to_bias

# OPT has no site 'mlp', and the bias of Helium's attention output cannot be switched on.
ABSENT = {("opt", "mlp"), ("helium", "attn")}


FEW = [("llama", "block"), ("llama", "attn"), ("granite", "mlp"), ("gpt2", "block")]
FEW += [("falcon", "block"), ("opt", "block"), ("helium", "mlp")]
TYPES = ("llama", "granite", "smollm3", "helium", "ernie4_5", "gpt2", "gpt_neo", "gpt_neox")
TYPES += ("phi", "starcoder2", "falcon", "opt")
CASES = [
    pytest.param(model_type, at, layers, marks=[] if few else pytest.mark.slow)
    for model_type in TYPES
    for at in ("block", "mlp", "attn")
    for layers in ("all", [1])
    if (model_type, at) not in ABSENT
    for few in [(model_type, at) in FEW and (layers == "all" or model_type == "llama")]
]


@pytest.mark.parametrize("model_type, at, layers", CASES)
def test_a_vector_becomes_a_bias_also_after_a_reload(model_type, at, layers, tmp_path):
    model = made(model_type)
    base, names = logits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    steering = put(model, kind="vector", site=at, layers=layers)
    steering.strength = -1.5
    wanted = logits(model)
    assert apart(wanted, base) > 1e-3
    assert to_bias(steering) is model and not steerings(model)
    assert apart(logits(model), wanted) < EXACT
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in names} == names
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "steering_config.json").exists()
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert apart(logits(reloaded), wanted) < EXACT


def test_a_second_vector_goes_into_the_same_bias():
    model = made("llama")
    first, second = (
        put(model, "first", kind="vector"),
        put(model, "second", kind="vector", site="mlp", seed=5),
    )
    wanted = logits(model)
    to_bias(second)  # only a vector reads before it
    assert apart(logits(model), wanted) < EXACT
    to_bias(first)
    assert apart(logits(model), wanted) < EXACT


def test_later_steerings_are_kept_and_earlier_ones_raise_an_error():
    model = made("llama")
    vector = put(model, "vector", kind="vector")
    put(model, "behind", rank=2, seed=3)
    put(model, "heads", site="heads", rank=2)
    wanted = logits(model)
    to_bias(vector)
    assert apart(logits(model), wanted) < EXACT and list(steerings(model)) == ["behind", "heads"]
    late = put(model, "late", kind="vector")
    with pytest.raises(ConvertError, match="'behind' reads"):
        to_bias(late)  # at the same site, put on before
    late.remove()


def test_a_steering_between_the_projection_and_the_block_raises_an_error():
    model = made("llama")
    vector = put(model, "vector", kind="vector")
    put(model, "later", site="mlp", rank=2)
    with pytest.raises(ConvertError, match="'later' reads"):
        to_bias(vector)  # put on later, but it acts earlier
    vector.remove()
    vector = put(model, "vector", kind="vector", site="attn")
    wanted = logits(model)
    to_bias(vector)
    assert apart(logits(model), wanted) < EXACT and list(steerings(model)) == ["later"]


def test_a_bias_in_half_precision_and_in_training_mode():
    model = made("gpt2", torch.bfloat16, resid_pdrop=0.5).train()
    steering = put(model, kind="vector")
    modes = [module.training for module in model.modules()]
    to_bias(steering)
    assert all(modes) and all(
        module.training for module in model.modules() if module is not steering
    )
    model, plain = made("llama", torch.bfloat16), made("llama", torch.bfloat16)
    steering = put(model, kind="vector")
    wanted = logits(model)
    to_bias(steering)
    assert model.model.layers[0].mlp.down_proj.bias.dtype == torch.bfloat16
    assert (
        apart(logits(model).float(), wanted.float())
        < 0.02
        < apart(logits(plain).float(), wanted.float())
    )  # bfloat16 keeps 8 bits


class Packed(nn.Module):
    "A projection with quantized weights, as bitsandbytes and others make them."

    def __init__(self, linear):
        super().__init__()
        self.size = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter(
            (linear.weight.data / self.size).round().to(torch.int8), requires_grad=False
        )
        self.bias = None

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.size).T


def quantized():
    model = made("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    return model


class Eight(nn.Linear):
    "A linear layer with an eight-bit weight, which computes in the precision of its input."

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def eight_bits():
    model = made("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Eight
        layer.mlp.down_proj.weight = nn.Parameter(
            layer.mlp.down_proj.weight.data.to(torch.float8_e4m3fn), requires_grad=False
        )
    return model


def tied():
    model = made("llama")
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    return model


def adapted():
    return get_peft_model(made("llama"), LoraConfig(r=2, target_modules=["down_proj"])).eval()


BIAS_REFUSED = {
    "no switch": (lambda: made("qwen3"), dict(kind="vector"), "no switch.*would drop it"),
    "post-norm": (
        lambda: made("gemma3_text"),
        dict(kind="vector"),
        "post_feedforward_layernorm .* comes between",
    ),
    "post-norm at mlp": (
        lambda: made("olmo2"),
        dict(kind="vector", site="mlp"),
        "post_feedforward_layernorm .* comes between",
    ),
    "post-norm at attn": (
        lambda: made("gemma3_text"),
        dict(kind="vector", site="attn"),
        "post_attention_layernorm .* comes between",
    ),
    "norm after the sum": (
        lambda: made("bert"),
        dict(kind="vector"),
        "does not come out of BertLayer",
    ),
    "experts": (lambda: tiny_model("mixtral"), dict(kind="vector"), "no single projection"),
    "shared expert": (
        lambda: tiny_model("qwen2_moe"),
        dict(kind="vector", site="mlp"),
        "no single projection",
    ),
    "quantized": (quantized, dict(kind="vector"), "is quantized"),
    "eight bits": (eight_bits, dict(kind="vector"), "float8_e4m3fn weights"),
    "tied": (tied, dict(kind="vector", layers=[0]), "is tied"),
    "kind": (lambda: made("llama"), dict(kind="linear"), "a linear steering cannot become a bias"),
    "loreft": (
        lambda: made("llama"),
        dict(kind="loreft"),
        "a loreft steering cannot become a bias",
    ),
    "heads": (
        lambda: made("llama"),
        dict(kind="vector", site="heads"),
        "'heads' cannot become a bias",
    ),
    "positions": (lambda: made("llama"), dict(kind="vector", positions="prompt"), "'prompt' only"),
    "streams": (lambda: tiny_model("gemma3n_text"), dict(kind="vector"), "does not come out"),
}


@pytest.mark.parametrize("case", BIAS_REFUSED)
def test_an_impossible_bias_leaves_the_model_unchanged(case):
    make, config, message = BIAS_REFUSED[case]
    model = make()
    steering = put(model, **config)
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    configured = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ConvertError, match=message):
        to_bias(steering)
    assert (
        torch.equal(logits(model), before)
        and [name for name, _ in model.named_parameters()] == names
    )
    assert (
        list(steerings(model)) == ["default"]
        and steering.enabled
        and model.config.to_dict() == configured
    )


def test_what_is_not_a_usable_steering_raises_an_error():
    with pytest.raises(ConvertError, match="pass a steering"):
        to_bias(made("llama"))
    steering = put(made("llama"), kind="vector")
    steering.enabled = False
    for convert in (to_bias, lambda s: to_control_vector(s, "none.gguf")):
        with pytest.raises(ConvertError, match="disabled"):
            convert(steering)
    steering.enabled = True
    next(steering.parameters()).data[3] = float("nan")
    with pytest.raises(ConvertError, match="layer 0 'block' has values that are not finite"):
        to_bias(steering)
    with pytest.raises(ConvertError, match="merged into a model of transformers"):
        to_bias(put(adapted(), kind="vector"))


# to_lora and from_lora


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("llama", dict(kind="linear")),
        ("llama", dict(kind="loreft", layers=[1])),
        ("qwen3", dict(kind="full")),
        ("mistral", dict(kind="linear", site="attn")),
        ("granite", dict(kind="linear", bias=True)),
        ("gpt2", dict(kind="linear")),
        ("gpt2", dict(kind="loreft", site="attn")),
        ("gpt_neo", dict(kind="linear", bias=True)),
        ("phi", dict(kind="full")),
        ("gpt_neox", dict(kind="loreft")),
        ("bloom", dict(kind="linear")),
        ("falcon", dict(kind="linear")),
        ("bert", dict(kind="linear")),
    ],
)
def test_a_linear_map_becomes_a_lora(model_type, config, tmp_path):
    model = made(model_type)
    base = logits(model)
    steering = put(model, **{"site": "mlp", "rank": 3, **config})
    steering.strength = 0.5
    wanted = logits(model)
    lora = to_lora(steering, tmp_path)
    assert torch.equal(logits(model), wanted)  # the model is unchanged
    steering.remove()
    assert torch.equal(logits(model), base) and apart(wanted, base) > 1e-3
    assert len(lora.A) == len(config.get("layers", (0, 1))) and lora.rank == (
        32 if config["kind"] == "full" else 3
    )
    assert lora.config().fan_in_fan_out == (model_type == "gpt2")
    tuned = PeftModel.from_pretrained(model, tmp_path)
    assert apart(logits(tuned), wanted) < EXACT
    has_bias = all(
        tuned.get_submodule(f"base_model.model.{path}").base_layer.bias is not None
        for path in lora.A
    )
    if lora.bias and not has_bias:
        with pytest.raises(RuntimeError, match="has no bias"):
            tuned.merge_and_unload()
    else:
        assert apart(logits(tuned.merge_and_unload()), wanted) < EXACT


def test_a_lora_is_not_written_over_files(tmp_path):
    steering = put(made("llama"), site="mlp", rank=2)
    to_lora(steering, tmp_path / "lora")
    with pytest.raises(ConvertError, match="exists already"):
        to_lora(steering, tmp_path / "lora")
    to_lora(steering).save(tmp_path / "lora", overwrite=True)
    assert "rank 2 on model.layers.0.mlp.down_proj" in repr(to_lora(steering))


@pytest.mark.parametrize(
    "make, config, message",
    [
        (lambda: made("gemma3_text"), dict(site="mlp"), "comes between"),
        (lambda: tiny_model("qwen3_moe"), dict(site="mlp"), "no single projection"),
        (lambda: made("llama"), dict(site="block"), "'block' cannot become a LoRA"),
        (lambda: made("llama"), dict(site="mlp", kind="nonlinear"), "nonlinear steering cannot"),
        (lambda: made("llama"), dict(site="mlp", positions="last"), "every token"),
        (quantized, dict(site="mlp"), "is quantized"),
        (tied, dict(site="mlp", layers=[1]), "is tied"),
        (adapted, dict(site="mlp"), "merge adapters first"),
    ],
)
def test_a_lora_raises_an_error(make, config, message):
    steering = put(make(), **{"rank": 2, **config})
    with pytest.raises(ConvertError, match=message):
        to_lora(steering)


def peft_lora(model, folder, **config):
    "The logits with a random LoRA of PEFT, which is saved, and the model without it."
    torch.manual_seed(0)
    tuned = get_peft_model(
        model, LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config})
    ).eval()
    for name, p in tuned.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.normal_(p)
    tuned.save_pretrained(folder)
    return logits(tuned), tuned.unload()


@pytest.mark.parametrize(
    "model_type, narrow, config",
    [
        ("llama", dict(intermediate_size=24), dict(target_modules=["down_proj"])),
        ("llama", dict(intermediate_size=24), dict(target_modules=["down_proj"], use_rslora=True)),
        (
            "llama",
            dict(intermediate_size=32),
            dict(target_modules=["down_proj"], lora_bias=True, init_lora_weights=True),
        ),
        (
            "gpt2",
            dict(n_inner=24),
            dict(target_modules=["mlp.c_proj"], fan_in_fan_out=True, lora_dropout=0.5),
        ),
        (
            "granite",
            dict(intermediate_size=24),
            dict(target_modules=["model.layers.1.mlp.down_proj"]),
        ),
        (
            "gpt_neox",
            dict(intermediate_size=16),
            dict(target_modules=["dense_4h_to_h"], rank_pattern={"layers.1.mlp.dense_4h_to_h": 2}),
        ),
    ],
)
def test_a_lora_on_a_narrow_projection_becomes_a_steering(model_type, narrow, config, tmp_path):
    wanted, model = peft_lora(made(model_type, **narrow), tmp_path, **config)
    base = logits(model)
    steering = from_lora(model, tmp_path, name="again")
    assert apart(logits(model), wanted) < EXACT < 1e-3 < apart(base, wanted)
    assert (
        steering.name == "again"
        and steering.config.kind == "linear"
        and steering.config.site == "mlp"
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "granite"])
def test_a_steering_from_its_own_lora(model_type, tmp_path):
    model = made(model_type)
    steering = put(model, site="mlp", rank=3, bias=True)
    wanted = logits(model)
    to_lora(steering, tmp_path)
    steering.remove()
    from_lora(model, tmp_path)
    assert apart(logits(model), wanted) < EXACT


def test_a_lora_outside_the_row_space_raises_an_error_with_the_share(tmp_path):
    _, model = peft_lora(made("llama"), tmp_path, target_modules=["down_proj"])
    base = logits(model)
    with pytest.raises(ConvertError, match=r"0\.\d+ of it") as raised:
        from_lora(model, tmp_path)
    assert (
        0.5 < float(str(raised.value).split(": ")[1].split()[0]) < 0.9
    )  # sqrt(1 - 32/64) = 0.71 for a random one
    assert not steerings(model) and torch.equal(logits(model), base)
    from_lora(model, tmp_path, tolerance=1)
    lora = to_lora(steerings(model)["default"])
    W = model.model.layers[0].mlp.down_proj.weight.data.double()
    delta = lora.B["model.layers.0.mlp.down_proj"] @ lora.A["model.layers.0.mlp.down_proj"]
    assert torch.allclose(
        delta, delta @ torch.linalg.pinv(W) @ W, atol=1e-6
    )  # what is left lies in the row space


def test_a_lora_that_does_not_fit_raises_an_error(tmp_path):
    _, model = peft_lora(
        made("llama", intermediate_size=24),
        tmp_path / "attention",
        target_modules=["down_proj", "q_proj"],
    )
    with pytest.raises(ConvertError, match="q_proj', which is not a down projection"):
        from_lora(model, tmp_path / "attention")
    _, model = peft_lora(
        made("llama", intermediate_size=24),
        tmp_path / "dora",
        target_modules=["down_proj"],
        use_dora=True,
    )
    with pytest.raises(ConvertError, match="use_dora=True"):
        from_lora(model, tmp_path / "dora")
    _, model = peft_lora(
        made("llama", intermediate_size=24), tmp_path / "lora", target_modules=["down_proj"]
    )
    with pytest.raises(ConvertError, match="this model has no"):
        from_lora(made("gpt2"), tmp_path / "lora")
    with pytest.raises(ConvertError, match="32 × 24, not 32 × 16"):
        from_lora(made("llama", intermediate_size=16), tmp_path / "lora")
    with pytest.raises(ConvertError, match="no LoRA of PEFT"):
        from_lora(model, tmp_path / "nothing")
    tensors, config = (
        tmp_path / "lora" / "adapter_model.safetensors",
        tmp_path / "lora" / "adapter_config.json",
    )
    content = tensors.read_bytes()
    tensors.write_bytes(b"damaged")
    with pytest.raises(ConvertError, match="no LoRA of PEFT"):
        from_lora(model, tmp_path / "lora")
    (tmp_path / "elsewhere").write_bytes(content)  # whole, but not of this folder
    tensors.unlink()
    tensors.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConvertError, match="outside of its folder"):
        from_lora(model, tmp_path / "lora")
    config.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConvertError, match="nested"):
        from_lora(model, tmp_path / "lora")


# to_control_vector and to_gguf_lora


def test_a_control_vector_file(tmp_path):
    steering = put(made("llama", torch.float32, num_hidden_layers=4), kind="vector", layers=[1, 3])
    steering.strength = 2
    path = to_control_vector(steering, tmp_path / "vectors.gguf")
    file = GGUFReader(path)
    fields = {
        name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF")
    }
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert [tensor.name for tensor in file.tensors] == ["direction.1", "direction.3"]
    flat, width = engines.directions(path)
    rows = torch.tensor(flat).view(-1, width)
    assert rows.shape == (3, 32) and not rows[1].any()
    for layer in (1, 3):
        assert torch.equal(rows[layer - 1], 2 * steering.adapters[Site(layer, "block")].vector)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vectors.gguf"]


@pytest.mark.parametrize(
    "make, config, message",
    [
        (lambda: made("llama"), dict(), "cannot steer layer 0.*range\\(1, 2\\)"),
        (lambda: made("llama"), dict(layers=[1], kind="linear", rank=2), "linear steering cannot"),
        (lambda: made("llama"), dict(layers=[1], site="attn"), "'attn' cannot"),
        (lambda: made("llama"), dict(layers=[1], positions="last"), "every token"),
        (lambda: made("bert"), dict(layers=[1], site="mlp"), "does not come out of the block"),
        (lambda: tiny_model("gemma3n_text"), dict(layers=[1]), "does not come out of the block"),
    ],
)
def test_a_control_vector_raises_an_error(make, config, message, tmp_path):
    steering = put(make(), **{"kind": "vector", **config})
    with pytest.raises(ConvertError, match=message):
        to_control_vector(steering, tmp_path / "vectors.gguf")
    assert not list(tmp_path.iterdir())


def test_the_reader_of_control_vectors_follows_llama_cpp(tmp_path):
    def file(*tensors):
        writer = GGUFWriter(tmp_path / "some.gguf", "controlvector")
        for name, values in tensors:
            writer.add_tensor(name, torch.tensor(values).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "some.gguf"

    assert list(engines.directions(file(("direction.2", [1.0, 2.0])))[0]) == [0, 0, 1, 2]
    for wrong in (
        ("direction.0", [1.0]),
        ("direction", [1.0]),
        ("vector.1", [1.0]),
        ("direction.1", [[1.0], [2.0]]),
    ):
        with pytest.raises(ValueError):
            engines.directions(file(wrong))
    with pytest.raises(ValueError, match="another width"):
        engines.directions(file(("direction.1", [1.0]), ("direction.2", [1.0, 2.0])))


def test_a_gguf_lora_file(tmp_path):
    steering = put(made("gemma", torch.float32), site="mlp", rank=3, layers=[1])
    lora = to_lora(steering)
    file = GGUFReader(to_gguf_lora(steering, tmp_path / "lora.gguf"))
    fields = {
        name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF")
    }
    assert fields == {
        "general.architecture": "gemma",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    assert tensors.keys() == {"blk.1.ffn_down.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
    assert torch.equal(
        tensors["blk.1.ffn_down.weight.lora_a"], lora.A["model.layers.1.mlp.down_proj"]
    )
    assert torch.equal(
        tensors["blk.1.ffn_down.weight.lora_b"], lora.B["model.layers.1.mlp.down_proj"]
    )


@pytest.mark.parametrize(
    "make, config, arch, message",
    [
        (lambda: made("llama"), dict(bias=True), None, "constants"),
        (lambda: made("gpt2"), dict(), None, "constants"),
        (lambda: made("llama"), dict(site="block"), None, "'block' cannot"),
        (lambda: made("llama"), dict(), "lama", "did you mean 'llama'"),
        (lambda: made("llama"), dict(), "mamba", "has no name for"),
        (lambda: made("bert"), dict(), None, "constants"),
    ],
)
def test_a_gguf_lora_raises_an_error(make, config, arch, message, tmp_path):
    with pytest.raises(ConvertError, match=message):
        to_gguf_lora(
            put(make(), **{"site": "mlp", "rank": 2, **config}), tmp_path / "lora.gguf", arch=arch
        )
    with pytest.raises(ConvertError, match="pass a steering"):
        to_gguf_lora(Lora({}, {}, {}), tmp_path / "lora.gguf")


# Against llama.cpp

TEXTS = ("The capital of France is", "def add(a, b):\n    return")


def kl(p, q):
    return (p.exp() * (p - q)).sum().item()


@pytest.fixture(scope="module")
def smollm():
    model, tokenizer = load_model("smollm2-135m")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]

    def ours(tokens):
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)

    return model, prompts, ours


def needs(engine):
    "Skip the test if the engine is not installed."
    if not engines.has_engine(engine):
        pytest.skip(f"{engine} is not installed (STEER_NB_ENGINE_PYTHON can name another Python)")


@cache
def _theirs(engine, tokens, files):
    found = engines.next_logprobs(engine, gguf_file("smollm2-135m"), tokens, **dict(files))
    return torch.tensor(found, dtype=torch.float64)


def theirs(engine, tokens, **files):
    return _theirs(engine, tuple(tokens), tuple(files.items()))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_unsteered_engine_agrees(engine, smollm):
    needs(engine)
    _, prompts, ours = smollm
    for tokens in prompts:  # activations are quantized there; 0.001 to 0.006 measured
        assert kl(ours(tokens), theirs(engine, tokens)) < 0.02


@pytest.mark.parametrize("layer", [1, 10, 28])
def test_llama_cpp_steers_the_same_block(layer, smollm, tmp_path):
    needs("llama_cpp")
    model, prompts, ours = smollm
    vector = torch.randn(576, generator=torch.Generator().manual_seed(layer))
    vector *= {1: 70, 10: 145, 28: 730}[layer] / vector.norm()  # the length of activations there
    steering = steer(model, SteeringConfig(kind="vector", layers=[layer]))
    steering.adapters[Site(layer, "block")].vector.data.copy_(vector)
    path = to_control_vector(steering, tmp_path / "vector.gguf")
    wanted = [ours(tokens) for tokens in prompts]
    steering.remove()
    for tokens, p in zip(prompts, wanted, strict=True):
        engine = theirs("llama_cpp", tokens, control_vector=path)
        same, moved = kl(p, engine), kl(p, ours(tokens))
        assert same < 0.1 and same < moved / 10
        for neighbour in (layer - 1, layer + 1):
            with edit(model, {Site(neighbour, "block"): lambda h: h + vector}):
                assert same < kl(ours(tokens), engine) / 4


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_engines_run_the_lora(engine, smollm, tmp_path):
    needs(engine)
    model, prompts, ours = smollm
    steering = randomise(steer(model, SteeringConfig(site="mlp", rank=4)), scale=0.05)
    path = to_gguf_lora(steering, tmp_path / "lora.gguf")
    wanted = [ours(tokens) for tokens in prompts]
    steering.remove()
    for tokens, p in zip(prompts, wanted, strict=True):
        assert kl(p, theirs(engine, tokens, lora=path)) < kl(p, ours(tokens)) / 8
        assert kl(p, theirs(engine, tokens)) > kl(p, ours(tokens)) / 2


def test_the_error_for_a_missing_engine(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("STEER_NB_ENGINE_PYTHON", str(tmp_path / "python"))
    with pytest.raises(engines.EngineMissing, match="STEER_NB_ENGINE_PYTHON"):
        engines.next_logprobs("llama_cpp", "none.gguf", [1])
    with pytest.raises(ValueError, match="engines are llama_cpp, xllamacpp"):
        engines.next_logprobs("llama", "none.gguf", [1])


# nearest_lora


def batch_of(rows, seed=0, length=12):
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def without_skip_path(model_type="llama", **changes):
    "A one-layer model and a steering of its block that reads only what the MLP writes."
    model = made(model_type, num_hidden_layers=1, **changes)
    model.model.embed_tokens.weight.data[:, 16:] = 0
    model.model.layers[0].self_attn.o_proj.weight.data[16:] = 0
    steering = randomise(steer(model, SteeringConfig(rank=2)), scale=2)
    steering.adapters[Site(0, "block")].down.data[:, :16] = 0
    return model, steering


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_the_nearest_lora_of_a_steering_that_is_one(model_type, tmp_path):
    model, steering = without_skip_path(
        model_type, **({} if model_type == "llama" else dict(embedding_multiplier=1.0))
    )
    steering.strength = 0.7
    found = nearest_lora(
        steering, [batch_of(40), batch_of(7, seed=4)], batch_of(10, seed=1), ridge=1e-12
    )
    assert (
        found.shift_error[0] < 1e-5
        and found.output_error[0] < 1e-5
        and found.kl < 1e-9 < 1e-4 < found.kl_unsteered
        and found.tokens == 47 * 12
    )
    wanted = logits(model)
    steering.remove()
    found.lora.save(tmp_path)
    assert apart(logits(PeftModel.from_pretrained(model, tmp_path)), wanted) < 1e-5


def test_the_fit_is_weighted_least_squares_without_padding():
    model = made("llama")
    steering = put(model, rank=2, layers=[1])
    batch = batch_of(6)
    padded = {
        "input_ids": torch.cat([torch.full((6, 5), 99), batch["input_ids"]], 1),
        "attention_mask": torch.cat(
            [torch.zeros(6, 5, dtype=torch.long), batch["attention_mask"]], 1
        ),
    }
    padded["position_ids"] = batch["position_ids"] = torch.arange(12).expand(6, 12)
    padded["position_ids"] = torch.cat(
        [torch.zeros(6, 5, dtype=torch.long), batch["position_ids"]], 1
    )
    plain, other = (
        nearest_lora(steering, batch, ridge=0.1),
        nearest_lora(steering, padded, ridge=0.1),
    )
    A = plain.lora.A["model.layers.1.mlp.down_proj"]
    assert (
        apart(other.lora.A["model.layers.1.mlp.down_proj"], A) < 1e-5
        and plain.tokens == other.tokens == 72
        and abs(plain.kl - other.kl) < 1e-6
    )
    seen = {}
    handles = [
        model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda module, args: seen.update(m=args[0].flatten(0, 1))
        ),
        steering.adapters[Site(1, "block")].register_forward_pre_hook(
            lambda module, args: seen.update(h=args[0].flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    h, m = seen["h"], seen["m"]
    weights, D = 1 / h.norm(dim=1, keepdim=True), steering.adapters[Site(1, "block")].down.data
    size = 0.1 * ((m * weights) ** 2).sum() / 64  # of the ridge, as rows that are zero
    X, Y = (
        torch.cat([m * weights, size.sqrt() * torch.eye(64, dtype=m.dtype)]),
        torch.cat([(h @ D.T) * weights, torch.zeros(64, 2, dtype=m.dtype)]),
    )
    assert torch.allclose(A, torch.linalg.lstsq(X, Y).solution.T, atol=1e-8)
    without, with_constant = (
        nearest_lora(steering, batch_of(40), ridge=1e-9, intercept=intercept)
        for intercept in (False, True)
    )
    assert (
        with_constant.lora.bias
        and not without.lora.bias
        and with_constant.shift_error[1] < without.shift_error[1]
    )


def test_the_nearest_lora_raises_an_error():
    with pytest.raises(ConvertError, match="'mlp' cannot become"):
        nearest_lora(put(made("llama"), site="mlp", rank=2), batch_of(2))
    with pytest.raises(ConvertError, match="comes between"):
        nearest_lora(put(made("gemma3_text"), rank=2), batch_of(2))
    model = made("llama")
    steering = put(model, rank=2)
    for empty in ([], {"input_ids": torch.zeros(0, 4, dtype=torch.long)}, [{}]):
        with pytest.raises(ConvertError, match="must not be empty"):
            nearest_lora(steering, empty)
    with pytest.raises(ConvertError, match="only padding"):
        nearest_lora(
            steering, {"input_ids": INPUT_IDS, "attention_mask": torch.zeros_like(INPUT_IDS)}
        )
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConvertError, match="layer 1 'mlp' are not finite"):
        nearest_lora(steering, batch_of(2))
    steering.strength = 0.0
    with pytest.raises(ConvertError, match="strength is 0"):
        nearest_lora(steering, batch_of(2))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_changed_the_base_raises_an_error(start, tmp_path):
    get_peft_model(
        made("llama").float(),
        LoraConfig(r=2, init_lora_weights=start, target_modules=["down_proj"]),
    ).save_pretrained(tmp_path)
    with pytest.raises(ConvertError, match="changes the base weights too"):
        from_lora(made("llama"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_weakens_its_sum_raises_an_error_in_every_precision(dtype, tmp_path):
    model = made("llama", dtype)
    vector = put(model, kind="vector", site="mlp", layers=[1])
    assert to_control_vector(vector, tmp_path / "right.gguf").exists()
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.9
    with pytest.raises(ConvertError, match="does not come out"):
        to_control_vector(vector, tmp_path / "wrong.gguf")


def test_the_nearest_lora_beside_a_steering_of_some_positions():
    model = made("llama")
    put(model, "other", kind="vector", positions="last")
    steering = put(model, kind="linear", rank=2)
    ids = torch.randint(3, 99, (8, 24), generator=torch.Generator().manual_seed(0))
    found = nearest_lora(steering, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found.tokens == ids.numel() and found.kl_unsteered > 0
