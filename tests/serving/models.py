"""Models and steerings on disk for the tests of serving: small, random, in float32.

Their logits differ by several units and their steerings change log-probabilities strongly, so that
a shift that is missing, doubled or at a wrong token shows far above the tolerance."""

import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steer_nb.core.steering import steer

VOCABULARY, WIDTH, LAYERS = 320, 64, 4
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,  # one for each of two processes of tensor parallelism
    "head_dim": 32,  # the smallest that vLLM's attention on CPUs supports
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
ARCHITECTURES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen": {"model_type": "qwen3", "tie_word_embeddings": False},
    "gemma": {
        "model_type": "gemma3_text",
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "query_pre_attn_scalar": 32,
    },
}
OTHERS = {
    "olmo": {"model_type": "olmo2"},  # vLLM runs it with the code of transformers
    "cohere": {"model_type": "cohere", "tie_word_embeddings": True},  # returns the whole stream
}
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}t7"

KINDS = ("vector", "linear", "nonlinear", "loreft", "direft", "full")
POSITIONS = ("all", "prompt", "completion", "last", "prefix:3", "suffix:2", "prefix:2+suffix:2")


def make_tokenizer() -> PreTrainedTokenizerFast:
    "A tokenizer whose tokens are the words t3, t4, … beside <pad>, <s> and </s>."
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{n}": n for n in range(3, VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token="t3"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


@torch.no_grad()
def make_model(architecture: str, seed: int = 0):
    """A random model whose logits have a standard deviation of about 2.

    The embedding, the blocks and the output have the scale that trained models have."""
    fields = dict({**ARCHITECTURES, **OTHERS}[architecture])
    config = CONFIG_MAPPING[fields.pop("model_type")](**SHAPE, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(architecture.encode()) + seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        elif "embed_tokens" in name or "lm_head" in name:
            tied = model.config.tie_word_embeddings  # less, or each token would predict itself
            parameter.copy_(noise * (1 if tied else 2) / WIDTH**0.5)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


def write_model(architecture: str, folder: Path, seed: int = 0):
    "Write a model and its tokenizer to a folder; the model, as it is read from there."
    make_model(architecture, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def randomize(steering, seed: int, size: float = 0.8) -> None:
    "Set an adapter's parameters so that its shift is about `size` times the activation it reads."
    generator = torch.Generator().manual_seed(seed)
    for adapter in steering.adapters.values():
        for name, parameter in adapter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            rank = min(parameter.shape)
            scale = {
                "vector": 2 * size,
                "bias": 0.3,  # of linear and nonlinear: of the hidden size; of the others: of rank
                "down": 1 / parameter.shape[-1] ** 0.5,
                "up": size / rank**0.5,
                "matrix": size / parameter.shape[-1] ** 0.5,
                "rotation": 1.0,
                "weight": size / 4,
                "project": size / rank**0.5,
            }[name]
            parameter.copy_(noise * scale)


def write_steering(model, folder: Path, seed: int, strength: float = 1.0, **options) -> Path:
    "Write a random steering of these options for a model, which is as before; its folder."
    steering = steer(model, name="made", **options)
    randomize(steering, seed)
    steering.strength = strength
    steering.save(folder)
    steering.remove()
    return folder


def matrix_of_steerings() -> dict[str, dict]:
    "Options of a steering for every kind at every position, by a name such as `linear_prefix3`."
    found = {}
    for i, kind in enumerate(KINDS):
        for j, positions in enumerate(POSITIONS):
            options = {"kind": kind, "positions": positions}
            if kind not in ("vector", "full"):
                options["rank"] = (2, 4, 8, 3)[(i + j) % 4]
            if kind in ("linear", "nonlinear"):
                options["bias"] = j % 2 == 0
            if kind == "nonlinear":
                options["activation"] = ("silu", "gelu", "relu", "tanh")[j % 4]
            if (i + j) % 3 == 0:
                options["layers"] = [1, 3]
            mark = positions.replace(":", "").replace("+", "_")
            found[f"{kind}_{mark}"] = options
    return found
