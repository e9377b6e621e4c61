"""The training itself: steps, a log, checkpoints that go on as if nothing had happened."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from evals.training.batches import Losses, draw_batch, losses
from evals.training.muon import Muon
from evals.training.network import Network
from evals.training.recipe import Recipe
from evals.training.windows import Windows
from evals.training.wiring import wire

CLIP = 1.0


class Training:
    """A network on its way; `train` takes it to the end, `save` and `load` keep its state.

    Args:
        compiled: let torch.compile fuse the network (a minute for each window length).
    """

    def __init__(
        self,
        recipe: Recipe,
        windows: Windows,
        *,
        seed: int,
        device: str = "cpu",
        compiled: bool = False,
    ):
        self.recipe, self.windows, self.seed, self.device = recipe, windows, seed, device
        torch.manual_seed(seed)
        self.network = Network(recipe.shape)
        wire(self.network, torch.Generator().manual_seed(seed))
        self.network.to(device)
        self._forward = torch.compile(self.network, dynamic=False) if compiled else self.network
        inside = list(self.network.layers.parameters())
        matrices = [weight for weight in inside if weight.dim() == 2]
        others: list[Tensor] = [weight for weight in inside if weight.dim() != 2]
        head = [self.network.lm_head.weight]
        others += [self.network.embed_tokens.weight, self.network.norm.weight]
        self._muon = Muon(matrices, recipe.muon_rate)
        self._adam = torch.optim.AdamW(
            [{"params": others, "share": 1.0}, {"params": head, "share": 0.4}],
            lr=recipe.adam_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        self.step = self.tokens = 0
        self.seconds = 0.0

    def start_from(self, network: Network) -> None:
        """Begin with the weights of another network.

        Raises:
            ConfigError: it has another shape.
        """
        if network.shape != self.recipe.shape:
            raise ConfigError(
                f"no model of the recipe's shape: it has {network.shape}, not {self.recipe.shape}"
            )
        self.network.load_state_dict(network.state_dict())

    def train_step(self, progress: float) -> Losses:
        """One step at `progress` of the training; its data depend on seed and step alone."""
        rng = np.random.default_rng([self.seed, self.step])
        batch = draw_batch(self.recipe, self.windows, progress, rng)
        hidden = None if batch.hidden is None else batch.hidden.to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            states = self._forward(
                batch.ids.to(self.device), batch.positions.to(self.device), hidden
            )
            found = losses(self.network, states, batch, self.recipe.language_weight)
        found.total.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self._set_rates(self.recipe.rate(progress, self.step))
        for optimizer in (self._muon, self._adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel()
        return found

    def _set_rates(self, factor: float) -> None:
        for group in self._muon.param_groups:
            group["lr"] = self.recipe.muon_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.adam_rate * factor * group["share"]

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the one before."""
        state = {
            "network": self.network.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "seed": self.seed,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: there is none, or it is of another seed.
        """
        if not path.is_file():
            raise ConfigError(f"no checkpoint at {path}: train without --resume first")
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["seed"] != self.seed:
            raise ConfigError(f"{path} has seed {state['seed']}, not {self.seed}: set --seed")
        self.network.load_state_dict(state["network"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds = state["seconds"]


def train(
    training: Training,
    steps: int,
    *,
    every_s: float,
    report: Callable[[dict[str, Any]], None],
    keep: Callable[[], None],
) -> None:
    """Train up to step `steps`; every `every_s` seconds, and at the end, `report` and `keep`."""
    sums: list[Tensor] = []
    last = time.monotonic()
    while training.step < steps:
        before, progress = time.monotonic(), training.step / steps
        found = training.train_step(progress)
        sums.append(torch.stack([found.answers, found.language, found.right]).cpu())
        now = time.monotonic()
        training.seconds += now - before
        if now - last > every_s:
            report(_line(training, progress, sums))
            keep()
            last, sums = time.monotonic(), []
    if sums:
        report(_line(training, 1.0, sums))
        keep()


def _line(training: Training, progress: float, sums: list[Tensor]) -> dict[str, Any]:
    mean = torch.stack(sums).mean(0)
    answers, language, right = mean.tolist()
    return {
        "progress": round(progress, 4),
        "step": training.step,
        "tokens": training.tokens,
        "seconds": round(training.seconds, 1),
        "answer_loss": round(answers, 4),
        "language_loss": round(language, 4),
        "answer_tokens_right": round(right, 4),
    }


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Append to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
