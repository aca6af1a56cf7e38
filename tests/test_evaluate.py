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
from steer_nb.evaluate import EvaluateError, Result, choice_scores, evaluate, generate_answers
from steer_nb.steering import SteeringConfig, steer
from steer_nb.tasks import Example, Task, encode_choices, encode_prompt
from steer_nb.zoo import tiny_model

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"w{n}" for n in range(100 - len(SPECIAL))]           # the zoo's vocabulary has 100 tokens


def word_tokenizer() -> PreTrainedTokenizerFast:
    "A token a word."
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def text(count: int, seed: int) -> str:
    "Words that mean nothing."
    return " ".join(WORDS[n] for n in torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed)))


TOKENIZER = word_tokenizer()
CHOICES = (" w5", " w7 w8 w9", " w1 w2", " w30 w4 w6 w11 w12")
EXAMPLES = [Example(text(count, n), CHOICES[n % 2], CHOICES[:2 + n % 3], n % 2, id=f"example-{n}") for n, count in enumerate((3, 14, 7, 7, 20, 5))]
QUESTIONS = [Example(example.prompt, " w5", (), "w5", id=example.id) for example in EXAMPLES]
ENCODED = [encode_choices(TOKENIZER, example) for example in EXAMPLES]


def larger(model: torch.nn.Module) -> torch.nn.Module:
    "The model with weights so large that places and padding, if they were wrong, could be seen."
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1: parameter.mul_(3)
    return model


@torch.no_grad()
def one_at_a_time(model, example: Example) -> torch.Tensor:
    "The scores of an example's choices, each from a forward pass of its own."
    scores = []
    for choice in encode_choices(TOKENIZER, example):
        log_probabilities = model(input_ids=torch.tensor([choice.input_ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(log_probabilities[place - 1, choice.input_ids[place]] for place in range(choice.prompt_length, len(choice.input_ids))))
    return torch.stack(scores)


def assert_scores(model, expected: list[torch.Tensor], tolerance: float) -> None:
    for batch_size in (1, 4, 100):
        for scores, right in zip(choice_scores(model, TOKENIZER, EXAMPLES, batch_size=batch_size), expected, strict=True):
            assert torch.allclose(torch.tensor(scores), right, atol=tolerance), batch_size


CACHED = ("llama", "gpt2", "opt", "bloom", "mistral", "gemma3_text", "gpt_neox", "phi", "falcon", "olmo2", "qwen3", "biogpt")
IN_FULL = ("mamba", "mamba2", "jamba", "lfm2", "rwkv", "qwen3_next", "recurrent_gemma")


@pytest.mark.parametrize("model_type", CACHED + IN_FULL)
def test_scores_do_not_depend_on_batch_padding_or_cache(model_type):
    model = larger(tiny_model(model_type))
    with torch.no_grad(): assert module._use_cache(model, TOKENIZER, ENCODED) == (model_type in CACHED)
    assert_scores(model, [one_at_a_time(model, example) for example in EXAMPLES], 1e-3)    # float32, log-likelihoods up to 50


@pytest.mark.parametrize("model_type", CACHED + IN_FULL)
def test_generated_text_does_not_depend_on_the_batch(model_type):
    model = larger(tiny_model(model_type))
    alone = [generate_answers(model, TOKENIZER, [question], 6)[0] for question in QUESTIONS]
    assert generate_answers(model, TOKENIZER, QUESTIONS, 6, batch_size=4) == alone
