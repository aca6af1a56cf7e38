"""The penalty on retained texts: against a loop by hand, resumed, and with every kind of method."""

from dataclasses import replace

import pytest
import torch
from toy import tiny, tokenizer, toy

from steer_nb import Example, TrainConfig, apply_method, fit
from steer_nb.data.encoding import collate
from steer_nb.data.examples import TaskError
from steer_nb.training import retain
from steer_nb.training.config import TrainError
from steer_nb.training.plan import Plan
from steer_nb.training.retain import Retained, encode_texts
from steer_nb.training.run import Run

TEXTS = ["1 2 3 4 5", "max of 3 7 = 7", "9 8 7 6 5 4 3 2 1 0 max of 1", "5 5", "0 1 2 3 4 5 6 7"]
CONFIG = TrainConfig(lr=1e-2, batch_size=4, epochs=1)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def by_hand(name: str, config: TrainConfig, weight: float):
    "The training as a plain loop, with a second copy of the model as the reference."
    method, base, rows = apply_method(tiny().double(), name), tiny().double(), []
    trained = [p for p in method.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    examples = [tokenizer(e.prompt).input_ids for e in toy.train]
    answers = [tokenizer(e.completion + " <eos>").input_ids for e in toy.train]
    lengths = [len(a) + len(b) for a, b in zip(examples, answers, strict=True)]
    plan, own = Plan(lengths, config), Plan([len(one) for one in ids], replace(config, epochs=9))
    rates = [group.rates(config, len(plan)) for group in method.groups()][0]
    for step, rate in zip(plan, rates, strict=True):
        loss, count, kl, tokens = 0.0, 0, 0.0, 0
        for index in step.examples:
            whole = torch.tensor([examples[index] + answers[index]])
            logits = method(whole).logits[0, -len(answers[index]) - 1 : -1].log_softmax(-1)
            loss = loss - logits.gather(1, torch.tensor(answers[index])[:, None]).sum()
            count += len(answers[index])
        for index in own[step.number - 1].examples:
            whole = torch.tensor([ids[index]])
            p = base(whole).logits[0, :-1].log_softmax(-1).detach()
            q = method(whole).logits[0, :-1].log_softmax(-1)
            kl, tokens = kl + (p.exp() * (p - q)).sum(), tokens + len(p)
        (loss / count + weight * kl / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        rows.append((float(loss.detach()) / count, float(kl.detach()) / tokens))
    return weights(method.model), rows


@pytest.mark.parametrize("name", ["post_block_linear", "lora", "full", "bitfit"])
def test_equal_to_a_loop_by_hand(name):
    "In float64, where only rounding differs; AdamW can multiply it by its step of 1e-2."
    method = apply_method(tiny().double(), name)
    record = fit(method, tokenizer, no_validation(), CONFIG, retain=TEXTS, retain_weight=2.0)
    expected, rows = by_hand(name, CONFIG, 2.0)
    for point, (loss, kl) in zip(record.curve, rows, strict=True):
        assert abs(point["loss"] - loss) < 1e-7 and abs(point["kl"] - kl) < 1e-7
    assert torch.allclose(weights(method.model), expected, rtol=0, atol=1e-7)
    assert record.curve[0]["kl"] == 0 < record.curve[-1]["kl"]
    assert record.examples["retain"] == 5 and record.retain_weight == 2.0


def no_validation():
    return replace(toy, validation=())


def test_passes_and_a_weight_of_zero_change_no_result():
    def trained(config, **options):
        method = apply_method(tiny().double(), "full")
        return fit(method, tokenizer, toy, config, **options), weights(method.model)

    record, plain = trained(CONFIG)
    measured, same = trained(CONFIG, retain=TEXTS, retain_weight=0)
    assert torch.equal(plain, same) and "kl" not in record.curve[0]
    assert record.retain_weight is None and measured.retain_weight == 0
    assert [point["loss"] for point in record.curve] == [point["loss"] for point in measured.curve]
    whole, expected = trained(CONFIG, retain=TEXTS)
    for parts in ({"batch_size": 2, "accumulation_steps": 2}, {"batch_tokens": 30}):
        again, found = trained(replace(CONFIG, **parts), retain=TEXTS)
        assert torch.allclose(found, expected, rtol=0, atol=1e-7)
        for one, other in zip(again.curve, whole.curve, strict=True):
            assert abs(one["kl"] - other["kl"]) < 1e-9
    assert whole.curve[-1]["kl"] < measured.curve[-1]["kl"]


def interrupted(method, step: int):
    "The method, with an exception after this step."
    after_step = method.after_step

    def stop(number, *rest):
        after_step(number, *rest)
        if number == step:
            raise KeyboardInterrupt

    method.after_step = stop
    return method


@pytest.mark.parametrize("name", ["post_block_linear", "full", "lofit"])
def test_a_resumed_training_has_the_same_bits(tmp_path, name):
    "With dropout. The reference of `full` has the weights of the first start."

    def call(method, folder=tmp_path, **options):
        options = {"retain": TEXTS, "retain_weight": 2.0, **options}
        config = replace(CONFIG, epochs=2)
        return fit(method, tokenizer, toy, config, folder, checkpoint_every=0, **options)

    whole = apply_method(tiny("gpt2"), name)
    expected = call(whole, None)
    with pytest.raises(KeyboardInterrupt):
        call(interrupted(apply_method(tiny("gpt2"), name), 6))
    for other in ({"retain_weight": 1.0}, {"retain": TEXTS[:4]}, {"retain": None}):
        with pytest.raises(TrainError, match="unfinished"):
            call(apply_method(tiny("gpt2"), name), **other)
    method = apply_method(tiny("gpt2"), name)
    record = call(method)
    assert record.resumed == [5] and record.curve == expected.curve
    assert torch.equal(weights(method.model), weights(whole.model))
    saved = Run.load(tmp_path / "run.json")
    assert (saved.curve, saved.retain_weight) == (record.curve, 2.0)


def test_the_gradient_in_half_precision():
    "Autocast keeps casts made without a gradient, unless it is told not to."
    method = apply_method(tiny(), "full")
    split = encode_texts(method.model, tokenizer, TEXTS)
    retained = Retained(split, 1.0, CONFIG, 1)
    retained.begin(method.model)
    batch = collate(tokenizer, list(split))
    with torch.no_grad():
        for n, parameter in enumerate(method.model.parameters()):
            torch.manual_seed(n)
            parameter.add_(0.2 * torch.randn_like(parameter))
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = retained.divergence(method.model, batch)
        found = torch.autograd.grad(loss, list(method.model.parameters()))
        gradients.append(torch.cat([one.flatten() for one in found]))
    exact, rounded = gradients
    # bfloat16 has 8 bits: differences of a few per cent
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_pieces_change_no_result(monkeypatch):
    "A large vocabulary is done in pieces."

    def curve():
        method = apply_method(tiny().double(), "post_block_linear")
        return [point["kl"] for point in fit(method, tokenizer, toy, CONFIG, retain=TEXTS).curve]

    whole = curve()
    monkeypatch.setattr("steer_nb.training.loss.LOGITS", 50)
    assert all(abs(a - b) < 1e-9 for a, b in zip(curve(), whole, strict=True))


def test_of_an_example_the_completion_is_retained():
    model = tiny()
    example = Example("max of 3 7 =", " 7", (" 7", " 3"), 0, id="one")
    split = encode_texts(model, tokenizer, ["5 5", example])
    assert split.counts.tolist() == [1, 1] and split.lengths.tolist() == [2, 6]


def test_errors():
    method = apply_method(tiny(), "post_block_linear")
    with pytest.raises(TaskError, match="a list of texts"):
        fit(method, tokenizer, toy, CONFIG, retain="1 2 3")
    with pytest.raises(TaskError, match="at least one"):
        fit(method, tokenizer, toy, CONFIG, retain=[])
    with pytest.raises(TaskError, match="two tokens"):
        fit(method, tokenizer, toy, CONFIG, retain=["1"])
    with pytest.raises(TrainError, match="retain_weight"):
        fit(method, tokenizer, toy, CONFIG, retain=TEXTS, retain_weight=-1)


def test_after_an_error_the_reference_is_undone(monkeypatch):
    method = apply_method(tiny(), "joint")
    flags = [p.requires_grad for p in method.model.parameters()]

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(retain, "labelled_logits", broken)
    with pytest.raises(MemoryError):
        fit(method, tokenizer, toy, CONFIG, retain=TEXTS)
    assert method.steering.enabled
    assert flags == [p.requires_grad for p in method.model.parameters()]
