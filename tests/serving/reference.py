"""What a request must give, computed without vLLM: transformers and `load_steering`, one text at a
time, in float32."""

from contextlib import contextmanager
from pathlib import Path

import torch

from steer_nb.core.loading import load_steering
from steer_nb.core.passes import prompt_ends

TOLERANCE = 1e-3  # of a log-probability: float32 in two orders of summation differs by about 1e-5
EFFECT = 0.05  # what a steering changes at least, for a test that would see it missing


class Reference:
    "A model, and the folders of steerings by name."

    def __init__(self, model, sources: dict[str, Path]):
        self.model, self.sources = model, sources

    @contextmanager
    def steered(self, name: str | None, strength: float):
        "The model with a steering on it; `strength` is a factor on the stored one."
        if name is None:
            yield
            return
        steering = load_steering(self.model, self.sources[name], name=f"own-{name}")
        steering.strength *= strength
        try:
            yield
        finally:
            steering.remove()

    @torch.no_grad()
    def log_probabilities(
        self,
        prompt: list[int],
        output: list[int],
        name: str | None = None,  # None: not steered
        strength: float = 1.0,  # of the request
    ) -> torch.Tensor:
        "Of each token of the text, from its second, given those before: (prompt + output − 1, V)."
        with self.steered(name, strength), prompt_ends(self.model, len(prompt)):
            logits = self.model(torch.tensor([prompt + output]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)

    def check(
        self,
        prompt: list[int],
        output: list[int],  # the tokens that the server chose
        log_probabilities: list[float],  # that it reported for them
        name: str | None = None,
        strength: float = 1.0,
        greedy: bool = True,
    ) -> None:
        """Raise `AssertionError` unless a server's answer is right.

        Each token's log-probability is within `TOLERANCE` of the reference's; if `greedy`, no other
        token is more likely by more than that. (A tie may go either way, so tokens are not compared
        with tokens that the reference would generate itself.)"""
        assert len(output) == len(log_probabilities) and output
        table = self.log_probabilities(prompt, output, name, strength)[len(prompt) - 1 :]
        own = table.gather(1, torch.tensor(output)[:, None])[:, 0]
        error = (own - torch.tensor(log_probabilities)).abs()
        said = f"steering {name}, strength {strength}, prompt of {len(prompt)}"
        assert error.max() < TOLERANCE, f"{said}: wrong by {error.max():.4f} at {error.argmax()}"
        if greedy:
            lost = table.max(1).values - own
            assert lost.max() < TOLERANCE, f"{said}: not greedy by {lost.max():.4f}"

    def effect(
        self, prompt: list[int], output: list[int], name: str, strength: float = 1.0
    ) -> float:
        "How much a steering changes the log-probabilities of an output, at most."
        rows = torch.tensor(output)[:, None]
        steered, plain = (
            self.log_probabilities(prompt, output, *own)[len(prompt) - 1 :].gather(1, rows)
            for own in ((name, strength), ())
        )
        return float((steered - plain).abs().max())
