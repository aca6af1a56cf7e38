"Trainings with compiled blocks, compared with the same trainings without."

from dataclasses import replace

import pytest
import torch
from torch._inductor import config as inductor
from toy import tiny, tokenizer, toy

from steer_nb.core.prefix import replaced_forward
from steer_nb.core.sites import blocks
from steer_nb.core.steering import steer
from steer_nb.experiments.catalog import ScaleError
from steer_nb.experiments.forecast import plan_training
from steer_nb.methods.registry import apply_method
from steer_nb.training.config import TrainConfig, TrainError
from steer_nb.training.fit import fit
from steer_nb.training.mode import check_compilable, compiled_blocks

CONFIG = TrainConfig(lr=1e-2, epochs=2, batch_size=8, precision="float32")


def test_the_same_training_whatever_was_compiled_before():
    "A method of two stages: the second has other adapters at the same places."
    found = {}
    for compiled in (True, False):
        method = apply_method(tiny(), "lofit")
        torch._dynamo.utils.counters.clear()
        run = fit(method, tokenizer, toy, replace(CONFIG, compile=compiled))
        found[compiled] = [one["loss"] for one in (*run.curve, *run.validation)]
        assert bool(torch._dynamo.utils.counters["stats"]) == compiled
        assert all(block._compiled_call_impl is None for block in blocks(method.model))
    # float32 in another order of operations, over eight steps
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_which_blocks_are_compiled():
    model = tiny()
    first, second = list(blocks(model))[:2]
    second.compile()
    own = second._compiled_call_impl
    with pytest.raises(KeyError), replaced_forward(first, first.forward), compiled_blocks(model):
        assert first._compiled_call_impl is None and second._compiled_call_impl is own
        raise KeyError
    with pytest.raises(KeyError), compiled_blocks(model):
        assert first._compiled_call_impl is not None
        raise KeyError
    assert first._compiled_call_impl is None and second._compiled_call_impl is own


@pytest.mark.parametrize("what", ["sharded", "checkpointing", "replaced", "compiler"])
def test_what_cannot_be_compiled(what, monkeypatch):
    model = tiny()
    if what == "compiler":
        monkeypatch.setattr(inductor.cpp, "cxx", ("/nonexistent/g++",))
    if what == "checkpointing":
        model.gradient_checkpointing_enable()
    if what == "replaced":
        blocks(model)[1].forward = blocks(model)[1].forward
    with pytest.raises(TrainError, match=what):
        check_compilable(model, what == "sharded", model.device)
    if what != "sharded":
        steer(model)
        with pytest.raises(TrainError, match="compile=True"):
            fit(model, tokenizer, toy, replace(CONFIG, compile=True))
        with pytest.raises(ScaleError, match="compile=True"):
            plan_training(model, tokenizer, toy, replace(CONFIG, compile=True))
