"""Windows as tensors, and the loss on them."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from evals.training.network import Network
from evals.training.recipe import Recipe
from evals.training.windows import ANSWER, LANGUAGE, Window, Windows

VEILED_UP_TO = 512  # tokens; longer windows go to the fused kernel, which takes no mask

UNIT = 512  # places whose next token is learned come in multiples of this


class Batch(NamedTuple):
    """Windows of one length, and the places whose next token is learned.

    Args:
        answers: of answer tokens, flat, as places of the token before.
        language: the same of a sample of the other tokens.
        hidden: what a query may not see, for short windows.
    """

    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    hidden: Bool[Tensor, "B T T"] | None
    answers: Int[Tensor, " A"]
    language: Int[Tensor, " L"]


class Losses(NamedTuple):
    """Of a batch: what is minimised, its parts, and the share of answer tokens that are right."""

    total: Tensor
    answers: Tensor
    language: Tensor
    right: Tensor


def draw_batch(
    recipe: Recipe, windows: Windows, progress: float, rng: np.random.Generator
) -> Batch:
    """The batch of a step; depends on nothing but its arguments."""
    phase = recipe.phase(progress)
    lengths, weights = list(phase.lengths), np.array(list(phase.lengths.values()))
    tokens = lengths[rng.choice(len(lengths), p=weights / weights.sum())]
    drawn = [windows.draw(phase.mix, tokens, rng) for _ in range(max(1, recipe.tokens // tokens))]
    return collate(drawn, recipe.language, rng)


def collate(windows: list[Window], language: float, rng: np.random.Generator) -> Batch:
    """Windows of one length as a batch; `language` of their language tokens are learned."""
    ids, kinds, positions, veiled, asking = (np.stack(part) for part in zip(*windows, strict=True))
    kinds[:, 0] = 0  # nothing comes before it
    before = np.roll(kinds, -1, axis=1).reshape(-1)
    answers, other = np.flatnonzero(before == ANSWER), np.flatnonzero(before == LANGUAGE)
    # whole units of places: every new shape costs torch's CPU kernels memory that stays
    wanted = -(-(len(answers) + int(len(other) * language)) // UNIT) * UNIT - len(answers)
    other = rng.choice(other, min(wanted, len(other)), replace=False)
    hidden = veiled[:, None, :] & asking[:, :, None]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(hidden) if ids.shape[1] <= VEILED_UP_TO else None,
        torch.from_numpy(answers),
        torch.from_numpy(other),
    )


def losses(network: Network, states: Tensor, batch: Batch, language_weight: float) -> Losses:
    """Cross-entropy at the batch's places, of the states that the network gave for it."""
    places = torch.cat([batch.answers, batch.language]).to(states.device)
    wanted = batch.ids.roll(-1, 1).reshape(-1).to(states.device)[places]
    logits = network.lm_head(states.reshape(-1, states.shape[-1])[places]).float()
    each = F.cross_entropy(logits, wanted, reduction="none")
    answers, language = each.split([len(batch.answers), len(batch.language)])
    right = (logits[: len(answers)].argmax(-1) == wanted[: len(answers)]).float()
    of_answers = answers.sum() / max(1, len(answers))
    of_language = language.sum() / max(1, len(language))
    total = of_answers + language_weight * of_language
    return Losses(total, of_answers.detach(), of_language.detach(), right.mean())
