"""Steerings and PEFT's adapters on one model: in either order, by name, merged and swapped.

Merging rounds once more in float32: 1e-5 is allowed, as for PEFT alone."""

import warnings

import children
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_steering import randomise
from transformers import AutoModelForCausalLM

from steer_nb import SteerError, load_steering, steer, steerings, tiny_model, to_lora

INPUT = torch.arange(24).view(2, 12) + 3


def config():
    "PEFT writes into it: a new one for each model."
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def lora(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, config(), **options).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT).logits


@pytest.mark.parametrize("undo", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("first", ["steering", "peft"])
@pytest.mark.parametrize(
    "name, site", [("llama", "heads"), ("gpt2", "heads"), ("bloom", "mlp"), ("llama", "block")]
)
def test_merging_keeps_the_steering(name, site, first, undo):
    "At an output projection that PEFT wraps (heads; Bloom's mlp), and where it wraps nothing."
    model = tiny_model(name)
    options = dict(kind="nonlinear", rank=2, site=site)
    if first == "peft":
        adapted = lora(model)
        randomise(steer(adapted, **options))
    else:
        randomise(steer(model, **options))
        adapted = lora(model)
    before = logits(adapted)
    with steerings(adapted)["default"].disabled():
        unsteered = logits(adapted)
    with adapted.disable_adapter():
        base = logits(adapted)
    assert (before - unsteered).abs().max() > 1e-3 < (before - base).abs().max()
    plain = getattr(adapted, undo)()
    expected = before if undo == "merge_and_unload" else base
    assert (logits(plain) - expected).abs().max() < 1e-5
    (steering,) = steerings(plain).values()
    with steering.disabled():
        assert (logits(plain) - expected).abs().max() > 1e-3
    steering.remove()
    assert not steerings(plain) and not any("steering" in name for name, _ in plain.named_modules())
    if undo == "merge_and_unload":
        assert (logits(plain) - unsteered).abs().max() < 1e-5


def test_both_orders_are_the_same_model():
    "The shift at an output projection comes before its LoRA, whichever was added first."
    one, other = tiny_model("llama"), lora(tiny_model("llama"))
    randomise(steer(one, site="heads", rank=2, positions="last"))
    randomise(steer(other, site="heads", rank=2, positions="last"))
    assert torch.equal(logits(lora(one)), logits(other))


def test_a_merged_model_saves_and_generates_with_its_steering(tmp_path):
    adapted = lora(tiny_model("llama"))
    randomise(steer(adapted, site="heads", rank=2, positions="completion"))
    options = dict(max_new_tokens=4, do_sample=False)
    expected = adapted.generate(input_ids=INPUT, **options)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(INPUT, **options), expected)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    load_steering(loaded, tmp_path)
    assert torch.equal(loaded.generate(INPUT, **options), expected)


def test_named_adapters_are_swapped_beside_named_steerings():
    "Each combination has the logits of a model that has these two alone."
    both = lora(tiny_model("llama"), adapter_name="x")
    torch.manual_seed(1)
    both.add_adapter("y", config())
    for seed, name in enumerate(("a", "b")):
        randomise(steer(both, name=name, kind="vector"), seed + 1)
    seen = []
    for adapter in ("x", "y"):
        both.set_adapter(adapter)
        for name, steering in steerings(both).items():
            for other in steerings(both).values():
                other.enabled = other is steering or other.name == name
            torch.manual_seed(0 if adapter == "x" else 1)
            alone = get_peft_model(tiny_model("llama"), config()).eval()
            randomise(steer(alone, kind="vector"), 1 if name == "a" else 2)
            assert torch.allclose(logits(both), logits(alone), atol=1e-6)
            seen.append(logits(both))
    assert all((one - other).abs().max() > 1e-2 for n, one in enumerate(seen) for other in seen[:n])
    both.delete_adapter("y")
    steerings(both)["b"].remove()
    assert list(steerings(both)) == ["a"]


def test_add_adapter_of_transformers(tmp_path):
    "The steered model itself gets a LoRA; both are saved in one folder, and work when loaded."
    model = tiny_model("llama")
    base = logits(model)
    steering = randomise(steer(model, site="heads", rank=2))
    torch.manual_seed(0)
    model.add_adapter(config(), adapter_name="style")
    both = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("steering" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    other = tiny_model("llama")
    load_steering(other, tmp_path)
    other.load_adapter(str(tmp_path))
    assert torch.allclose(logits(other), both, atol=1e-6)
    model.disable_adapters()
    steering.enabled = False
    assert torch.allclose(logits(model), base, atol=1e-6)
    steering.enabled = True
    assert (logits(model) - both).abs().max() > 1e-2


def test_steering_what_is_inside_a_peft_model_warns():
    "The wrapper does not know of it; a merged model and one with add_adapter are no wrappers."
    adapted = lora(tiny_model("llama"))
    with pytest.warns(UserWarning, match="steer the PeftModel"):
        steer(adapted.get_base_model(), kind="vector")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        steer(lora(tiny_model("llama")), kind="vector")
        steer(lora(tiny_model("llama")).merge_and_unload(), kind="vector")


def test_adapters_that_were_thrown_away_are_an_error():
    "Another block in the place of the steered one: not a steering that is listed and does nothing."
    model = tiny_model("llama")
    steering = steer(model, layers=[1])
    model.model.layers[1] = tiny_model("llama").model.layers[1]
    with pytest.raises(SteerError, match="no longer in the model"):
        steering.strength = 2
    steering.remove()
    assert not steerings(model)


def test_constants_that_peft_will_not_merge(tmp_path):
    "It is said at export, and true: PEFT refuses on a base without biases, and merges on one with."
    for name, merges in (("llama", False), ("gpt2", True)):
        model = tiny_model(name)
        randomise(steer(model, site="mlp", rank=2, bias=True))
        steered = logits(model)
        if merges:
            to_lora(steerings(model)["default"], tmp_path / name)
        else:
            with pytest.warns(UserWarning, match="will not merge"):
                to_lora(steerings(model)["default"], tmp_path / name)
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(tiny_model(name), tmp_path / name).eval()
        assert (logits(adapted) - steered).abs().max() < 1e-5
        if merges:
            assert (logits(adapted.merge_and_unload()) - steered).abs().max() < 1e-5
        else:
            with pytest.raises((ValueError, RuntimeError, NotImplementedError, TypeError)):
                adapted.merge_and_unload()


def test_removing_by_the_first_handle_leaves_the_wrapper_whole():
    "The steering came first, then PEFT: what PEFT froze stays frozen, and nothing is left behind."
    model = tiny_model("llama")
    steering = steer(model, kind="vector", positions="last")
    adapted = get_peft_model(model, config()).eval()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    steering.remove()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained
    assert not {"_steer_nb", "save_pretrained", "generate", "load_adapter"} & set(vars(adapted))
    adapted(input_ids=INPUT)
    again = randomise(steer(adapted, kind="vector", positions="last"))
    merged = adapted.merge_and_unload()
    assert list(steerings(merged)) == [again.name]


def merge_what_was_pickled(path):
    "In a process that steers nothing itself."
    model = torch.load(path, weights_only=False)
    adapted = lora(model)
    before = logits(adapted)
    print((logits(adapted.merge_and_unload()) - before).abs().max().item())


def test_an_unpickled_model_follows_peft(tmp_path):
    model = tiny_model("llama").eval()
    randomise(steer(model, kind="vector", site="heads"))
    torch.save(model, tmp_path / "model.pt")
    done = children.run(merge_what_was_pickled, str(tmp_path / "model.pt"))
    assert done.returncode == 0, done.stderr
    assert (
        float(done.stdout.splitlines()[-1]) < 1e-4
    )  # logits in float32: rounding differs by processor


def test_modules_to_save_and_steerings():
    "PEFT copies such a module: it is steered after, and keeps its steering when it is put back."
    options = dict(r=2, target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    model = tiny_model("llama")
    steer(model, kind="vector", site="mlp")
    with pytest.raises(SteerError, match="modules_to_save"):
        get_peft_model(model, LoraConfig(**options))
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(**options)).eval()
    randomise(steer(adapted, kind="vector", site="mlp"))
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert (logits(merged) - before).abs().max() < 1e-5
    with steerings(merged)["default"].disabled():
        assert (logits(merged) - before).abs().max() > 1e-2


def test_virtual_tokens_are_an_error():
    options = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(tiny_model("llama"), PromptTuningConfig(**options))
    steering = steer(adapted, kind="vector", positions="last")
    with pytest.raises(SteerError, match="virtual tokens"):
        adapted(input_ids=INPUT)
    steering.remove()
    steer(adapted, kind="vector")
    adapted(input_ids=INPUT)


def test_a_peft_model_that_passes_its_arguments_on():
    "Without a task type, its forward is (*args, **kwargs)."
    adapted = get_peft_model(tiny_model("llama"), config()).eval()
    assert type(adapted).__name__ == "PeftModel"
    steering = randomise(steer(adapted, kind="vector", positions="last"))
    with torch.no_grad():
        assert torch.equal(adapted(INPUT).logits, adapted(input_ids=INPUT).logits)
        both = logits(adapted)
        with steering.rows(["default", None]):
            first = adapted(INPUT).logits
    assert torch.equal(first[0], both[0]) and not torch.equal(first[1], both[1])
