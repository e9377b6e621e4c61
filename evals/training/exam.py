"""Is it right yet: whole answers to prompts of one question, in text that was held out."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from evals.training.corpus import Corpus
from evals.training.network import Network
from evals.training.tasks import TASKS
from evals.training.windows import ANSWER, Mix, Windows

PLAIN = Mix({}, copies=0.0, lines=0.0, noise=0.0, gaps=0.0, intros=1.0, questions=1.0)


@dataclass(frozen=True, slots=True)
class Exam:
    """Windows of one task each, in held-out text, without gaps, with whole questions.

    Args:
        corpus: its `held_out` part is used.
        tasks: their names.
        room: tokens of facts and questions in a window, at most; the rest is text.
    """

    corpus: Corpus
    tokenizer: Any
    tasks: tuple[str, ...] = tuple(TASKS)
    room: int = 400

    @torch.no_grad()
    def mark(self, network: Network, tokens: int, windows: int) -> dict[str, float]:
        """Share of answers of which every token is the likeliest, by task: by each that windows of
        so many tokens have room for.
        """
        held_out = replace(self.corpus, trained=self.corpus.held_out)
        source = Windows(held_out, self.tokenizer)
        network.eval()
        right = {task: self._right(network, source, task, tokens, windows) for task in self.tasks}
        network.train()
        return {task: float(np.mean(answers)) for task, answers in right.items() if answers}

    def _right(
        self, network: Network, source: Windows, task: str, tokens: int, windows: int
    ) -> list[bool]:
        """Of each answer."""
        mix = replace(PLAIN, tasks={task: 1.0}, density=min(0.9, self.room / tokens))
        device = network.inverse.device
        right: list[bool] = []
        for number in range(windows):
            window = source.draw(mix, tokens, np.random.default_rng([number, tokens]))
            ids, positions = (torch.from_numpy(part)[None].to(device) for part in window[:3:2])
            states = network(ids, positions)[0]
            answers = np.flatnonzero(window.kinds == ANSWER)
            likeliest = network.lm_head(states[answers - 1]).argmax(-1).cpu().numpy()
            found = likeliest == window.ids[answers]
            runs = np.split(found, np.flatnonzero(np.diff(answers) > 1) + 1)
            right += [bool(run.all()) for run in runs if run.size]
        return right
