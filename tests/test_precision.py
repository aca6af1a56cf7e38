"Half precision and the padding mask: what is computed, and that the model is as before."

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from toy import tiny, tokenizer, toy

from steer_nb import half_precision, load_model, site_scores, steer, tiny_model
from steer_nb.core import precision
from steer_nb.core.errors import SteeringError
from steer_nb.core.padding import without_padding_mask
from steer_nb.core.precision import join_float32
from steer_nb.evaluation.result import Result, evaluate
from steer_nb.methods.registry import apply_method
from steer_nb.training.config import CHECKPOINT_FOLDER, TrainConfig
from steer_nb.training.fit import fit
from steer_nb.training.method import encode_split
from steer_nb.training.mode import training_mode

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [7, 5, 6, 1, 1, 1]])
MASK = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def pays(monkeypatch):
    "`auto` finds that bfloat16 pays, in every model of this machine."
    monkeypatch.setattr(precision, "SMALLEST", 0)
    monkeypatch.setattr(precision, "GAIN", 0.0)


@torch.no_grad()
def logits_of(model, **inputs):
    return model(input_ids=IDS, use_cache=False, **inputs).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_bfloat16_is_autocast_and_is_undone_after_an_error(kind):
    "Autocast converts the same weights in each pass; it rounds ties to even, and the output too."
    model = tiny_model(kind)
    steer(model, rank=4)
    before, exact = copy.deepcopy(model.state_dict()), logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model)
    try:
        with half_precision(model, "bfloat16"):
            dtypes = {name: p.dtype for name, p in model.named_parameters()}
            found = logits_of(model)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    # logits of this size have steps of 1/128 of themselves in bfloat16
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02
    converted = [name for name, dtype in dtypes.items() if dtype == torch.bfloat16]
    assert converted and not any("norm" in n or "embed" in n or "steer" in n for n in converted)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert torch.equal(logits_of(model), exact)


def test_choices_are_not_tied_by_rounding():
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model)
    with half_precision(model, "bfloat16"):
        found = logits_of(model)
    assert found.dtype == torch.float32 and "forward" not in vars(model.lm_head)
    assert (rounded == rounded.to(torch.bfloat16)).all()
    assert (found == found.to(torch.bfloat16)).float().mean() < 0.05


def test_the_output_layer_of_a_training_is_exact_for_few_tokens():
    "For many, converting its weight is the smaller part of the work."
    model = tiny_model("llama").requires_grad_(False)
    with half_precision(model, "bfloat16", training=True), torch.autocast("cpu", torch.bfloat16):
        few, many = (model(torch.zeros(n, 8, dtype=torch.long)).logits for n in (8, 9))
    assert precision.FEW == 64 and (few.dtype, many.dtype) == (torch.float32, torch.bfloat16)


def test_what_auto_chooses(monkeypatch):
    model = tiny_model("llama")
    assert precision.choose_precision(model) == "float32"  # small
    monkeypatch.setattr(precision, "SMALLEST", 0)
    for gain, expected in ((float("inf"), "float32"), (0.0, "bfloat16")):
        monkeypatch.setattr(precision, "GAIN", gain)
        assert precision.choose_precision(model) == expected
        assert precision.choose_precision(model, "float32") == "float32"
    assert precision.choose_precision(model.double()) == "float32"
    assert precision.choose_precision(model.to(torch.bfloat16)) == "bfloat16"
    with pytest.raises(SteeringError, match="'half'.*bfloat16"):
        precision.choose_precision(model, "half")


def test_short_attention_takes_a_mask_of_half_precision():
    "PyTorch needs a mask of the dtype of the queries, or of bool."
    inputs = [torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill(
        ~torch.ones(5, 5).tril().bool(), -1e9
    )
    expected = F.scaled_dot_product_attention(*(one.float() for one in inputs), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16), precision.Float32Attention():
        for found in (
            F.scaled_dot_product_attention(*inputs, mask),
            F.scaled_dot_product_attention(*inputs, attn_mask=mask),
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [8, precision.SHORT + 1])
def test_short_attention_under_autocast_is_that_of_float32(length):
    shape = (2, 3, length, 16)
    inputs = [torch.randn(shape).bfloat16().float().requires_grad_() for _ in range(3)]

    def gradients(autocast, mode):
        kept = []
        with (
            autocast,
            mode,
            saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one),
        ):
            output = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return torch.autograd.grad(output.float().square().sum(), inputs), kept

    exact, _ = gradients(nullcontext(), nullcontext())
    found, kept = gradients(torch.autocast("cpu", torch.bfloat16), precision.Float32Attention())
    same = all(torch.equal(a, b.bfloat16().float()) for a, b in zip(found, exact, strict=True))
    assert same == (length <= precision.SHORT)
    # queries, keys and values in bfloat16; in long texts the output too, and a sum for each row
    assert all(one.dtype == torch.bfloat16 for one in kept if one.ndim == 4)
    assert (len(kept) == 3) == (length <= precision.SHORT)


@pytest.mark.parametrize(
    "name", ["post_block", "full", "bitfit", "lora", "loreft", "lofit", "jola", "joint"]
)
def test_methods_train_in_bfloat16(name):
    losses, weights = {}, {}
    for chosen in ("float32", "bfloat16"):
        model = tiny()
        frozen = {id(p): p for p in model.parameters()}
        method = apply_method(model, name)
        start = {key: p.detach().clone() for key, p in frozen.items() if not p.requires_grad}
        run = fit(method, tokenizer, toy, TrainConfig(lr=1e-2, epochs=2, precision=chosen))
        losses[chosen] = [point["loss"] for point in run.curve]
        weights[chosen] = all(torch.equal(frozen[key], p) for key, p in start.items())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["bfloat16"] != losses["float32"] and all(weights.values())
    # of losses of about 3: bfloat16 has 8 bits
    pairs = zip(losses["bfloat16"], losses["float32"], strict=True)
    assert all(abs(a - b) < 0.05 for a, b in pairs)


def test_scores_of_sites_in_bfloat16():
    "To the 8 bits of bfloat16."
    model, scores = tiny(), []
    batches = [{"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK.bool(), -100)}]
    for chosen in ("float32", "bfloat16"):
        with half_precision(model, chosen):
            scores.append(torch.tensor(site_scores(model, batches, rank=2).frame()["score"]))
    assert not torch.equal(*scores) and (scores[1] - scores[0]).norm() < 0.03 * scores[0].norm()


def test_a_weight_that_is_changed_meanwhile_counts():
    "Autocast's cache would keep its old values until the end."
    model = tiny_model("llama")
    steering = steer(model, rank=4)
    with half_precision(model, "bfloat16"), torch.enable_grad():
        before = model(IDS).logits
        with torch.no_grad():
            for parameter in steering.parameters():
                parameter.add_(0.1)
        found = model(IDS).logits
    with half_precision(model, "bfloat16"):
        expected = logits_of(model)
    assert torch.equal(found, expected) and not torch.equal(found, before)


def test_other_holders_of_a_parameter_see_no_change():
    "DDP and an optimizer hold parameters: another dtype would detach their hooks."
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    weight, values = layer.weight, layer.weight.detach().clone()
    with half_precision(model, "bfloat16"):
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.requires_grad
        assert weight.dtype == torch.float32 and torch.equal(weight, values)
    assert layer.weight is weight


def test_an_interrupt_at_the_end_leaves_one_weight_at_most(monkeypatch):
    model, joined = tiny_model("llama").requires_grad_(False), []

    def interrupted(halves):
        joined.append(halves)
        if len(joined) == 3:
            raise KeyboardInterrupt
        return join_float32(halves)

    monkeypatch.setattr(precision, "join_float32", interrupted)
    with pytest.raises(KeyboardInterrupt), half_precision(model, "bfloat16", training=True):
        pass
    assert len(joined) > 3
    assert sum(weight.dtype == torch.bfloat16 for weight in model.parameters()) == 1


def test_the_callback_of_a_training_can_call_the_model():
    model, found = tiny(), []
    steer(model, rank=2)

    def on_step(point):
        model.eval()
        found.append(
            [
                evaluate(model, tokenizer, toy).precision,
                evaluate(model, tokenizer, toy, precision="bfloat16").precision,
                logits_of(model).isfinite().all(),
                model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape[1] == 8,
            ]
        )

    fit(model, tokenizer, toy, TrainConfig(max_steps=2, precision="bfloat16"), on_step=on_step)
    assert found == [["bfloat16", "bfloat16", True, True]] * 2


def test_gradient_checkpointing_in_bfloat16():
    "Attention is then in bfloat16, so only the last digits of the loss differ."
    losses = []
    for checkpointed in (False, True):
        model = tiny()
        steer(model, rank=2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run = fit(model, tokenizer, toy, TrainConfig(max_steps=3, precision="bfloat16"))
        losses.append([point["loss"] for point in run.curve])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)  # of about 3


def test_a_resumed_training_keeps_what_auto_chose(tmp_path, monkeypatch, pays):
    "On the machine where it is resumed `auto` would choose float32."

    def train(folder=None, stop=None):
        model = tiny()
        steering = steer(model, rank=4)

        def interrupt(point):
            if point["step"] == stop:
                raise RuntimeError("stopped")

        config = TrainConfig(lr=1e-2, epochs=2, batch_size=8)
        options = {"output": folder, "checkpoint_every": 0, "on_step": interrupt}
        try:
            run = fit(model, tokenizer, toy, config, **options)
        except RuntimeError:
            return None
        return run, torch.cat([p.detach().flatten() for p in steering.parameters()])

    whole, expected = train(tmp_path / "whole")
    assert whole.precision == "bfloat16"
    assert train(tmp_path / "parts", stop=3) is None
    assert (tmp_path / "parts" / CHECKPOINT_FOLDER).is_dir()
    monkeypatch.setattr(precision, "GAIN", float("inf"))
    resumed, found = train(tmp_path / "parts")
    assert resumed.resumed and resumed.precision == "bfloat16" and resumed.curve == whole.curve
    assert torch.equal(found, expected)


def test_evaluation_records_its_precision(tmp_path, monkeypatch, pays):
    model = tiny()
    assert evaluate(model, tokenizer, toy).precision == "float32"  # too little to convert for
    monkeypatch.setattr("steer_nb.evaluation.result.LARGE", 1)
    result = evaluate(model, tokenizer, toy)
    assert result.precision == "bfloat16"
    assert Result.load(result.save(tmp_path / "result.json")) == result
    own = evaluate(tiny().to(torch.bfloat16), tokenizer, toy, precision="float32")
    assert own.precision == "bfloat16"  # that of its matrices


@pytest.mark.parametrize(("kind", "causal"), [("llama", True), ("opt", True), ("xlnet", False)])
def test_padding_needs_no_mask_in_a_causal_model(kind, causal):
    "With a mask and without, other kernels are used: float32's last bits may differ."
    model, seen = tiny_model(kind), []
    steer(model, rank=4, positions="prompt")
    masked = logits_of(model, attention_mask=MASK)
    with without_padding_mask(model) as dropped:
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        found = logits_of(model, attention_mask=MASK)
        logits_of(model, attention_mask=MASK.flip(1))  # padding on the left
        hook.remove()
    assert dropped == causal and (seen[0] is None) == causal and seen[1] is not None
    torch.testing.assert_close(found[MASK.bool()], masked[MASK.bool()], rtol=1e-5, atol=1e-6)
    assert torch.equal(logits_of(model, attention_mask=MASK), masked)  # the mask is used again


def test_training_gives_the_losses_of_masked_batches():
    "Each batch of two epochs again, by a plain forward pass with the mask."
    model = tiny()
    steer(model, rank=4)
    splits = encode_split(model, tokenizer, toy, "train")
    assert len(set(splits.lengths.tolist())) > 1  # there is padding
    run = fit(model, tokenizer, toy, TrainConfig(lr=1e-9, max_steps=1, batch_size=len(splits)))
    total, count = 0.0, 0
    with training_mode(model, 0, torch.device("cpu")), torch.no_grad():
        for index in range(len(splits)):
            ids = torch.tensor([splits[index].input_ids])
            labels = torch.tensor([splits[index].labels])
            logits = model(ids).logits[:, :-1].transpose(1, 2)
            total += float(F.cross_entropy(logits, labels[:, 1:], reduction="sum"))
            count += splits[index].count
    assert run.curve[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_a_real_model_answers_the_same_in_bfloat16():
    "Of 340 test sentences of SST-2, at most 2 % change their answer."
    from steer_nb import load_task

    model, tokenizer = load_model("smollm2-135m")
    task = load_task("sst2", n_train=1, n_validation=1, n_test=340)
    results = [evaluate(model, tokenizer, task, precision=p) for p in ("float32", "bfloat16")]
    answers = [[one["prediction"] for one in result.predictions] for result in results]
    assert sum(a != b for a, b in zip(*answers, strict=True)) <= 7
    assert results[1].interval[0] < results[0].score < results[1].interval[1]
