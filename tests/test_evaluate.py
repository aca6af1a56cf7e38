"""Evaluation on many architectures, under wrappers, in half precision, and in another process."""

import copy

import children
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer_nb.core.config import SteeringConfig
from steer_nb.core.model_state import accepts
from steer_nb.core.steering import steer
from steer_nb.data.encoding import encode_choices
from steer_nb.data.examples import Example
from steer_nb.data.records import Task
from steer_nb.evaluation.choices import EvaluateError, choice_scores
from steer_nb.evaluation.generation import generate_answers
from steer_nb.evaluation.result import Result, evaluate
from steer_nb.testing.tiny_models import tiny_model, zoo_types

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"w{n}" for n in range(100 - len(SPECIAL))]  # the zoo's vocabulary has 100 tokens


def word_tokenizer() -> PreTrainedTokenizerFast:
    "One token per word."
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
    "Random words."
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


def larger(model: torch.nn.Module) -> torch.nn.Module:
    "The model with weights so large that wrong positions or padding would change its outputs."
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@torch.no_grad()
def direct_scores(model, example: Example) -> torch.Tensor:
    "The scores of an example's choices, each from a forward pass of its own."
    options = {"use_cache": False} if accepts(model, "use_cache") else {}
    scores = []
    for choice in encode_choices(TOKENIZER, example):
        logits = model(input_ids=torch.tensor([choice.input_ids[:-1]]), **options).logits[0]
        log_probabilities = logits.float().log_softmax(-1)
        places = range(choice.prompt_length, len(choice.input_ids))
        scores.append(sum(log_probabilities[n - 1, choice.input_ids[n]] for n in places))
    return torch.stack(scores)


def assert_scores(model, expected: list[torch.Tensor], tolerance: float, batch_sizes=(1, 100)):
    for batch_size in batch_sizes:
        found = choice_scores(model, TOKENIZER, EXAMPLES, batch_size=batch_size)
        for scores, right in zip(found, expected, strict=True):
            assert torch.allclose(torch.tensor(scores), right, atol=tolerance), batch_size


def assert_batches_change_nothing(model):
    # float32, log-likelihoods up to 50
    assert_scores(model, [direct_scores(model, example) for example in EXAMPLES], 1e-3)
    alone = [generate_answers(model, TOKENIZER, [question], 6)[0] for question in QUESTIONS]
    assert generate_answers(model, TOKENIZER, QUESTIONS, 6, batch_size=4) == alone


CACHED = [
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
]
CACHED += ["roberta", "bart"]  # positions that left padding would shift
IN_FULL = ["mamba", "mamba2", "jamba", "lfm2", "rwkv", "qwen3_next", "recurrent_gemma"]
ALONE = ["git", "cpmant", "moshi", "prophetnet", "reformer", "deepseek_v32"]


@pytest.mark.parametrize("model_type", [*CACHED, *IN_FULL, *ALONE])
def test_results_do_not_depend_on_batch_padding_or_cache(model_type):
    assert_batches_change_nothing(larger(tiny_model(model_type)))


# Types whose tiny models cannot be built, or fail in transformers on a single unpadded row.
FAIL_ALONE = {"blt", "dbrx", "xlstm"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*zoo_types()} - FAIL_ALONE))
def test_results_do_not_depend_on_the_batch_on_any_architecture(model_type):
    try:
        model = larger(tiny_model(model_type))
    except Exception as error:
        pytest.skip(f"no tiny model: {error}")
    assert_batches_change_nothing(model)


def computed_tokens(model, call) -> int:
    "How many tokens go through the model during a call."
    seen = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    try:
        call()
    finally:
        handle.remove()
    return sum(seen)


@pytest.mark.parametrize("model_type", ("llama", "gemma3_text", "bloom"))
def test_each_prompt_is_computed_once(model_type):
    model, choices = tiny_model(model_type), (" w1 w2", " w3 w4", " w5 w6", " w7 w8")
    examples = [Example(text(20, n), choices[0], choices, 0, id=str(n)) for n in range(3)]
    once = computed_tokens(model, lambda: choice_scores(model, TOKENIZER, examples))
    assert once == 3 * (20 + 4 * 1)  # the prompts, and all tokens of the choices but the last


def test_choices_of_one_token_share_a_row_and_the_logits_of_one_position():
    model, choices, shapes = tiny_model("llama"), (" w1", " w2", " w3"), []
    examples = [Example(text(9, n), choices[0], choices, 0, id=str(n)) for n in range(5)]
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(output.shape[:2]))
    choice_scores(model, TOKENIZER, examples, batch_size=4)
    assert shapes == [(4, 1), (1, 1)]


def test_bfloat16_is_scored_in_float32():
    model = larger(tiny_model("llama")).bfloat16()
    expected = [direct_scores(model, example) for example in EXAMPLES]
    assert_scores(model, expected, 0.5)  # 8 bits, log-likelihoods up to 50


def test_under_peft():
    model = larger(tiny_model("llama"))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    scores = choice_scores(wrapped, TOKENIZER, EXAMPLES)
    with wrapped.disable_adapter():
        assert_scores(wrapped, [direct_scores(model, example) for example in EXAMPLES], 1e-3)
    own = wrapped.generation_config, wrapped.base_model.model.generation_config
    answers = generate_answers(wrapped, TOKENIZER, QUESTIONS, 6)
    assert (wrapped.generation_config, wrapped.base_model.model.generation_config) == own
    merged = wrapped.merge_and_unload()
    assert_scores(merged, [torch.tensor(own) for own in scores], 1e-3)
    assert generate_answers(merged, TOKENIZER, QUESTIONS, 6) == answers


@torch.no_grad()
def steered_scores(model, example: Example) -> torch.Tensor:
    "The model's own loss on one choice at a time: labels tell the steering where prompts end."
    scores = []
    for choice in encode_choices(TOKENIZER, example):
        ids, count = torch.tensor([choice.input_ids]), len(choice.input_ids) - choice.prompt_length
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < choice.prompt_length, -100)
        scores.append(-model(input_ids=ids, labels=labels).loss * count)
    return torch.stack(scores)


@pytest.mark.parametrize("model_type", ("llama", "bloom", "mamba"))
@pytest.mark.parametrize("positions", ("all", "prompt", "completion", "last", "prefix:1+suffix:2"))
def test_choices_are_completions_for_a_steering(model_type, positions):
    model = larger(tiny_model(model_type))
    for parameter in steer(model, SteeringConfig(kind="vector", positions=positions)).parameters():
        torch.nn.init.normal_(parameter)
    assert_scores(model, [steered_scores(model, example) for example in EXAMPLES], 1e-3)


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
    modes, settings = [part.training for part in model.modules()], model.generation_config
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    for call in (
        lambda: choice_scores(model, TOKENIZER, EXAMPLES),
        lambda: generate_answers(model, TOKENIZER, QUESTIONS, 6),
    ):
        with pytest.raises(EvaluateError, match="NaN for example 'example-"):
            call()
        assert [part.training for part in model.modules()] == modes
        assert model.generation_config is settings
        assert torch.is_grad_enabled()


def save_a_result(path: str) -> None:
    "In a child process: evaluate a random model, whose weights are those of its seed."
    task = Task("toy", "choice", (), (), tuple(EXAMPLES), source="generated", note="words")
    evaluate(larger(tiny_model("llama")), TOKENIZER, task).save(path)


def test_the_record_is_the_same_in_another_process(tmp_path):
    save_a_result(tmp_path / "first.json")
    done = children.run(save_a_result, str(tmp_path / "second.json"))
    assert done.returncode == 0, done.stderr
    first, second = (Result.load(tmp_path / f"{name}.json") for name in ("first", "second"))
    assert first.predictions == second.predictions
    assert first.accuracy == second.accuracy
    assert first.n == len(EXAMPLES)
    for record in first.predictions:
        assert record.keys() == {"id", "prediction", "answer", "correct", "score", "scores"}


@pytest.mark.parametrize("content", ("[]", "{}", '{"schema": 1}', "not JSON"))
def test_other_files_are_not_results(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(EvaluateError, match="other.json"):
        Result.load(path)
    with pytest.raises(EvaluateError, match="none.json"):
        Result.load(tmp_path / "none.json")
