"""Bases in half precision and quantized: int8 and int4 of torchao, nf4 of bitsandbytes, and layers
that keep their codes in buffers, as GPTQ and AWQ do."""

import signal
import sys

import pytest
import torch
from torch import nn

from steer_nb import (
    SITES,
    Run,
    SteerError,
    SteeringConfig,
    TrainConfig,
    apply_method,
    equivalent_shifts,
    evaluate,
    fit,
    load_method,
    load_model,
    load_steering,
    steer,
    tiny_model,
    to_bias,
    to_lora,
    update_between,
)
from steer_nb.core.quantized import count_parameters, quantized_layers, weight_bytes
from steer_nb.testing.toy_task import toy_task, toy_tokenizer

LIBRARIES = ("int8", "int4", "nf4")
BASES = (*LIBRARIES, "buffers")
KINDS = ("vector", "linear", "nonlinear", "loreft", "direft")
SIZES = dict(  # the widths are multiples of the groups of int4 and of bitsandbytes' packing
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=16
)
IDS = torch.arange(1, 12)[None]


class Buffers(nn.Module):
    "A linear layer in the layout of GPTQ: eight 4-bit codes in one int32, and no parameter."

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().mT
        low, high = weight.amin(0), weight.amax(0)
        codes = ((weight - low) / (high - low) * 15).round().long().reshape(-1, 8, len(low))
        places = 16 ** torch.arange(8)[:, None]
        self.register_buffer("qweight", ((codes * places).sum(1) - 2**31).to(torch.int32))
        self.register_buffer("scales", (high - low) / 15)
        self.register_buffer("lowest", low)

    def forward(self, x):
        codes = (self.qweight.long() + 2**31)[:, None] // 16 ** torch.arange(8)[:, None] % 16
        weight = codes.reshape(-1, self.out_features) * self.scales + self.lowest
        return x @ weight.to(x.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A float32 model and its tokenizer."
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", **SIZES).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return path


def load(folder, base, dtype=torch.float32):
    "The model quantized in this way, with its other weights in `dtype`."
    if base != "buffers":
        return load_model(folder, dtype, device="cpu", quantization=base)[0]
    model = load_model(folder, dtype, device="cpu")[0]
    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            model.model.set_submodule(path, Buffers(module))
    return model


def randomise(steering):
    "The steering with every parameter changed."
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return steering


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("base", BASES)
def test_every_site_and_kind_is_saved_and_loaded(base, folder, tmp_path):
    model, fresh = load(folder, base), load(folder, base)
    assert len(quantized_layers(model)) == 14
    before = logits(model)
    for site in SITES:
        for kind in KINDS:
            options = {} if kind == "vector" else {"rank": 2}
            steering = randomise(steer(model, SteeringConfig(kind=kind, site=site, **options)))
            steered = logits(model)
            assert not torch.equal(steered, before), (site, kind)
            loaded = load_steering(fresh, steering.save(tmp_path / f"{site}-{kind}"))
            assert torch.equal(logits(fresh), steered), (site, kind)
            loaded.remove()
            steering.remove()
            assert torch.equal(logits(model), before), (site, kind)


def dequantized(model, folder):
    "A float model with the matrices that the quantized layers apply to the unit vectors."
    plain = load_model(folder, device="cpu")[0]
    for path, layer in quantized_layers(model).items():
        with torch.no_grad():
            weight = layer(torch.eye(layer.in_features)).mT
        plain.get_submodule(path).weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_dequantized_model(base, folder):
    model = load(folder, base)
    plain = dequantized(model, folder)
    logits(model)  # in evaluation mode, which packs the weights of bitsandbytes on some CPUs
    gradients = []
    for one in (model, plain):
        steering = randomise(steer(one, kind="linear", rank=2, bias=True))
        one(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in steering.parameters()]))
    # Both are float32; torchao's int4 kernel rounds its scales and products to bfloat16 (8 bits).
    tolerance = 0.02 if base == "int4" else 1e-4
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < tolerance and gradients[1].norm() > 0


def test_a_layer_that_is_packed_already_passes_gradients_again(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).eval()
    packed = logits(model)
    steer(model)
    torch.testing.assert_close(logits(model), packed, atol=0.02, rtol=0)  # packed is bfloat16
    rows = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=rows, labels=IDS).loss.backward()
    plain = dequantized(model, folder)
    expected = plain.get_input_embeddings()(IDS).detach().requires_grad_()
    plain(inputs_embeds=expected, labels=IDS).loss.backward()
    assert (rows.grad - expected.grad).norm() < 1e-3 * expected.grad.norm()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["post_block", "lora"])
def test_a_method_is_trained_evaluated_and_loaded(base, name, folder, tmp_path):
    task, tokenizer = toy_task(), toy_tokenizer()
    model = load(folder, base, torch.bfloat16)
    if (base, name) == ("buffers", "lora"):
        with pytest.raises(SteerError, match="lora does not run on this model"):
            apply_method(model, name)
        return
    method = apply_method(model, name)
    run = fit(method, tokenizer, task, TrainConfig(epochs=1, batch_size=8, lr=2e-2))
    losses = [point["loss"] for point in run.curve]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert run.parameters == count_parameters(method.model)
    expected = evaluate(method, tokenizer, task)
    method.save(tmp_path / "saved")
    loaded = load_method(load(folder, base, torch.bfloat16), tmp_path / "saved")
    assert evaluate(loaded, tokenizer, task).predictions == expected.predictions
    text = loaded.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(text, method.generate(input_ids=IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("base", BASES)
def test_what_needs_float_weights_says_so(base, folder):
    model, plain = load(folder, base), load_model(folder, device="cpu")[0]
    steering = steer(model, site="mlp", rank=2)
    with pytest.raises(SteerError, match="down_proj is quantized .* needs its weight"):
        to_lora(steering)
    steering.remove()
    steering = steer(model, site="mlp", kind="vector")
    with pytest.raises(SteerError, match="down_proj is quantized .* needs its weight"):
        to_bias(steering)
    steering.remove()
    for name in ("full", "bitfit"):
        with pytest.raises(SteerError, match="needs float weights, and 14 linear layers"):
            apply_method(model, name)
    with pytest.raises(SteerError, match="needs float weights"):
        update_between(plain, model)
    update = {"model.layers.0.mlp.down_proj.weight": torch.ones(64, 128)}
    with pytest.raises(SteerError, match="'model.layers.0.mlp.down_proj.weight' is quantized"):
        equivalent_shifts(model, update, {"input_ids": IDS})


@pytest.mark.parametrize("base", BASES)
def test_a_steering_moves_between_a_float_base_and_a_quantized_one(base, folder, tmp_path):
    plain, model = load_model(folder, device="cpu")[0], load(folder, base)
    steer(plain, name="a").save(tmp_path / "a")
    load_steering(model, tmp_path / "a").save(tmp_path / "b")
    load_steering(plain, tmp_path / "b", name="b")
    with pytest.raises(SteerError, match="the weights of its embedding are different"):
        load_steering(tiny_model("llama", seed=1, **SIZES), tmp_path / "b")


@pytest.mark.parametrize("base", BASES)
def test_sizes_are_those_of_the_model(base, folder):
    model, plain = load(folder, base), load_model(folder, device="cpu")[0]
    assert count_parameters(model) == count_parameters(plain) == plain.num_parameters()
    assert weight_bytes(plain) == sum(4 * p.numel() for p in plain.parameters()) + sum(
        b.numel() * b.element_size() for b in plain.buffers()
    )
    assert weight_bytes(model) < weight_bytes(plain) / 1.5
    assert steer(model).share == steer(plain).share


@pytest.mark.parametrize("name", ["zamba2", "moshi", "gpt2", "mamba"])
def test_no_layer_of_a_float_model_is_quantized(name):
    model = tiny_model(name)
    assert not quantized_layers(model) and count_parameters(model) == model.num_parameters()


@pytest.mark.parametrize(
    "name, quantization, message",
    [
        ("gpt2", "int8", "changed no layer of GPT2LMHeadModel"),
        ("mamba", "int8", "MambaForCausalLM does not run with quantization='int8'"),
        ("mamba", "int4", "cannot load a model from"),
    ],
)
def test_models_that_cannot_be_quantized(name, quantization, message, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SteerError, match=message):
        load_model(tmp_path, device="cpu", quantization=quantization)


def test_a_training_resumes_on_the_same_weights_only(folder, tmp_path):
    def stop(point):
        if point["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    def train(base, **options):
        model = load(folder, base, None)
        steer(model)
        config = TrainConfig(max_steps=4)
        return fit(model, toy_tokenizer(), toy_task(), config, output=tmp_path / "run", **options)

    assert train("int8", on_step=stop).stopped == "SIGTERM"
    with pytest.raises(SteerError, match="weights"):
        train("nf4")
    run = train("int8")
    assert run.resumed == [2] and run.weights == "bfloat16, Int8Tensor"
    assert Run.load(tmp_path / "run" / "run.json").weights == run.weights


def test_dtypes_by_name(folder, tmp_path):
    tiny_model("llama").to(torch.float16).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu")[0].dtype == torch.float32
    assert load_model(tmp_path, "auto", device="cpu")[0].dtype == torch.float16
    assert load_model(tmp_path, "bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load(folder, "nf4", None).dtype == torch.bfloat16
    assert load(folder, "int8", "auto").dtype == torch.float32
    for wrong in ("int8", "nothing", torch.int8, "nn", "float8_e4m3fn"):
        with pytest.raises(SteerError, match="no dtype"):
            load_model(tmp_path, wrong)


def test_quantization_errors(folder, monkeypatch):
    with pytest.raises(SteerError, match="no quantization 'int3': there are int8, int4, nf4"):
        load_model(folder, quantization="int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SteerError, match="pip install bitsandbytes"):
        load_model(folder, quantization="nf4")
