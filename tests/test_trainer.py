"""Transformers' plain `Trainer` on a steered model: what it saves, restores and resumes.

A resumed training ends with the bits of one that was not interrupted: nothing is rounded."""

import json
import os

import pytest
import torch
from children import run_processes
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_hub import hub, run_with_hub  # noqa: F401
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from steer_nb import load_steering, steer, steerings, tiny_model

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Rows(torch.utils.data.Dataset):
    "Eight prompts of three tokens and completions of five."

    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = (torch.arange(8) * 7 + 3 * index) % 50 + 3
        labels = tokens.clone()
        labels[:3] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer(model, folder, **options):
    "Six steps with a checkpoint after each."
    defaults = dict(
        max_steps=6,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    arguments = TrainingArguments(folder, **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def with_lora(model, **options):
    "PEFT first, then the steering."
    adapted = get_peft_model(model, LORA)
    steer(adapted, freeze=False, **options)
    return adapted


def steered_then_lora(model, name="default"):
    "The other order. PEFT freezes what it does not own, and the user trains it nevertheless."
    steering = steer(model, rank=2)
    adapted = get_peft_model(model, LORA, adapter_name=name)
    for parameter in steering.parameters():
        parameter.requires_grad_(True)
    return adapted


def with_native_lora(model):
    "The adapter that `transformers` itself adds."
    steer(model, rank=2)
    model.add_adapter(LORA)
    for parameter in steerings(model)["default"].parameters():
        parameter.requires_grad_(True)
    return model


def with_two(model):
    steer(model, name="a", kind="vector", positions="last")
    steer(model, name="b", kind="loreft", rank=2, layers=[1]).strength = 0.5
    return model


def alone(**options):
    def make(model):
        steer(model, **options)
        return model

    return make


MODELS = {
    "linear": (alone(rank=2), {}),
    "jola": (alone(kind="jola", site="heads"), {}),  # draws random numbers in training
    "two": (with_two, {}),
    "base trained too": (alone(rank=2, freeze=False), {}),
    "checkpointing": (
        alone(rank=2, positions="suffix:2"),
        {"gradient_checkpointing": True},
    ),
    "bf16": (alone(rank=2), {"bf16": True}),
    "in PEFT": (with_lora, {}),
    "in PEFT, positions": (lambda model: with_lora(model, positions="prompt"), {}),
    "PEFT outside": (steered_then_lora, {}),
    "PEFT outside, named": (lambda model: steered_then_lora(model, "second"), {}),
    "native PEFT": (with_native_lora, {}),
}


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def made(name):
    torch.manual_seed(0)  # PEFT draws its start from the global generator
    return MODELS[name][0](tiny_model("llama"))


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_training_has_the_same_bits(tmp_path, name):
    options = MODELS[name][1]
    whole = made(name)
    trainer(whole, tmp_path / "whole", **options).train()

    resumed, first = made(name), {}
    again = trainer(resumed, tmp_path / "again", **options)

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            first.setdefault(state.global_step, trained(resumed))

    again.add_callback(See())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert min(first) == 3
    moved = [value for key, value in first[3].items() if key.endswith((".up", ".vector", ".bias"))]
    assert moved and any(value.abs().sum() > 0 for value in moved)
    expected = trained(whole)
    assert expected.keys() == trained(resumed).keys()
    for key, value in trained(resumed).items():
        assert torch.equal(value, expected[key]), key
    for key, steering in steerings(resumed).items():
        assert steering.strength == steerings(whole)[key].strength


@pytest.mark.parametrize("name", ["linear", "base trained too", "in PEFT", "PEFT outside"])
def test_the_best_model_is_that_of_the_best_checkpoint(tmp_path, name):
    model = made(name)
    options = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    options |= dict(metric_for_best_model="eval_loss", greater_is_better=True)  # an early one
    done = trainer(model, tmp_path, **options)
    done.train()
    best = done.state.best_model_checkpoint
    assert not best.endswith("checkpoint-6")  # or the last step would pass the test
    saved = load_file(f"{best}/steering.safetensors")
    for site, adapter in steerings(model)["default"].adapters.items():
        for part, parameter in adapter.named_parameters():
            assert torch.equal(saved[f"default.{site.layer}.{part}"], parameter)
    loss = next(
        point["eval_loss"]
        for point in done.state.log_history
        if point["step"] == int(best.rpartition("-")[2]) and "eval_loss" in point
    )
    assert done.evaluate()["eval_loss"] == loss


def test_a_checkpoint_has_no_frozen_weights(tmp_path):
    model = made("linear")
    done = trainer(model, tmp_path)
    done.train()
    base = 4 * sum(parameter.numel() for parameter in model.parameters())
    tensors = {path.name: path.stat().st_size for path in tmp_path.glob("checkpoint-6/*.safe*")}
    assert tensors.keys() == {"model.safetensors", "steering.safetensors"}
    assert sum(tensors.values()) < base / 10
    with pytest.raises(ValueError, match="config.json"):  # not a model that silently lacks weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    fresh = tiny_model("llama")
    load_steering(fresh, tmp_path / "checkpoint-6")
    ids = Rows()[0]["input_ids"][None]
    assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)


def test_a_trained_base_is_in_the_checkpoint(tmp_path):
    model = made("base trained too")
    trainer(model, tmp_path).train()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    load_steering(fresh, tmp_path / "checkpoint-6")
    ids = Rows()[0]["input_ids"][None]
    assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
    fresh.save_pretrained(tmp_path / "by hand")  # loads as a model: nothing of the steering in it
    names = load_file(tmp_path / "by hand" / "model.safetensors")
    assert not any("steering" in name for name in names)


def test_push_to_hub(hub, tmp_path):  # noqa: F811
    "What Trainer uploads is a steering that loads by its Hub id."
    printed = run_with_hub(
        hub,
        tmp_path,
        """
        import json, sys, torch
        sys.path.insert(0, TESTS)
        from test_trainer import made, trainer
        from steer_nb import load_steering, tiny_model
        model = made("linear")
        done = trainer(model, "run", hub_model_id="ana/steered", save_strategy="no")
        done.train()
        done.push_to_hub()
        fresh = tiny_model("llama")
        load_steering(fresh, "ana/steered")
        ids = torch.tensor([[5, 6, 7]])
        same = torch.equal(fresh(ids).logits, model.eval()(ids).logits)
        print(json.dumps({"same": same}))
        """.replace("TESTS", repr(os.path.dirname(__file__))),
    )
    assert printed == {"same": True}


def _train_in_two(folder):
    "In each of two processes."
    model = made("linear")
    done = trainer(model, folder, per_device_train_batch_size=2, ddp_backend="gloo", save_steps=3)
    done.train()
    print(json.dumps({n: p.tolist() for n, p in trained(model).items()}))


def test_two_processes(tmp_path):
    "Two processes with batches of 2 make the steps of one with batches of 4."
    done = run_processes(_train_in_two, 2, tmp_path / "run")
    assert not any(one.returncode for one in done), done
    printed = [json.loads(one.stdout.splitlines()[-1]) for one in done]
    assert printed[0] == printed[1]
    fresh = made("linear")
    load_steering(tiny_model("llama"), tmp_path / "run" / "checkpoint-6")
    trainer(fresh, tmp_path / "one").train()
    for name, value in trained(fresh).items():
        # the same sums in another order: float32 rounding, which Adam's first steps enlarge
        assert torch.allclose(value, torch.tensor(printed[0][name]), atol=1e-5), name
