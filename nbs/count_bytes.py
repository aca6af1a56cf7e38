"""Count the bytes that processes exchange in a training step.

`torchrun --nproc_per_node 2 nbs/count_bytes.py METHOD OPTIONS STRATEGY` trains a tiny Llama on a
toy task for a few steps and intercepts every collective of PyTorch. It prints one line of JSON: the
bytes per step by collective, counted as the whole tensor, and the number of trained parameters.
"""

import json
import os
import random
import sys
from collections import Counter

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from steer_nb import Example, Task, TrainConfig, apply_method, fit
from steer_nb.training.distributed import is_sharded

NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Counted(TorchDispatchMode):
    "Bytes of collectives, by name."

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, *_ = str(function).split(".")
        if namespace == "c10d" and name in NAMES:
            whole = (
                args[1] if name == "_reduce_scatter_base_" else args[0]
            )  # of two tensors, the one that is not a shard
            self.bytes[NAMES[name]] += sum(
                one.nbytes for one in (whole if isinstance(whole, (list, tuple)) else [whole])
            )
        return function(*args, **(kwargs or {}))


def task_and_tokenizer():
    "Digits, and which is the largest."
    words = ["<pad>", "<eos>", "<unk>", *"0123456789", "="]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    chance, examples = random.Random(0), []
    for number in range(24):
        digits = chance.choices(range(10), k=5)
        examples.append(
            Example(
                f"{' '.join(map(str, digits))} =",
                f" {max(digits)}",
                (),
                str(max(digits)),
                id=str(number),
            )
        )
    return Task(
        "digits",
        "generate",
        tuple(examples),
        (),
        (),
        "generated",
        "digits",
        max_new_tokens=2,
        extractor=str.strip,
    ), tokenizer


def main(name: str, options: str, strategy: str) -> dict:
    "Train, and count."
    steps, (task, tokenizer) = 3, task_and_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    method, counted = apply_method(model, name, **json.loads(options)), Counted()
    if strategy == "fsdp":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
        }  # what Accelerate's launcher would set
    with counted:
        fit(method, tokenizer, task, TrainConfig(max_steps=steps, batch_size=4))
    assert is_sharded(method.model) == (strategy == "fsdp")
    return {
        "bytes": {kind: total / steps for kind, total in counted.bytes.items()},
        "trained": method.num_parameters,
    }


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    if distributed.get_rank() == 0:
        print(json.dumps(result))
    distributed.destroy_process_group()
