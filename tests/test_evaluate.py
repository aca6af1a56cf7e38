"""What does not fit into the notebook of evaluate: many architectures, wrappers, half precision, other processes."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer_nb import evaluate as module
from steer_nb.core.config import SteeringConfig
from steer_nb.core.steering import steer
from steer_nb.data.encoding import encode_choices
from steer_nb.data.examples import Example
from steer_nb.evaluation.choices import EvaluateError, choice_scores
from steer_nb.evaluation.generation import generate_answers
from steer_nb.evaluation.result import Result
from steer_nb.testing.tiny_models import tiny_model

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"w{n}" for n in range(100 - len(SPECIAL))]  # the zoo's vocabulary has 100 tokens


def word_tokenizer() -> PreTrainedTokenizerFast:
    "A token a word."
    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def text(count: int, seed: int) -> str:
    "Words that mean nothing."
    return " ".join(
        WORDS[n]
        for n in torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    )


TOKENIZER = word_tokenizer()
CHOICES = (" w5", " w7 w8 w9", " w1 w2", " w30 w4 w6 w11 w12")
EXAMPLES = [
    Example(text(count, n), CHOICES[n % 2], CHOICES[: 2 + n % 3], n % 2, id=f"example-{n}")
    for n, count in enumerate((3, 14, 7, 7, 20, 5))
]
QUESTIONS = [Example(example.prompt, " w5", (), "w5", id=example.id) for example in EXAMPLES]
ENCODED = [encode_choices(TOKENIZER, example) for example in EXAMPLES]


def larger(model: torch.nn.Module) -> torch.nn.Module:
    "The model with weights so large that places and padding, if they were wrong, could be seen."
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@torch.no_grad()
def one_at_a_time(model, example: Example) -> torch.Tensor:
    "The scores of an example's choices, each from a forward pass of its own."
    scores, options = [], {"use_cache": False} if module.accepts(model, "use_cache") else {}
    for choice in encode_choices(TOKENIZER, example):
        log_probabilities = (
            model(input_ids=torch.tensor([choice.input_ids]), **options)
            .logits[0]
            .float()
            .log_softmax(-1)
        )
        scores.append(
            sum(
                log_probabilities[place - 1, choice.input_ids[place]]
                for place in range(choice.prompt_length, len(choice.input_ids))
            )
        )
    return torch.stack(scores)


def assert_scores(model, expected: list[torch.Tensor], tolerance: float) -> None:
    for batch_size in (1, 4, 100):
        for scores, right in zip(
            choice_scores(model, TOKENIZER, EXAMPLES, batch_size=batch_size), expected, strict=True
        ):
            assert torch.allclose(torch.tensor(scores), right, atol=tolerance), batch_size


CACHED = (
    "llama",
    "gpt2",
    "opt",
    "bloom",
    "mistral",
    "gemma3_text",
    "gpt_neox",
    "phi",
    "falcon",
    "olmo2",
    "qwen3",
    "biogpt",
)
IN_FULL = (
    "mamba",
    "mamba2",
    "jamba",
    "lfm2",
    "rwkv",
    "qwen3_next",
    "recurrent_gemma",
    "roberta",
    "git",
)
WAYS = CACHED + IN_FULL


@pytest.mark.parametrize("model_type", WAYS)
def test_scores_do_not_depend_on_batch_padding_or_cache(model_type):
    model = larger(tiny_model(model_type))
    assert_scores(
        model, [one_at_a_time(model, example) for example in EXAMPLES], 1e-3
    )  # float32, log-likelihoods up to 50


@pytest.mark.parametrize("model_type", CACHED)
def test_the_prompt_is_computed_once_where_that_is_right(model_type):
    with torch.no_grad():
        assert (
            module._choose_way(larger(tiny_model(model_type)), TOKENIZER, ENCODED)
            is module._score_cached
        )


@pytest.mark.parametrize("model_type", WAYS)
def test_generated_text_does_not_depend_on_the_batch(model_type):
    model = larger(tiny_model(model_type))
    alone = [generate_answers(model, TOKENIZER, [question], 6)[0] for question in QUESTIONS]
    assert generate_answers(model, TOKENIZER, QUESTIONS, 6, batch_size=4) == alone


def test_bfloat16_is_scored_in_float32_and_in_batches():
    model = larger(tiny_model("llama")).bfloat16()
    with torch.no_grad():
        assert module._choose_way(model, TOKENIZER, ENCODED) is module._score_cached
    assert_scores(
        model, [one_at_a_time(model, example) for example in EXAMPLES], 0.5
    )  # 8 bits, log-likelihoods up to 50


def test_under_peft():
    model = larger(tiny_model("llama"))
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        assert module._choose_way(wrapped, TOKENIZER, ENCODED) is module._score_cached
    scores = choice_scores(wrapped, TOKENIZER, EXAMPLES)
    with wrapped.disable_adapter():
        assert_scores(wrapped, [one_at_a_time(model, example) for example in EXAMPLES], 1e-3)
    own = wrapped.generation_config, wrapped.base_model.model.generation_config
    answers = generate_answers(wrapped, TOKENIZER, QUESTIONS, 6)
    assert (wrapped.generation_config, wrapped.base_model.model.generation_config) == own
    merged = wrapped.merge_and_unload()
    assert_scores(merged, [torch.tensor(own) for own in scores], 1e-3)
    assert generate_answers(merged, TOKENIZER, QUESTIONS, 6) == answers


@pytest.mark.parametrize("positions", ("all", "last", "prompt", "completion", "prefix:2"))
def test_a_steered_model_generates_the_same_in_a_batch(positions):
    model = larger(tiny_model("llama"))
    plain = generate_answers(model, TOKENIZER, QUESTIONS, 6)
    for parameter in steer(model, SteeringConfig(kind="vector", positions=positions)).parameters():
        torch.nn.init.normal_(parameter)
    alone = [generate_answers(model, TOKENIZER, [question], 6)[0] for question in QUESTIONS]
    assert generate_answers(model, TOKENIZER, QUESTIONS, 6) == alone != plain


def test_nothing_is_left_behind_after_an_error():
    model = larger(tiny_model("llama")).train()
    modes, settings, weight = (
        [part.training for part in model.modules()],
        model.generation_config,
        model.lm_head.weight,
    )
    with torch.no_grad():
        weight[5] = torch.nan
    for call in (
        lambda: choice_scores(model, TOKENIZER, EXAMPLES),
        lambda: generate_answers(model, TOKENIZER, QUESTIONS, 6),
    ):
        with pytest.raises(EvaluateError, match="NaN for example 'example-"):
            call()
        assert [
            part.training for part in model.modules()
        ] == modes and model.generation_config is settings
        assert torch.is_grad_enabled()


def test_the_record_is_the_same_in_another_process(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from test_evaluate import *
task = Task("toy", "choice", (), (), tuple(EXAMPLES), source="generated", note="words")
evaluate(larger(tiny_model("llama")), TOKENIZER, task).save(sys.argv[2])
"""
    paths = [tmp_path / name for name in ("first.json", "second.json")]
    for path in paths:
        subprocess.run(
            [sys.executable, "-c", code, __file__.rsplit("/", 1)[0], str(path)], check=True
        )
    first, second = map(Result.load, paths)
    assert (
        first.predictions == second.predictions
        and first.accuracy == second.accuracy
        and first.n == len(EXAMPLES)
    )
    assert all(
        record.keys() == {"id", "prediction", "answer", "correct", "scores"}
        for record in first.predictions
    )
