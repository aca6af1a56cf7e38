"""Rows of a batch that hold several texts, labels of every kind, threads, and rows with their own
steering: the numbers are those of one text at a time, or there is an error.

Tolerances are 1e-6 in float64 models: RMSNorm computes in float32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_steering import EVERY_POSITIONS, expected_columns, randomise
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as PackingCollator

from steer_nb import Site, SteerError, prompt_ends, steer, steerings, tiny_model

TEXTS = [([5, 6, 7, 8, 9, 10, 11], 4), ([12, 13, 14], 2), ([15, 16, 17, 18], 3)]  # (ids, prompt)
OF_PROMPTS = [name for name in EVERY_POSITIONS if name not in ("all", "completion")]


def labels_of(ids, prompt):
    return [-100] * prompt + ids[prompt:]


def tiny(name="llama", **options):
    return tiny_model(name, **options).double().eval()


def alone(model, positions, ids, prompt):
    "The logits of one text, from a model that is steered by a plain hook at columns by hand."
    steering = steerings(model)["default"]
    chosen = torch.zeros(len(ids), 1, dtype=torch.float64)
    chosen[expected_columns(positions, prompt, len(ids))] = 1
    handles = []
    for site, adapter in steering.adapters.items():

        def change(module, args, output, adapter=adapter):
            h = output[0] if isinstance(output, tuple) else output
            new = h + chosen * adapter(h)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(model.model.layers[site.layer].register_forward_hook(change))
    with steering.disabled():
        logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def steered(positions, **options):
    model = tiny(**options)
    randomise(steer(model, rank=2, positions=positions), 1)
    return model


# Several texts in a row


@pytest.mark.parametrize("positions", EVERY_POSITIONS)
def test_packed_rows_equal_one_text_at_a_time(positions):
    "By the position ids that TRL's own collator makes for packing."
    model = steered(positions)
    collator = PackingCollator(pad_token_id=0, padding_free=True)
    batch = collator(
        [{"input_ids": ids, "labels": labels_of(ids, prompt)} for ids, prompt in TEXTS]
    )
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    logits = model(**batch, use_cache=False).logits[0]
    start = 0
    for ids, prompt in TEXTS:
        own = logits[start : start + len(ids)]
        assert torch.allclose(own, alone(model, positions, ids, prompt), atol=1e-6)
        start += len(ids)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_packed_rows_with_labels_on_every_token(texts):
    "The collator takes the label of the first token of each text away: it is no prompt."
    collator = PackingCollator(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": ids} for ids, _ in texts])
    assert batch["labels"][0, 0] == -100
    with pytest.raises(SteerError, match="a text in row 0 has no prompt"):
        steered("last")(**batch)


def test_packed_rows_without_labels_are_prompts():
    model = steered("last")
    ids = torch.tensor([sum((ids for ids, _ in TEXTS), [])])
    position_ids = torch.tensor([[n for ids, _ in TEXTS for n in range(len(ids))]])
    logits = model(ids, position_ids=position_ids, use_cache=False).logits[0]
    start = 0
    for text, _ in TEXTS:
        own = logits[start : start + len(text)]
        assert torch.allclose(own, alone(model, "last", text, len(text)), atol=1e-6)
        start += len(text)
    with (
        pytest.raises(SteerError, match="several texts"),
        prompt_ends(model, 4),
    ):
        model(ids, position_ids=position_ids)


def test_gradients_of_packed_rows():
    "The sum of those of the texts: also under gradient checkpointing."
    ids = torch.tensor([sum((ids for ids, _ in TEXTS), [])])
    position_ids = torch.tensor([[n for ids, _ in TEXTS for n in range(len(ids))]])
    labels = torch.tensor([sum((labels_of(*text) for text in TEXTS), [])])
    model = steered("last").train()
    model.gradient_checkpointing_enable()
    steering = steerings(model)["default"]
    options = dict(num_items_in_batch=1)
    model(ids, position_ids=position_ids, labels=labels, **options).loss.backward()
    together = [parameter.grad.clone() for parameter in steering.parameters()]
    model.zero_grad()
    for text, prompt in TEXTS:
        loss = model(
            torch.tensor([text]), labels=torch.tensor([labels_of(text, prompt)]), **options
        ).loss
        loss.backward()
    for parameter, grad in zip(steering.parameters(), together, strict=True):
        assert grad.abs().max() > 0
        assert torch.allclose(parameter.grad, grad, atol=1e-6)


def test_continuous_batching_is_an_error():
    "Its rows hold parts of several requests, in an order that is not known to the steering."
    model = tiny().float()
    steer(model, positions="last")
    with pytest.raises(SteerError, match="generate_batch"):
        model(torch.tensor([[5, 6, 7]]), cache=object())


# Labels


@pytest.mark.parametrize("positions", OF_PROMPTS)
def test_labels_on_every_token_leave_no_prompt(positions):
    "The default collator, and padding."
    rows = [{"input_ids": ids} for ids, _ in TEXTS]

    class Tokenizer:  # what the collator needs
        pad_token = mask_token = "x"

        def pad(self, examples, **options):
            width = max(len(example["input_ids"]) for example in examples)
            padded = [e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples]
            ids = torch.tensor(padded)
            return {"input_ids": ids, "attention_mask": (ids != 0).long()}

        pad_token_id = 0

    batch = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)(rows)
    assert (batch["labels"] != -100).all(1).any()
    with pytest.raises(SteerError, match="a text in row 0 has no prompt"):
        steered(positions)(**batch)


def test_labels_on_every_token_are_a_completion():
    model = steered("completion")
    ids = torch.tensor([TEXTS[0][0]])
    assert torch.allclose(
        model(ids, labels=ids).logits[0], alone(model, "completion", ids[0].tolist(), 0), atol=1e-6
    )


@pytest.mark.parametrize("positions", OF_PROMPTS)
def test_several_answers_have_several_prompts(positions):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, 7, -100, 9, 10]])
    with pytest.raises(SteerError, match="several parts"):
        steered(positions)(ids, labels=labels)


def test_labels_that_trainer_takes_away(tmp_path):
    "With label smoothing, the model does not see the labels."
    model = steered("last").float()
    ids, prompt = TEXTS[0]
    rows = [{"input_ids": ids, "labels": labels_of(ids, prompt)}]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        label_smoothing_factor=0.1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    with pytest.warns(UserWarning, match="got no labels"):
        Trainer(model, arguments, train_dataset=rows).train()


@pytest.mark.parametrize("positions", ["all", *OF_PROMPTS])
def test_sequence_classification(positions):
    "Labels belong to rows: each row is a prompt. Padded rows equal single ones."
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny().config).double().eval()
    model.config.pad_token_id = 0
    steering = randomise(steer(model, rank=2, positions=positions), 1)
    width = max(len(ids) for ids, _ in TEXTS)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in TEXTS])
    labels = torch.tensor([0, 1, 0])
    out = model(ids, attention_mask=(ids != 0).long(), labels=labels)
    for row, (text, _) in enumerate(TEXTS):
        single = model(torch.tensor([text]), labels=labels[row : row + 1]).logits[0]
        assert torch.allclose(out.logits[row], single, atol=1e-6)
        with steering.disabled():
            assert (model(torch.tensor([text])).logits[0] - single).abs().max() > 1e-3
    out.loss.backward()
    assert all(p.grad.any() for p in steering.adapters[Site(0, "block")].parameters())


def test_a_classifier_has_no_completions():
    model = AutoModelForSequenceClassification.from_config(tiny().config)
    steer(model, positions="completion")
    with pytest.raises(SteerError, match="no completion"):
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([1]))


@pytest.mark.parametrize("shape", [(1, 4), (1, 10), (2, 5)])
def test_labels_of_another_shape_are_an_error(shape):
    model = steered("last")
    with (
        prompt_ends(model, torch.full(shape, -100)),
        pytest.raises(SteerError, match="labels of shape"),
    ):
        model(torch.tensor([[5, 6, 7, 8, 9]]))


def test_ends_of_rows_hold_for_their_beams():
    model = steered("suffix:2")
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    options = dict(num_beams=2, max_new_tokens=3, do_sample=False)
    with prompt_ends(model, torch.tensor([3, 4])):
        both = model.generate(ids, **options)
    for row, end in enumerate((3, 4)):
        with prompt_ends(model, end):
            assert torch.equal(model.generate(ids[row : row + 1], **options)[0], both[row])


# Threads


@pytest.mark.parametrize("positions", ["last", "completion", "prefix:1+suffix:2"])
def test_threads_generate_what_one_does(positions):
    model = steered(positions)

    def generated(length):
        ids = torch.arange(length)[None] * 7 % 50 + 3
        return model.generate(ids, max_new_tokens=6, do_sample=False).tolist()

    lengths = [3, 9, 5, 12, 7, 4] * 8
    expected = [generated(length) for length in lengths]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(generated, lengths)) == expected


def test_threads_have_their_own_rows_and_ends():
    model = three()[0]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def logits(case):
        name, end = case
        with steerings(model)["a"].rows([name]), prompt_ends(model, end), torch.no_grad():
            return model(ids).logits

    cases = [(name, end) for name in ("a", "b", "c", None) for end in (2, 3, 4)] * 8
    expected = [logits(case) for case in cases]
    with ThreadPoolExecutor(8) as threads:
        for got, want in zip(threads.map(logits, cases), expected, strict=True):
            assert torch.equal(got, want)


# Rows with a steering of their own

ROWS, STRENGTHS = ["a", ("b", "c"), None, "b"], [0.3, None, 2, -1.5]


def three(name="llama", site="heads", **options):
    "A model with three steerings, of different kinds and positions."
    model = tiny(name, **options)
    randomise(steer(model, name="a", kind="vector"), 1)
    randomise(steer(model, name="b", rank=2, positions="suffix:3"), 2)
    randomise(steer(model, name="c", kind="scale", site=site, layers=[1]), 3)
    return model, torch.arange(48).view(4, 12) * 5 % 50 + 3


def one_row_at_a_time(model, call, ids):
    "Each row alone, with the steerings of the others switched off."
    results = []
    for row, (names, strength) in enumerate(zip(ROWS, STRENGTHS, strict=True)):
        for name, steering in steerings(model).items():
            steering.enabled = name in (names or ())
            steering.strength = 1 if strength is None else strength
        results.append(call(ids[row : row + 1]))
    for steering in steerings(model).values():
        steering.enabled, steering.strength = True, 1
    return torch.cat(results)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "xlnet", "gemma3n_text"])
def test_each_row_has_its_own_steering(name):
    "In the layouts of activations that there are: also one row of all tokens, or (seq, batch)."
    model, ids = three(name, site="mlp" if name in ("gpt2", "mixtral") else "block")
    if name == "mixtral":
        model.float()  # its experts' kernel has no float64
    with torch.no_grad():
        expected = one_row_at_a_time(model, lambda row: model(row).logits, ids)
        with steerings(model)["a"].rows(ROWS, STRENGTHS):
            together = model(ids).logits
        plain = model(ids).logits
    assert torch.allclose(together, expected, atol=1e-5 if name == "mixtral" else 1e-6)
    assert (plain - expected).abs().amax(dim=(1, 2)).min() > 1e-3  # each row differs without


@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_generates_by_its_own_steering(beams):
    model, ids = three()
    ids[0, :4] = 0
    options = dict(max_new_tokens=6, do_sample=False, num_beams=beams, num_return_sequences=beams)

    def generated(rows):
        return model.generate(rows, attention_mask=(rows != 0).long(), **options)

    expected = one_row_at_a_time(model, generated, ids)
    with steerings(model)["b"].rows(ROWS, STRENGTHS):
        assert torch.equal(generated(ids), expected)
    assert not torch.equal(generated(ids), expected)


def test_training_several_steerings_in_one_batch():
    "Each gets the gradient of its rows, under gradient checkpointing too, after the block is left."
    model, ids = three()
    ids = ids[[0, 1, 3]]
    expected = {}
    for row, name in enumerate("aba"):
        model.zero_grad()
        with steerings(model)[name].rows([name]):
            model(ids[row : row + 1]).logits.square().sum().backward()
        for key, parameter in enumerate(steerings(model)[name].parameters()):
            key = name, key
            expected[key] = expected.get(key, 0) + parameter.grad
    for checkpointing in (False, True):
        model, _ = three()
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        with steerings(model)["a"].rows(["a", "b", "a"]):
            loss = model(ids).logits.square().sum()
        loss.backward()
        for (name, key), grad in expected.items():
            parameter = list(steerings(model)[name].parameters())[key]
            assert torch.allclose(parameter.grad, grad, atol=1e-6)
        assert all(p.grad is None or not p.grad.any() for p in steerings(model)["c"].parameters())


@pytest.mark.parametrize(
    "rows, strengths, message",
    [
        (["a", "d"], None, "no steering 'd': there are a, b, c"),
        (["a", None], [1], "2 rows and 1 strengths"),
        ("a", None, "an entry for each row"),
        (["a"], ["strong"], "strength"),
    ],
)
def test_errors_of_rows(rows, strengths, message):
    model, ids = three()
    with (
        pytest.raises(SteerError, match=message),
        steerings(model)["a"].rows(rows, strengths),
    ):
        pass
    with (
        steerings(model)["a"].rows(["a"]),
        pytest.raises(SteerError, match="steerings for 1 rows, and the batch has 4"),
    ):
        model(ids)
    with (
        steerings(model)["a"].rows(["a"] * 4),
        pytest.raises(SteerError, match="whole model"),
    ):
        model.model(ids)


def test_nothing_of_rows_is_left():
    model = tiny()
    before = set(vars(model)), len(model._forward_pre_hooks)
    steering = steer(model)
    with steering.rows([None]):
        pass
    steering.remove()
    assert (set(vars(model)), len(model._forward_pre_hooks)) == before
