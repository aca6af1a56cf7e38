"""What a request must give, computed without vLLM: transformers and `load_steering`, one text at a
time, in float32."""

from pathlib import Path

import torch

from steer_nb.core.loading import load_steering
from steer_nb.core.passes import prompt_ends

TOLERANCE = 1e-3  # of a log-probability: float32 in two orders of summation differs by about 1e-5
EFFECT = 0.05  # what a steering changes at least, for a test that would see it missing


class Reference:
    "A model with every steering of a server, of which one at a time acts."

    def __init__(self, model, sources: dict[str, Path]):
        self.model, self.steerings = model, {}
        for name, source in sources.items():
            self.add(name, source)

    def add(self, name: str, source: Path) -> None:
        "Load a steering; one of the same name is removed first."
        if name in self.steerings:
            self.steerings.pop(name)[0].remove()
        steering = load_steering(self.model, source, name=name)
        steering.enabled = False
        self.steerings[name] = steering, steering.strength

    @torch.no_grad()
    def log_probabilities(
        self,
        prompt: list[int],
        output: list[int],
        name: str | None = None,  # None: not steered
        strength: float = 1.0,  # of the request: a factor on the stored strength
    ) -> torch.Tensor:
        "Of every token of the vocabulary, before each token of the output: (output, vocabulary)."
        steering, stored = self.steerings.get(name, (None, 0.0)) if name else (None, 0.0)
        ids = torch.tensor([prompt + output])
        try:
            if steering is not None:
                steering.enabled, steering.strength = True, stored * strength
            elif name:
                raise KeyError(name)
            with prompt_ends(self.model, len(prompt)):
                logits = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        finally:
            if steering is not None:
                steering.enabled, steering.strength = False, stored
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
        table = self.log_probabilities(prompt, output, name, strength)
        own = table.gather(1, torch.tensor(output)[:, None])[:, 0]
        error = (own - torch.tensor(log_probabilities)).abs()
        said = f"steering {name}, strength {strength}, prompt of {len(prompt)}"
        assert error.max() < TOLERANCE, f"{said}: wrong by {error.max():.4f} at {error.argmax()}"
        if greedy:
            lost = table.max(1).values - own
            assert lost.max() < TOLERANCE, f"{said}: not greedy by {lost.max():.4f}"

    def effect(self, prompt, output, name, strength=1.0) -> float:
        "How much a steering changes the log-probabilities of an output, at most."
        steered = self.log_probabilities(prompt, output, name, strength)
        plain = self.log_probabilities(prompt, output)
        rows = torch.tensor(output)[:, None]
        return float((steered.gather(1, rows) - plain.gather(1, rows)).abs().max())
