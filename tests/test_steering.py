"""Steered models with the software around them: compile, PEFT, beam search, processes.

Each result is compared with plain hooks, or with the same computation made another way."""

import copy
import functools
import json
import pickle

import children
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steer_nb.core.adapters import KINDS
from steer_nb.core.config import SteeringConfig
from steer_nb.core.errors import SteerError, SteeringError
from steer_nb.core.hooks import capture, edit
from steer_nb.core.loading import load_steering
from steer_nb.core.passes import prompt_ends
from steer_nb.core.sites import Site, SiteError
from steer_nb.core.steering import steer, steerings

EVERY_POSITIONS = (
    "all",
    "last",
    "prompt",
    "completion",
    "prefix:2",
    "suffix:3",
    "prefix:1+suffix:2",
)


def tiny(model_type="llama", seed=0, **changes):
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**sizes, **changes})
    ).eval()


def randomise(steering, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    for parameter in steering.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return steering


INPUT = torch.arange(24).view(2, 12) + 3


def expected_columns(positions, prompt, length):
    "Which columns of one unpadded example are steered, written out by hand."
    if positions == "all":
        return list(range(length))
    if positions == "prompt":
        return list(range(prompt))
    if positions == "completion":
        return list(range(prompt, length))
    first, last = {
        "last": (0, 1),
        "prefix:2": (2, 0),
        "suffix:3": (0, 3),
        "prefix:1+suffix:2": (1, 2),
    }[positions]
    return sorted({i for i in range(prompt) if i < first or i >= prompt - last})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("site", ["block", "mlp", "attn", "heads"])
@pytest.mark.parametrize("positions", EVERY_POSITIONS)
def test_positions_in_a_padded_batch_equal_single_examples(positions, site, side):
    "Each padded row equals its example alone, steered by a plain hook at columns chosen by hand."
    model, bare = tiny().double(), tiny().double()
    steering = randomise(
        steer(model, SteeringConfig(site=site, rank=2, layers=[1], positions=positions)), 1
    )
    adapter = steering.adapters[Site(1, site)]
    examples = [
        (torch.tensor([5, 6, 7, 8, 9, 10, 11]), 4),
        (torch.tensor([12, 13, 14]), 2),
        (torch.tensor([15, 16, 17, 18]), 3),
    ]
    width = max(len(tokens) for tokens, _ in examples)
    ids, mask, labels = (torch.full((3, width), value) for value in (0, 0, -100))
    for row, (tokens, prompt) in enumerate(examples):
        start = width - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
        labels[row, start + prompt : start + len(tokens)] = tokens[prompt:]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    batched = model(
        input_ids=ids, attention_mask=mask, labels=labels, position_ids=position_ids
    ).logits

    block = bare.model.layers[1]
    for row, (tokens, prompt) in enumerate(examples):
        chosen = torch.zeros(len(tokens), 1)
        chosen[expected_columns(positions, prompt, len(tokens))] = 1
        if site == "heads":

            def change(module, args, chosen=chosen):
                heads = args[0].unflatten(-1, (4, 8))
                return (args[0] + chosen * adapter(heads).flatten(-2),)

            handle = block.self_attn.o_proj.register_forward_pre_hook(change)
        else:
            module = {"block": block, "mlp": block.mlp, "attn": block.self_attn}[site]

            def change(module, args, output, chosen=chosen):
                h = output[0] if isinstance(output, tuple) else output
                new = h + chosen * adapter(h)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = module.register_forward_hook(change)
        alone = bare(tokens[None]).logits[0]
        handle.remove()
        real = batched[row][mask[row].bool()]
        assert torch.allclose(
            real, alone, atol=1e-6
        )  # RMSNorm computes in float32, whatever the model's dtype


@pytest.mark.parametrize("positions", EVERY_POSITIONS)
def test_beam_search(positions):
    "Beams share their prompt; a batch of two padded prompts gives what each gives alone."
    model = tiny().double()
    randomise(steer(model, SteeringConfig(positions=positions)), 1)
    prompts = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([11, 12, 13])]
    options = dict(num_beams=3, do_sample=False, max_new_tokens=5, eos_token_id=-1)
    padded = torch.stack(
        [torch.cat([torch.zeros(6 - len(p), dtype=torch.long), p]) for p in prompts]
    )
    together = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **options)[
        :, 6:
    ]
    alone = torch.cat([model.generate(input_ids=p[None], **options)[:, len(p) :] for p in prompts])
    assert torch.equal(together, alone)


def test_generating_with_a_prompt_that_is_partly_cached():
    "What is in the cache already counts as prompt."
    model = tiny().double()
    randomise(steer(model, SteeringConfig(positions="prompt")), 1)
    whole = model.generate(input_ids=INPUT[:1], do_sample=False, max_new_tokens=4, eos_token_id=-1)
    cache = model(INPUT[:1, :8], use_cache=True).past_key_values
    resumed = model.generate(
        input_ids=INPUT[:1],
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=-1,
    )
    assert torch.equal(whole, resumed)


def test_generate_is_forgotten_after_an_error():
    model = tiny()
    randomise(steer(model, SteeringConfig(positions="last")), 1)
    before = model(INPUT).logits
    with pytest.raises(IndexError):  # a token that does not exist
        model.generate(input_ids=torch.tensor([[500]]), max_new_tokens=2)
    assert torch.equal(model(INPUT).logits, before)


def test_compile_has_no_graph_break():
    "One compilation of a model with a plain steering, one with positions and one of some heads."
    model = tiny()
    randomise(steer(model))
    randomise(steer(model, positions="last", name="last"))
    randomise(steer(model, kind="jola", site="heads", heads=HEADS, name="heads"))
    expected = model(INPUT, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(INPUT, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-5)  # another order of sums


def test_autocast_and_half_precision():
    model = tiny().bfloat16()
    base = model(INPUT).logits
    steering = steer(model, SteeringConfig())
    assert torch.equal(model(INPUT).logits, base)
    assert {p.dtype for p in steering.parameters()} == {torch.float32}
    other = tiny()
    trained = randomise(steer(other, SteeringConfig()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = other(INPUT, labels=INPUT).loss
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in trained.parameters()
    )


def test_device_map_with_weights_on_disk(tmp_path):
    "One block's weights are on disk: its adapter is where the block computes."
    tiny().save_pretrained(tmp_path / "model")
    places = {
        name: "cpu"
        for name in (
            "model.embed_tokens",
            "model.layers.0",
            "model.layers.2",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
        )
    }
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    base = model(INPUT).logits
    steering = steer(model, SteeringConfig(positions="last", site="mlp"))
    assert torch.equal(model(INPUT).logits, base) and {
        p.device.type for p in steering.parameters()
    } == {"cpu"}
    randomise(steering)
    steered = model(INPUT).logits
    assert (steered != base).any(-1).tolist() == [[False] * 11 + [True]] * 2
    steering.save(tmp_path / "steering")
    steering.remove()
    assert torch.equal(model(INPUT).logits, base)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    load_steering(whole, tmp_path / "steering")
    assert torch.allclose(
        whole(INPUT).logits, steered, atol=1e-6
    )  # the same float32 arithmetic, by another road


def test_peft_does_not_adapt_the_adapters():
    from peft import LoraConfig, get_peft_model

    model = tiny()
    steering = randomise(steer(model, SteeringConfig()))
    expected = model(INPUT).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert not any("steering" in name for name, _ in adapted.named_modules() if "lora" in name)
    assert torch.equal(adapted(INPUT).logits, expected)
    for parameter in steering.parameters():  # PEFT freezes what it does not own
        parameter.requires_grad_(True)
    adapted(INPUT, labels=INPUT).loss.backward()
    assert all(p.grad is not None for p in steering.parameters())


def test_steering_a_peft_model_knows_the_prompt():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules="all-linear"))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    randomise(steer(adapted, SteeringConfig(positions="last"), freeze=False), 1)
    assert {
        name
        for name, p in adapted.named_parameters()
        if p.requires_grad and ".steering." not in name
    } == trainable
    bare = tiny()
    randomise(steer(bare, SteeringConfig(positions="last")), 1)
    assert torch.equal(
        adapted(input_ids=INPUT).logits, bare(INPUT).logits
    )  # a new LoRA changes nothing
    options = dict(input_ids=INPUT, do_sample=False, max_new_tokens=4, eos_token_id=-1)
    assert torch.equal(adapted.generate(**options), bare.generate(**options))


def test_a_layer_of_streams():
    "Hyper-connections carry four residual streams: positions still mean tokens."
    from steer_nb.testing.tiny_models import tiny_model

    for model_type in ("deepseek_v4", "gemma3n_text"):
        model = tiny_model(model_type)
        base = model(INPUT[:, :4]).logits
        randomise(steer(model, SteeringConfig(kind="vector", layers=[1], positions="last")), 1)
        changed = (model(INPUT[:, :4]).logits != base).any(-1)
        assert changed.tolist() == [[False, False, False, True]] * 2


def test_order_of_several_steerings():
    model = tiny()
    first = steer(model, SteeringConfig(kind="vector", layers=[2]), name="first")
    second = steer(model, SteeringConfig(kind="full", layers=[2]), name="second")
    v = torch.randn(32)
    first.adapters[Site(2, "block")].vector.data.copy_(v)
    second.adapters[Site(2, "block")].matrix.data.copy_(torch.eye(32))
    bare = tiny()
    handle = bare.model.layers[2].register_forward_hook(
        lambda module, args, output: 2 * (output + v)
    )
    assert torch.allclose(model(INPUT).logits, bare(INPUT).logits, atol=1e-5)
    handle.remove()
    assert list(steerings(model)) == ["first", "second"]
    first.remove()
    second.remove()
    assert torch.equal(model(INPUT).logits, bare(INPUT).logits)


def logits_of_saved(folder: str) -> None:
    "In another process: load a saved model and a saved steering, and print the logits."
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    load_steering(model, f"{folder}/steering")
    print(json.dumps(model(INPUT).logits.tolist()))


def test_others_can_read_what_is_saved(tmp_path):
    "As they can any new file: what the umask allows."
    from steer_nb.testing.tiny_models import tiny_model

    (tmp_path / "new").touch()
    steer(tiny_model("llama")).save(tmp_path / "steering")
    modes = {path.stat().st_mode for path in (tmp_path / "steering").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_saved_here_loaded_in_another_process(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    config = SteeringConfig(kind="nonlinear", positions="suffix:3", site="heads", rank=2)
    randomise(steer(model, config)).save(tmp_path / "steering")
    done = children.run(logits_of_saved, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == model(INPUT).logits.tolist()
    config_file = (tmp_path / "steering" / "steering_config.json").read_text()
    assert str(tmp_path) not in config_file


def test_a_failed_steer_leaves_no_trace():
    model = tiny()

    def state():
        return [
            (
                path,
                sorted(vars(m)),
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
                list(m._modules),
            )
            for path, m in model.named_modules()
        ]

    before = state()
    for config in (
        SteeringConfig(rank=33),
        SteeringConfig(layers=[0, 7]),
        SteeringConfig(site="heads", rank=9),
    ):
        with pytest.raises(ValueError):
            steer(model, config)
    assert state() == before and all(p.requires_grad for p in model.parameters())


def test_a_stale_batch_is_refused():
    model = tiny()
    steer(model, SteeringConfig(positions="last"))
    model(INPUT)
    with pytest.raises(SteeringError, match="whole model"):
        model.model(INPUT)


def test_prompt_ends_nests_and_ends():
    model = tiny()
    randomise(steer(model, SteeringConfig(positions="completion")), 1)
    base = model(INPUT).logits
    with prompt_ends(model, 4):
        outer = model(INPUT).logits
        with prompt_ends(model, torch.tensor([12, 12])):
            assert torch.equal(model(INPUT).logits, base)
        assert torch.equal(model(INPUT).logits, outer) and not torch.equal(outer, base)
    assert torch.equal(model(INPUT).logits, base)
    twin = copy.deepcopy(model)
    with prompt_ends(model, 4):
        assert torch.equal(twin(INPUT).logits, base)


def test_checkpointing_uses_the_masks_of_its_own_pass():
    "Sites inside a block are computed again in the backward pass, with the masks of its pass."
    early, late = INPUT.clone(), INPUT.clone()
    early[:, :2], late[:, :5] = -100, -100

    def gradients(checkpointing):
        model = tiny().train()
        steering = randomise(
            steer(model, SteeringConfig(kind="vector", site="mlp", positions="prompt"))
        )
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(INPUT, labels=early).loss
        with torch.no_grad():
            model(INPUT, labels=late)
        loss.backward()
        return model, torch.cat([p.grad for p in steering.parameters()])

    model, again = gradients(True)
    assert torch.allclose(gradients(False)[1], again, atol=1e-6)
    with pytest.raises(SteeringError, match="backward"):
        (model(INPUT, labels=early).loss + model(INPUT, labels=late).loss).backward()


def test_a_steering_cast_with_its_model_can_still_be_loaded(tmp_path):
    model = tiny()
    steering = randomise(steer(model, SteeringConfig()))
    model.to(torch.bfloat16)
    steering.save(tmp_path / "cast")
    load_steering(tiny(), tmp_path / "cast")


@pytest.mark.parametrize("model_type", ["xlnet", "gemma3n_text", "llama"])
def test_capture_keeps_columns_whatever_the_layout(model_type):
    from steer_nb.core.hooks import capture
    from steer_nb.testing.tiny_models import tiny_model

    model, site, ids = tiny_model(model_type), Site(0, "block"), INPUT[:, :6]
    axis = {"xlnet": 0, "gemma3n_text": 2}.get(model_type, 1)
    with torch.no_grad(), capture(model) as whole, capture(model, positions=-1) as last:
        model(input_ids=ids)
    assert torch.equal(last[site], whole[site].narrow(axis, 5, 1))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3] = True
    with torch.no_grad(), capture(model, positions=mask) as one:
        model(input_ids=ids)
    token = {"xlnet": lambda h: h[3, 1], "gemma3n_text": lambda h: h[:, 1, 3]}.get(
        model_type, lambda h: h[1, 3]
    )(whole[site])
    assert torch.equal(one[site][0], token)


@pytest.mark.parametrize("site", ["mlp", "heads"])
def test_loreft_is_saved_and_loaded(tmp_path, site):
    config = SteeringConfig(kind="loreft", site=site, rank=3, positions="suffix:3", bias=True)
    model = tiny()
    base = model(input_ids=INPUT).logits
    steering = steer(model, config)
    assert torch.equal(model(input_ids=INPUT).logits, base) and "loreft rank 3" in repr(steering)
    randomise(steering).save(tmp_path / "steering")
    steered = model(input_ids=INPUT).logits
    assert (steered - base).abs().max() > 1e-3
    other = tiny()
    loaded = load_steering(other, tmp_path / "steering")
    assert loaded.config == config and torch.equal(other(input_ids=INPUT).logits, steered)
    assert torch.equal(copy.deepcopy(other)(input_ids=INPUT).logits, steered)
    loaded.remove()
    assert torch.equal(other(input_ids=INPUT).logits, base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_loreft_changes_nothing_in_any_precision(dtype):
    model = tiny().to(dtype)
    base = model(input_ids=INPUT).logits
    steer(model, SteeringConfig(kind="loreft", rank=3))
    assert torch.equal(model(input_ids=INPUT).logits, base)


CHOSEN = {0: (1,), 2: (0, 3)}  # heads by layer, of a model with three layers of four heads
HEADS = [(2, 3), (0, 1), (2, 0)]


@pytest.mark.parametrize("positions", ["all", "suffix:3"])
@pytest.mark.parametrize("kind", KINDS)
def test_some_heads_equal_a_hook_by_hand(kind, positions):
    "Each chosen head is shifted by its row of the adapter; the others are bit-identical."
    model, bare = (
        tiny(num_key_value_heads=2).double(),
        tiny(num_key_value_heads=2).double(),
    )  # four heads share two of keys and values
    base = model(INPUT).logits
    steering = steer(
        model, SteeringConfig(kind=kind, site="heads", heads=HEADS, rank=2, positions=positions)
    )
    for training in (True, False):
        assert torch.equal(model.train(training)(INPUT).logits, base)
    randomise(steering)
    steering.strength = 0.5
    columns = expected_columns(positions, 12, 12)
    for layer, heads in CHOSEN.items():
        adapter = steering.adapters[Site(layer, "heads")]
        assert adapter.shape == (len(heads), 8)

        def change(module, args, adapter=adapter, heads=heads):
            new, shift = (
                args[0].clone(),
                adapter(args[0].unflatten(-1, (4, 8))[..., list(heads), :]),
            )
            for row, head in enumerate(heads):
                for column in columns:
                    new[:, column, 8 * head : 8 * head + 8] += 0.5 * shift[:, column, row]
            return (new,)

        bare.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(change)
    with torch.no_grad(), capture(model, "heads", layers=[0]) as steered:
        logits = model(INPUT).logits
    assert (
        torch.allclose(logits, bare(INPUT).logits, atol=1e-6) and (logits - base).abs().max() > 1e-3
    )  # RMSNorm computes in float32
    with torch.no_grad(), steering.disabled(), capture(model, "heads", layers=[0]) as plain:
        model(INPUT)
    moved = (steered[Site(0, "heads")] != plain[Site(0, "heads")]).any(-1).any(0)
    assert moved.tolist() == [[False, column in columns, False, False] for column in range(12)]


@pytest.mark.parametrize("kind", ["direft", "scale", "jola", "loreft"])
def test_heads_in_half_precision(kind):
    model = tiny().bfloat16()
    base = model(INPUT).logits
    steering = steer(model, SteeringConfig(kind=kind, site="heads", heads=HEADS, rank=2))
    assert torch.equal(model(INPUT).logits, base) and {p.dtype for p in steering.parameters()} == {
        torch.float32
    }
    model(INPUT, labels=INPUT).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in steering.parameters())
    every = tiny().bfloat16()
    whole = randomise(steer(every, SteeringConfig(kind=kind, site="heads", rank=2)))
    model = tiny().bfloat16()
    same = steer(
        model,
        SteeringConfig(
            kind=kind,
            site="heads",
            rank=2,
            heads=[(layer, head) for layer in range(3) for head in range(4)],
        ),
    )
    for mine, other in zip(same.parameters(), whole.parameters(), strict=True):
        mine.data.copy_(other)
    assert torch.equal(
        model(INPUT).logits, every(INPUT).logits
    )  # all heads by name are all heads, to the bit


@pytest.mark.parametrize("kind", ["linear", "jola"])
@pytest.mark.parametrize("positions", ["all", "prompt"])
def test_heads_under_gradient_checkpointing(kind, positions):
    "The blocks are computed again with the same masks, and, in JoLA, the same gates."
    labels = INPUT.clone()
    labels[:, :5] = -100

    def gradients(checkpointing):
        model = tiny().train()
        steering = randomise(
            steer(
                model,
                SteeringConfig(kind=kind, site="heads", rank=2, heads=HEADS, positions=positions),
            )
        )
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(INPUT, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in steering.parameters()])

    plain = gradients(False)
    assert plain.abs().sum() > 0 and torch.allclose(plain, gradients(True), atol=1e-7)


@pytest.mark.parametrize("heads", [None, HEADS])
@pytest.mark.parametrize("kind", ["direft", "scale", "jola"])
def test_new_kinds_and_heads_are_saved_and_loaded(tmp_path, kind, heads):
    config = SteeringConfig(kind=kind, site="heads", rank=3, heads=heads)
    model = tiny()
    base = model(INPUT).logits
    steering = randomise(steer(model, config))
    assert ("(3 heads)" in repr(steering)) == (heads is not None) and (
        "direft rank 3" in repr(steering)
    ) == (kind == "direft")
    steering.save(tmp_path / "steering")
    steered = model(INPUT).logits
    assert (steered - base).abs().max() > 1e-4
    other = tiny()
    loaded = load_steering(other, tmp_path / "steering")
    assert (
        loaded.config == config
        and hash(loaded.config) == hash(config)
        and torch.equal(other(INPUT).logits, steered)
    )
    assert torch.equal(copy.deepcopy(other)(INPUT).logits, steered) and torch.equal(
        pickle.loads(pickle.dumps(other))(INPUT).logits, steered
    )
    loaded.remove()
    assert torch.equal(other(INPUT).logits, base)


@pytest.mark.parametrize(
    "schema, lacking",
    [(1, ("init", "heads", "skip")), (2, ("heads", "skip")), (3, ("skip",)), (4, ("skip",))],
)
def test_older_schemas_are_read(tmp_path, schema, lacking):
    steering = randomise(steer(tiny(), SteeringConfig(site="heads", rank=2)))
    steering.save(tmp_path)
    path = tmp_path / "steering_config.json"
    content = json.loads(path.read_text())
    assert content["schema"] == 5
    content["schema"] = schema
    path.write_text(json.dumps(content))
    with pytest.raises(
        SteeringError, match="unknown field"
    ):  # a field that its schema did not have
        load_steering(tiny(), tmp_path)
    for field in lacking:
        del content["steerings"]["default"][field]
    for field in ("vocabulary", "note") if schema < 4 else ():
        del content["base"][field]
    path.write_text(json.dumps(content))
    loaded = load_steering(tiny(), tmp_path)
    assert loaded.config == steering.config and torch.equal(
        loaded.model(INPUT).logits, steering.model(INPUT).logits
    )
    content["schema"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(SteeringError, match="lacks the field"):
        load_steering(tiny(), tmp_path)


@pytest.mark.parametrize(
    "heads", ["all", [[0, 1], [0, 1]], [[0, 9]], [[0, None]], [[2, 3, 1]], {"0": 1}]
)
def test_damaged_heads_are_refused(tmp_path, heads):
    steer(tiny(), SteeringConfig(kind="vector", site="heads", heads=[(0, 1)])).save(tmp_path)
    path = tmp_path / "steering_config.json"
    content = json.loads(path.read_text())
    content["steerings"]["default"]["heads"] = heads
    path.write_text(json.dumps(content))
    model = tiny()
    with pytest.raises(
        SteeringError,
        match=r"^(heads are repeated|heads is a list|a head is a|head 9: layer 0 has 4)",
    ):
        load_steering(model, tmp_path)
    assert not steerings(model)


def test_heads_that_the_model_lacks():
    model = tiny()
    with pytest.raises(SteeringError, match="layer 1 has 4 heads, 0 to 3"):
        steer(model, SteeringConfig(site="heads", rank=2, heads=[(0, 0), (1, 4)]))
    with pytest.raises(SiteError, match="layer 3"):
        steer(model, SteeringConfig(site="heads", rank=2, heads=[(3, 0)]))
    assert not steerings(model)


def test_heads_that_start_from_the_gradient():
    "The chosen heads read what they would read among all of them."
    from steer_nb.theory.site_scores import site_scores

    model = tiny()
    scores = site_scores(model, [{"input_ids": INPUT, "labels": INPUT}], sites=("heads",), rank=2)
    whole = steer(tiny(), SteeringConfig(site="heads", rank=2, init="gradient"), scores=scores)
    some = steer(
        model, SteeringConfig(site="heads", rank=2, init="gradient", heads=HEADS), scores=scores
    )
    assert list(some.adapters) == [Site(layer, "heads") for layer in CHOSEN]
    for site, adapter in some.adapters.items():
        assert torch.equal(adapter.down, whole.adapters[site].down[list(CHOSEN[site.layer])])


@pytest.mark.parametrize("heads", [None, [(0, 1), (1, 3)]])
def test_heads_steered_after_peft_reach_the_lora(heads):
    "The LoRA of the output projection reads the steered heads, as if it were merged."
    from peft import LoraConfig, get_peft_model

    from steer_nb.testing.tiny_models import tiny_model

    adapted = get_peft_model(
        tiny_model("llama").double(),
        LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"]),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    merged = copy.deepcopy(adapted).merge_and_unload()
    base = adapted(input_ids=INPUT).logits
    assert torch.allclose(merged(INPUT).logits, base, atol=1e-6)  # RMSNorm computes in float32
    steering = randomise(
        steer(adapted, SteeringConfig(kind="linear", site="heads", rank=2, heads=heads))
    )

    def shift(site):
        chosen = (
            list(range(4))
            if heads is None
            else [head for layer, head in heads if layer == site.layer]
        )

        def change(h):
            new = h.clone()
            new[..., chosen, :] += steering.adapters[site](h[..., chosen, :])
            return new

        return change

    with edit(merged, {site: shift(site) for site in steering.adapters}):
        expected = merged(INPUT).logits
    steered = adapted(input_ids=INPUT).logits
    assert torch.allclose(steered, expected, atol=1e-6) and (steered - base).abs().max() > 1e-2
    with steering.disabled(), edit(adapted, {site: shift(site) for site in steering.adapters}):
        assert torch.allclose(adapted(input_ids=INPUT).logits, expected, atol=1e-6)
    # with hooks inside the LoRA layer, only the base weight reads the shift: other logits
    handles = []
    for layer, block in enumerate(adapted.get_base_model().model.layers):

        def base_only(module, args, change=None):
            return (change(args[0].unflatten(-1, (4, -1))).flatten(-2),)

        hook = functools.partial(base_only, change=shift(Site(layer, "heads")))
        projection = block.self_attn.o_proj.base_layer
        handles.append(projection.register_forward_pre_hook(hook))
    with steering.disabled():
        assert (adapted(input_ids=INPUT).logits - expected).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    steering.remove()
    assert torch.equal(adapted(input_ids=INPUT).logits, base)


def test_options_as_keywords_and_negative_layers(tmp_path):
    model = tiny()
    steering = steer(model, kind="vector", layers=[-1, np.int64(0)], rank=np.int64(4))
    assert steering.config == SteeringConfig(kind="vector", layers=[0, 2], rank=4)
    assert list(steering.adapters) == [Site(0, "block"), Site(2, "block")]
    randomise(steering).save(tmp_path)
    stored = json.loads((tmp_path / "steering_config.json").read_text())
    assert stored["steerings"]["default"]["layers"] == [0, 2]
    with torch.no_grad(), capture(model, layers=[-1]) as acts:
        expected = model(INPUT).logits
    assert list(acts) == [Site(2, "block")]
    steering.remove()
    vectors = {
        Site(layer, "block"): p for layer, p in zip((0, -1), load_vectors(tmp_path), strict=True)
    }
    with torch.no_grad(), edit(model, {s: lambda h, v=v: h + v for s, v in vectors.items()}):
        assert torch.equal(model(INPUT).logits, expected)
    heads = steer(tiny(), site="heads", rank=2, heads=[(-1, 3), (0, 1)])
    assert heads.config.heads == ((0, 1), (2, 3))


def load_vectors(folder):
    return [a.vector.data for a in load_steering(tiny(), folder).adapters.values()]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer=[1]), "did you mean 'layers'"),
        (dict(config=SteeringConfig(), rank=4), "pass one of the two"),
        (dict(config="vector"), "config is a SteeringConfig"),
        (dict(layers=[-4]), "layers 0 to 2"),
        (dict(layers=[-1, 2]), "layers are repeated: 2"),
        (dict(layers=[True]), "layer is True"),
        (dict(rank=10**400), "rank 1000"),
    ],
)
def test_wrong_options_are_errors_of_ours(options, message):
    model = tiny()
    with pytest.raises(SteerError, match=message):
        steer(model, **options)
    assert not steerings(model)


def test_a_removed_steering_has_a_repr():
    steering = steer(tiny())
    steering.remove()
    assert repr(steering) == "Steering 'default', removed from the model"
    for use in (lambda: steering.num_parameters, lambda: steering.strength, steering.remove):
        with pytest.raises(SteeringError, match="was removed"):
            use()


def test_a_negative_layer_in_a_file_is_refused(tmp_path):
    steer(tiny(), kind="vector", layers=[2]).save(tmp_path)
    path = tmp_path / "steering_config.json"
    content = json.loads(path.read_text())
    content["steerings"]["default"]["layers"] = [-1]
    path.write_text(json.dumps(content))
    with pytest.raises(SteeringError, match="negative layer"):
        load_steering(tiny(), tmp_path)


def test_skipped_layers(tmp_path):
    "Every layer that has the site but those: saved, loaded, and counted from either end."
    steering = steer(tiny(), kind="vector", skip=(0, -1))
    assert [site.layer for site in steering.adapters] == [1] and steering.config.skip == (0, 2)
    steering.save(tmp_path)
    assert load_steering(tiny(), tmp_path).config == steering.config
    for wrong, message in (
        (dict(skip=(0, 1, 2)), "every layer"),
        (dict(skip=(7,)), "layer 7"),
        (dict(skip=(0,), layers=[1]), "or skip"),
        (dict(skip="0"), "skip"),
    ):
        with pytest.raises(SteerError, match=message):
            steer(tiny(), kind="vector", **wrong)
