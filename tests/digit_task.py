"A task of digits and random models of two blocks that train on it in a fraction of a second."

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from steer_nb.data.examples import Example, Task

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "max", "of", "="]
BACKEND = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
BACKEND.pre_tokenizer = pre_tokenizers.Whitespace()
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=BACKEND, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)


def digits(count: int, split: str) -> tuple[Example, ...]:
    "Examples with completions of different lengths."
    chance, examples = random.Random(split), {}
    while len(examples) < count:
        asked = chance.choices(range(10), k=chance.randint(2, 6))
        prompt = f"max of {' '.join(map(str, asked))} ="
        completion = f" {max(asked)}" * chance.randint(1, 3)
        examples[prompt] = Example(prompt, completion, (), str(max(asked)), id=f"{split} {prompt}")
    return tuple(examples.values())


TASK = Task(
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


def tiny(kind: str = "llama"):
    "A random Llama or GPT-2, always the same."
    size = dict(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=1,
    )
    if kind == "llama":
        config = LlamaConfig(**size, intermediate_size=64)
    else:
        config = GPT2Config(**size, n_positions=32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
