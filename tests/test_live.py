"What the playground computes, on models of other architectures."

import pytest
import torch
from tokenizers import SentencePieceBPETokenizer
from transformers import PreTrainedTokenizerFast

from steer_nb import steer, steerings, tiny_model
from steer_nb.experiments.testbed import symbol_tokenizer
from steer_nb.visual.live import LiveError, LiveModel, State

# several residual streams, and a stream of (seq, batch, hidden)
STREAMS = {"deepseek_v4", "gemma3n_text", "xlnet"}
PROMPT = "[MAX 3 5 2 ] ="


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", *sorted(STREAMS)])
def test_a_state_of_any_architecture(kind):
    tokenizer = symbol_tokenizer()
    model = tiny_model(kind).eval()
    for parameter in steer(model, kind="vector", name="one").parameters():
        torch.nn.init.normal_(parameter)
    steering = steerings(model)["one"]
    live = LiveModel(model, tokenizer, {"one": steering})
    ids = live.encode(PROMPT)
    steering.strength = 0.5
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0, -1].softmax(-1)
        text = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    found = live.next_tokens(State(PROMPT, {"one": 0.5}), count=len(wanted))
    assert sorted(found["steered"]) == pytest.approx(sorted(wanted.tolist()), abs=1e-5)
    pieces = [item["steered"] for item in live.generate(State(PROMPT, {"one": 0.5}), 6)]
    if kind != "xlnet":  # its `generate` gives the model a token and a mask of its own
        assert "".join(pieces).strip() == tokenizer.decode(text, skip_special_tokens=True).strip()

    change = torch.tensor(live.change_map(State(PROMPT, {"one": 0.5})))
    assert change.shape == (live.n_layers, ids.shape[1]) and (change > 0).all()
    assert torch.tensor(live.change_map(State(PROMPT))).max() == 0
    if kind in STREAMS:
        with pytest.raises(LiveError, match="one residual stream"):
            live.lens_map(State(PROMPT))
    else:
        lens = live.lens_map(State(PROMPT, {"one": 0.5}))
        assert lens["probabilities"][-1][-1] == pytest.approx(wanted.max().item(), abs=1e-5)
    assert steering.strength == 0.5 and not steering.removed


def test_a_removed_steering_is_an_error():
    model = tiny_model("llama")
    live = LiveModel(model, symbol_tokenizer(), {"one": steer(model, name="one")})
    steerings(model)["one"].remove()
    with pytest.raises(LiveError, match="removed"):
        live.next_tokens(State(PROMPT))


def test_a_tokenizer_whose_decoder_drops_the_first_space():
    "SentencePiece tokenizers do: token by token, a text would lose its spaces."
    bpe, prompt = SentencePieceBPETokenizer(), "the food in a small town"
    bpe.train_from_iterator([f"{prompt} was good"] * 3, vocab_size=64, special_tokens=["<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, unk_token="<unk>")
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    live = LiveModel(model, tokenizer, {"one": steer(model, name="one")})
    ids = live.encode(prompt)
    assert "".join(live.tokens(prompt)) == f" {prompt}"
    assert "".join(tokenizer.decode(ids[0, k]) for k in range(ids.shape[1])) != prompt

    text = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    pieces = [item["unsteered"] for item in live.generate(State(prompt), 8)]
    assert prompt + "".join(pieces) == tokenizer.decode(text) and " " in "".join(pieces)
