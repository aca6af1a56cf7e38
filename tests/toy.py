"""A task, a tokenizer and random models that train in a second: name the largest of some digits."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from steer_nb.data.examples import Example, Task

_WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "max", "of", "="]


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(_WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def digits(count: int, split: str) -> tuple[Example, ...]:
    "Examples with two to six digits, and completions with unequal numbers of tokens."
    chance, examples = random.Random(split), {}
    while len(examples) < count:
        asked = chance.choices(range(10), k=chance.randint(2, 6))
        prompt = f"max of {' '.join(map(str, asked))} ="
        completion = f" {max(asked)}" * chance.randint(1, 3)
        name = f"{split} {prompt}"
        examples[prompt] = Example(prompt, completion, (), str(max(asked)), id=name)
    return tuple(examples.values())


tokenizer = _tokenizer()
toy = Task(
    "digits",
    "generate",
    digits(29, "train"),
    digits(9, "validation"),
    digits(1, "test"),
    "generated",
    "digits",
    max_new_tokens=3,
    extractor=str.strip,
)


def tiny(kind: str = "llama", **changes) -> torch.nn.Module:
    "A random Llama, or GPT-2 (which has dropout), with two blocks of width 32."
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if kind == "llama":
        config = LlamaConfig(**{**size, "intermediate_size": 64, **changes})
    else:
        config = GPT2Config(**{**size, "n_positions": 32, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
