"""Count the bytes that two processes send in a training step.

`torchrun --nproc_per_node 2 nbs/count_bytes.py METHOD OPTIONS STRATEGY` trains a tiny Llama for a
few steps and counts every collective of PyTorch as it is called. Prints one line of JSON: the
bytes per step by collective, counted as the whole tensor that it works on, and the number of
trained parameters."""

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

from steer_nb.data.examples import Example, Task
from steer_nb.methods.registry import apply_method
from steer_nb.training.config import TrainConfig
from steer_nb.training.distributed import is_sharded
from steer_nb.training.fit import fit

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
            # of two tensors, the one that is not a shard
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            self.bytes[NAMES[name]] += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def task_and_tokenizer():
    "A task of naming the largest of some digits, and its tokenizer."
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
        prompt, answer = f"{' '.join(map(str, digits))} =", str(max(digits))
        examples.append(Example(prompt, f" {answer}", (), answer, id=str(number)))
    task = Task(
        "digits",
        "generate",
        tuple(examples),
        (),
        (),
        "generated",
        "digits",
        max_new_tokens=2,
        extractor=str.strip,
    )
    return task, tokenizer


def main(name: str, options: str, strategy: str) -> dict:
    "Train for a few steps, and count."
    steps = 3
    task, tokenizer = task_and_tokenizer()
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
    if strategy == "fsdp":  # what Accelerate's launcher would set
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
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
