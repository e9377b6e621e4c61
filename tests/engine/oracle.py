"""What `transformers` answers: the independent oracle of the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-4


@torch.no_grad()
def logits(module: PreTrainedModel, tokens: Sequence[int] | Tensor) -> Tensor:
    """Logits after every token, by the model's own forward."""
    ids = torch.as_tensor(list(tokens), device=module.device)[None]
    return module(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def generate(module: PreTrainedModel, prompts: Sequence[Tensor], count: int) -> list[list[int]]:
    """`generate()` for a ragged batch, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    out = module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[:, longest:].tolist()


def assert_same_answer(
    module: PreTrainedModel,
    prompt: Tensor,
    ours: Sequence[int],
    theirs: Sequence[int],
    tie: float = TOLERANCE,
) -> None:
    """Equal tokens; or at the first difference a tie: the oracle's two logits are that close."""
    assert len(ours) == len(theirs)
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if first is None:
        return
    row = logits(module, [*prompt.tolist(), *theirs[:first]])[-1]
    top = row.topk(2)
    assert set(top.indices.tolist()) == {ours[first], theirs[first]}, f"token {first} differs"
    assert float(top.values[0] - top.values[1]) <= tie, f"token {first}: no tie"
