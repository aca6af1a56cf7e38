"""The side of the padding changes nothing, on models that learn a vector for each position too.

Batches have no position_ids, as tokenizers make them. Float64 models; RMSNorm and some attention
kernels compute in float32, hence 1e-6."""

import pytest
import torch

from steer_nb import SteerError, fit_oracle, logit_divergence, site_scores, steer, tiny_model
from steer_nb.training.loss import completion_loss

ABSOLUTE = ("gpt2", "gpt_neo", "opt", "biogpt", "roberta")  # RoBERTa's begin at 2


def batches(side):
    "Two batches of texts of different lengths with labels on their last two tokens."
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ((9, 4, 6), (5, 8, 8)):
        ids, mask, labels = (torch.full((3, 9), value) for value in (1, 0, -100))
        for row, length in enumerate(lengths):
            own = slice(9 - length, 9) if side == "left" else slice(0, length)
            text = torch.randint(5, 90, (length,), generator=generator)
            ids[row, own], mask[row, own] = text, 1
            labels[row, own] = torch.cat([torch.full((length - 2,), -100), text[-2:]])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def pair(name):
    model = tiny_model(name).double().eval()
    tuned = tiny_model(name, seed=1).double().eval()
    return model, tuned


def divergence(name, side):
    return torch.tensor(logit_divergence(*pair(name), batches(side)))


def loss(name, side):
    model, _ = pair(name)
    return sum(completion_loss(model, batch) for batch in batches(side))


def oracle(name, side):
    base, tuned = pair(name)
    for parameter, other in zip(base.parameters(), tuned.parameters(), strict=True):
        parameter.data.mul_(0.9).add_(other.data, alpha=0.1)
    steering = fit_oracle(base, tuned, batches(side), rank=2, ridge=0.1, holdout=0.5)
    return torch.tensor([[row["r2"], row["size"]] for row in steering.fit.rows])


def scores(name, side):
    found = site_scores(pair(name)[0], batches(side), sites=("block",))
    return torch.tensor([found[site] for site in found.directions])


@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("measure", [divergence, loss, oracle, scores])
def test_padding_on_the_left_equals_padding_on_the_right(measure, name):
    left, right = measure(name, "left"), measure(name, "right")
    assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("measure", [loss, scores, divergence])
def test_a_label_on_the_first_token_is_not_predicted_from_padding(measure, monkeypatch):
    original = batches

    def all_labelled(side):
        made = original(side)
        for batch in made:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return made

    monkeypatch.setitem(globals(), "batches", all_labelled)
    left, right = measure("gpt2", "left"), measure("gpt2", "right")
    assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)


def test_positions_that_cannot_be_given_are_an_error():
    "Bart counts columns and takes no position_ids."
    steer(model := tiny_model("bart"))
    with pytest.raises(SteerError, match="pad on the right"):
        completion_loss(model, batches("left")[0])
