"""TRL's own trainers on steered models: SFT, DPO with the model as its own reference, GRPO.

Exact equality is asserted where both sides are one computation: the same modules and numbers."""

import copy
import gc
import json
import sys
import tempfile

import pytest
import torch
from children import run, run_processes
from datasets import Dataset

from steer_nb import load_steering, reference_model, steer, use_reference
from steer_nb.core.errors import SteeringError
from steer_nb.testing.toy_task import toy_model, toy_task, toy_tokenizer

TASK = toy_task(64, 8, 1)
PAIRS = [
    {"prompt": one.prompt, "chosen": one.completion, "rejected": f" {(one.answer + 3) % 10}"}
    for one in TASK.train
]
IDS = torch.tensor([toy_tokenizer()("max of 3 9 2 = 9").input_ids])
TEMPLATE = (
    "{% for one in messages %}{% if one.role == 'assistant' %}"
    " {% generation %}{{ one.content }} <eos>{% endgeneration %}"
    "{% else %} {{ one.content }}{% endif %}{% endfor %}"
)


def base(kind="llama"):
    "A random model whose head can prefer one token clearly."
    return toy_model(kind, initializer_range=0.2)


def steered(model="llama", trained=False, **options):
    "A steered model; `trained`: with a steering that is no longer zero."
    model = base(model)
    steering = steer(model, **options)
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in steering.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, steering


def settings(folder, **options):
    "What all trainers have in common."
    common = {"bf16": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    common |= {"report_to": "none", "disable_tqdm": True, "learning_rate": 2e-2}
    return {"output_dir": str(folder), "per_device_train_batch_size": 8, **common, **options}


def values(steering):
    "A copy of its parameters."
    return [parameter.detach().clone() for parameter in steering.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def embeddings():
    "How many embeddings there are in memory: each copy of the base has one."
    gc.collect()
    return sum(type(one) is torch.nn.Embedding for one in gc.get_objects())


# SFT


def rows(form):
    if form == "messages":
        turns = (("user", "prompt"), ("assistant", "completion"))
        return [
            {"messages": [{"role": r, "content": getattr(one, n).strip()} for r, n in turns]}
            for one in TASK.train
        ]
    if form == "packed":
        return [{"text": one.prompt + one.completion} for one in TASK.train]
    return [{"prompt": one.prompt, "completion": one.completion} for one in TASK.train]


FORMS = {
    "prompt and completion": {},
    "messages": {"assistant_only_loss": True},
    "packed": {"packing": True, "max_length": 32},
}


@pytest.mark.parametrize("form", FORMS)
def test_sft_trains_the_steering_and_nothing_else(form, tmp_path):
    from trl import SFTConfig, SFTTrainer

    (model, steering), tokenizer = steered(), toy_tokenizer()
    tokenizer.chat_template = TEMPLATE if form == "messages" else None
    before = values(steering)
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings(tmp_path, max_steps=12, **FORMS[form])),
        train_dataset=Dataset.from_list(rows(form)),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["labels"][batch["labels"] != -100]
    if form != "packed":  # only the answer and the end: digits are 3 to 12, the end is 1
        assert set(trained.tolist()) <= {1, *range(3, 13)}
    else:
        assert batch["labels"].shape[0] < 8 and len(trained) > 8 * 5  # whole texts, several a row
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(not torch.equal(a, b) for a, b in zip(before, steering.parameters(), strict=True))
    trainer.save_model(tmp_path / "saved")
    fresh = base()
    for name, parameter in fresh.named_parameters():
        trained = model.get_parameter(name)
        assert torch.equal(parameter, trained) and not trained.requires_grad, name
    loaded = load_steering(fresh, tmp_path / "saved")
    assert same(loaded.parameters(), steering.parameters())


# The reference


@pytest.mark.parametrize("at", ["off", "start"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reference_is_the_disabled_or_the_initial_model(kind, at):
    model, steering = steered(kind, trained=True)
    steering.strength = 0.7
    expected = logits(base(kind) if at == "off" else copy.deepcopy(model))
    reference = reference_model(model, at)
    now = logits(model.eval())
    model.train()
    assert not list(reference.parameters()) and len(list(reference.modules())) == 1
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.mul_(-2)
    steering.strength = -1
    later = steer(model, name="later", kind="vector")  # newer than the reference: off in it
    with torch.no_grad():
        next(later.parameters()).fill_(1)
    mine = values(steering)
    assert torch.equal(reference(IDS).logits, expected)
    assert not reference(IDS).logits.requires_grad
    assert all(module.training for module in model.modules())
    assert same(mine, steering.parameters()) and steering.strength == -1 and steering.enabled
    assert not torch.equal(logits(model.eval()), now)


def test_the_policy_is_put_back_after_an_error():
    model, steering = steered(trained=True)
    reference, before = reference_model(model, "off"), logits(model)
    adapters = list(steering.adapters.values())
    model.train()
    with pytest.raises(RuntimeError, match="Float"):
        reference(IDS.float())
    assert model.training and steering.enabled
    assert all(a is b for a, b in zip(adapters, steering.adapters.values(), strict=True))
    assert torch.equal(logits(model.eval()), before)


def test_a_reference_inside_a_training_step_does_not_change_the_gradient():
    model, steering = steered(trained=True)
    reference = reference_model(model, "start")
    found = []
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss
        if found:
            reference(IDS)  # between forward and backward
        loss.backward()
        found.append([parameter.grad.clone() for parameter in steering.parameters()])
        model.zero_grad()
    assert same(*found)


def test_what_trl_hashes_distinguishes_references():
    from trl.trainer.utils import hash_module

    (model, steering), hashes = steered(trained=True), set()
    hashes |= {hash_module(reference_model(model, at)) for at in ("off", "start")}
    steering.strength = 0.5
    hashes.add(hash_module(reference_model(model, "start")))
    other, _ = steered(trained=True)
    other.lm_head.weight.data.mul_(2)
    hashes.add(hash_module(reference_model(other, "off")))
    assert len(hashes) == 4
    again, _ = steered(trained=True)
    assert hash_module(reference_model(again, "off")) in hashes


def test_errors_of_a_reference():
    with pytest.raises(SteeringError, match="not steered"):
        reference_model(base())
    model, steering = steered()
    with pytest.raises(SteeringError, match="no reference 'before': there are off, start"):
        reference_model(model, "before")
    reference = reference_model(model)
    steering.remove()
    with pytest.raises(SteeringError, match="'default' is no longer at layer 0"):
        reference(IDS)


# DPO


def dpo(model, reference, folder, **options):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**settings(folder, **options)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=toy_tokenizer(),
    )


@pytest.mark.parametrize(
    ("kind", "at", "options"),
    [
        ("llama", "off", {}),
        ("llama", "start", {}),
        ("gpt2", "start", {"kind": "vector"}),  # with dropout, which TRL switches off
        ("llama", "start", {"positions": "completion"}),
    ],
)
def test_dpo_starts_at_a_margin_of_zero_and_trains(kind, at, options, tmp_path):
    model, steering = steered(kind, trained=at == "start", **options)
    expected = logits(model.eval())
    before, count = values(steering), embeddings()
    reference = reference_model(model, at)
    trainer = dpo(model, reference, tmp_path, max_steps=6)
    assert trainer.ref_model is reference and embeddings() == count
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == 0 and max(map(abs, margins)) > 0
    assert sum(margins[-2:]) > 0
    assert not same(before, steering.parameters()) and steering.enabled
    assert torch.equal(reference(IDS).logits, expected)


def test_without_a_reference_trl_loads_a_second_copy(tmp_path):
    "Else the count of embeddings above would prove nothing."
    base().save_pretrained(tmp_path / "base")
    model, _ = steered()
    model.config._name_or_path = str(tmp_path / "base")
    count = embeddings()
    trainer = dpo(model, None, tmp_path, max_steps=1)
    assert embeddings() > count and trainer.ref_model is not None


def test_precomputed_log_probabilities_are_those_of_the_reference(tmp_path):
    found = {}
    for at in ("off", "start"):
        model, _ = steered(trained=True)
        trainer = dpo(model, reference_model(model, at), tmp_path, precompute_ref_log_probs=True)
        found[at] = trainer.train_dataset[0]["ref_chosen_logps"]
        tokens = PAIRS[0]["prompt"] + PAIRS[0]["chosen"] + " <eos>"
        ids = torch.tensor([toy_tokenizer()(tokens).input_ids])
        with torch.no_grad():
            alone = (base() if at == "off" else model)(ids).logits.log_softmax(-1)[0, :-1]
        expected = alone.gather(-1, ids[0, 1:, None])[-2:].sum()  # the answer and the end
        # TRL computes in padded batches: float32, in another order.
        assert found[at] == pytest.approx(float(expected), abs=1e-4)
    assert abs(found["off"] - found["start"]) > 1e-3


def train_in_two_processes(at):
    "In each process: a DPO training, and what it observed as JSON."
    model, steering = steered(trained=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo(model, reference_model(model, at), folder, max_steps=3)
        trainer.train()
    kind = type(trainer.model_wrapped).__name__
    total = float(sum(parameter.double().sum() for parameter in steering.parameters()))
    margins = logged(trainer, "rewards/margins")
    print(json.dumps([kind, trainer.accelerator.num_processes, total, margins]))


def test_dpo_in_two_processes():
    ended = run_processes(train_in_two_processes, 2, "start")
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr[-3000:]
    first, second = (json.loads(done.stdout.splitlines()[-1]) for done in ended)
    assert first[:3] == second[:3] and first[:2] == ["DistributedDataParallel", 2]
    margins = first[3] or second[3]
    assert margins[0] == 0 and margins[-1] != 0


# GRPO


def is_digit(completions, **_):
    return [float(text.strip().isdigit()) for text in completions]


def grpo(model, folder, **options):
    from trl import GRPOConfig, GRPOTrainer

    options = {"num_generations": 8, "max_completion_length": 1, **options}
    return GRPOTrainer(
        model,
        reward_funcs=is_digit,
        args=GRPOConfig(**settings(folder, per_device_train_batch_size=64, **options)),
        train_dataset=Dataset.from_list([{"prompt": one.prompt} for one in TASK.train]),
        processing_class=toy_tokenizer(),
    )


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_grpo_raises_the_reward(beta, tmp_path):
    model, steering = steered(trained=True)
    expected, before = logits(model), values(steering)
    trainer, count = grpo(model, tmp_path, max_steps=12), embeddings()
    if beta:
        reference = use_reference(trainer, beta, at="start")
        assert trainer.args.beta == beta and embeddings() == count
    trainer.train()
    reward = logged(trainer, "reward")
    assert sum(reward[-3:]) > sum(reward[:3]) and not same(before, steering.parameters())
    divergence = logged(trainer, "kl")
    assert bool(divergence) == bool(beta)
    if beta:
        assert divergence[0] == 0 < divergence[-1]
        assert torch.equal(reference(IDS).logits, expected)
        with torch.no_grad():  # TRL's estimate of it, on other samples, is of the same sign
            assert (model(IDS).logits - expected).abs().max() > 0.1


def test_rloo_has_a_reference_too(tmp_path):
    from trl import RLOOConfig, RLOOTrainer

    model, _ = steered()
    options = {"beta": 0.0, "num_generations": 8, "max_completion_length": 1, "max_steps": 2}
    trainer = RLOOTrainer(
        model,
        reward_funcs=is_digit,
        args=RLOOConfig(**settings(tmp_path, **options)),
        train_dataset=Dataset.from_list([{"prompt": one.prompt} for one in TASK.train]),
        processing_class=toy_tokenizer(),
    )
    use_reference(trainer, 0.05)
    trainer.train()
    divergence = logged(trainer, "kl")
    assert divergence[0] == 0 < divergence[-1]


def test_errors_of_use_reference(tmp_path):
    trainer = grpo(steered()[0], tmp_path)
    with pytest.raises(SteeringError, match="beta is 0; it must be a finite number above 0"):
        use_reference(trainer, 0)
    trainer.beta = 0.1  # as if made with it: then it has a copy of the base
    with pytest.raises(SteeringError, match=r"made with beta=0\.1"):
        use_reference(trainer, 0.1)


def print_whether_trl_is_loaded():
    from steer_nb import reference_model

    print(reference_model.__name__, "trl" in sys.modules)


def test_steer_nb_does_not_import_trl():
    assert run(print_whether_trl_is_loaded).stdout == "reference_model False\n"
