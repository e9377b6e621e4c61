"""Initial weights with a meaning: heads that look back, and heads that find and copy.

Training starts from these instead of random weights alone, and changes all of them. They are what
lets so small a model learn to retrieve within minutes (induction heads, Olsson et al. 2022, put in
by hand rather than found). A model that began this way must say so.

The stream's first dimension is constant. Orthogonal subspaces of it hold

    code      of a token, a projection of its embedding
    before    the codes of the tokens one to four places before it, one subspace each
    context   what stood 4 to 7 places before it ("... for KEY is: 123", where a value begins), and,
              mixed differently, 7 to 10 places before it ("... for KEY mentioned in the provided
              text is 123", where the answer to RULER's question begins)
    linked    the codes 5 and 6 places before it ("X is the same as Y.", at Y and at the stop)
    found     what Y was said to be

and the heads

    layer 0   0-3 look back 1 to 4 places, and write `before`
    layer 1   0-1 look back 3 and 6 places, and write what `before` holds there: `context`
              2-3 look back 5 and 6 places, and write `linked`
    layer 2   0-1 find the value whose key is asked for, and copy it
              2   finds where the words before are the words up to here, and copies what followed
              3   at Y: finds the first token of Y's value, and writes `found`
    layer 3   0   at the stop after Y: finds the value's second token, and writes `found`
    layer 4   0-1 find the place whose `linked` is the X of a question, and copy `found`

"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from evals.training.network import Network, frequencies

CODE, SLOTS = 32, 4
ALSO = 2.0  # the weight of one token against that of eight
CONSTANT = 0.45  # of the constant dimension, relative to the others
# how sharp the wired heads are: such that they work before any training
PLACE = 34.0  # logit of the place that a head looks at
MATCH = 20.0  # of a perfect match
WRITE = 0.6  # size of what a head that looks back writes, against an embedding's
COPY = 1.5  # of what a head copies; half of it but for a layer's first head
FIRST_PAIR = 16  # RoPE's pairs from this one on turn slowly enough to match far away


def wire(network: Network, generator: torch.Generator) -> None:
    """Set embeddings and the heads of layers 0, 1, 2 and 4 as above; the rest stays random.

    Raises:
        ConfigError: the network has no room for these heads.
    """
    shape = network.shape
    if shape.width < 8 * CODE or shape.layers < 5 or (shape.heads, shape.kv_heads) != (4, 2):
        raise ConfigError(
            f"wiring needs width {8 * CODE}, 5 layers, 4 heads and 2 KV heads, got {shape}"
        )
    _Wiring(network, generator).apply()


@dataclass(frozen=True, slots=True)
class Look:
    """What a head that looks back takes from where, and where it puts it."""

    distance: int
    reads: Tensor
    writes: Tensor


@dataclass(frozen=True, slots=True)
class Find:
    """What a head that finds compares, and what it copies to where."""

    key: Tensor
    query: Tensor
    reads: Tensor
    writes: Tensor
    sharp: float = 1.0


class _Wiring:
    def __init__(self, network: Network, generator: torch.Generator):
        self.network, shape = network, network.shape
        self.shape, width = shape, shape.width
        self.basis = torch.zeros(width, width - 1)
        random = torch.randn(width - 1, width - 1, generator=generator)
        self.basis[1:] = torch.linalg.qr(random)[0]
        spaces = self.basis.split(CODE, dim=1)
        self.code, self.before = spaces[0], spaces[1 : 1 + SLOTS]
        self.context, self.found, self.linked = spaces[1 + SLOTS : 4 + SLOTS]
        *self.mixers, self.turn, self.other = (
            torch.linalg.qr(torch.randn(CODE, CODE, generator=generator))[0]
            for _ in range(SLOTS + 2)
        )
        self.follows = sum(b @ m for b, m in zip(self.before, self.mixers, strict=True))
        self.samples = torch.randint(3, shape.vocabulary, (4, 64), generator=generator)

    @torch.no_grad()
    def apply(self) -> None:
        self._embed()
        for head, slot in enumerate(self.before):
            self._look(0, head, Look(head + 1, self.code, slot))
        stated, asked = self.context @ self.turn, self.context @ self.other
        self._look(1, 0, Look(3, self.follows, stated))
        self._look(1, 1, Look(6, self.follows, asked))
        self._copy(stated, asked)
        self._resolve()

    def _copy(self, stated: Tensor, asked: Tensor) -> None:
        """Layer 2: what answers a question, and what followed the words up to here."""
        first, words = self.mixers[0], [self.code, *self.before]
        # a question repeats its key: what is wanted also follows the token that is here
        key, query = stated + ALSO * self.before[0] @ first, asked + ALSO * self.code @ first
        for head in (0, 1):
            self._find(2, head, Find(key, query, self.code, self.code))
        up_to = sum(w @ m for w, m in zip(words, self.mixers, strict=False))
        self._find(2, 2, Find(self.follows, up_to, self.code, self.code))

    def _resolve(self) -> None:
        """Layers 1 to 4: where "X is the same as Y." ends, note X and Y's value; read it for X.

        Y is three places before its value's first token, and four before the second, which is
        found at the stop after Y. X is five places before Y, and six before the stop.
        """
        for head, mixer in ((2, self.mixers[0]), (3, self.mixers[1])):
            slot = self.linked @ mixer.T[: self.linked.shape[1]]
            self._look(1, head, Look(head + 3, self.code, slot))
        third, fourth = self.mixers[2:]
        self._find(2, 3, Find(self.follows, self.code @ third, self.code, self.found, sharp=2.0))
        next_ = Find(self.before[3] @ fourth, self.before[0] @ fourth, self.code, self.found)
        self._find(3, 0, next_)
        subject = self.before[1] @ self.mixers[0] + self.before[2] @ self.mixers[1]
        for head in (0, 1):
            self._find(4, head, Find(self.linked, subject, self.found, self.code))

    def _states(self, layer: int) -> Tensor:
        """What the attention of `layer` reads, of random tokens: all sizes are set by it."""
        network, tokens = self.network, self.samples.shape[1]
        angles = torch.arange(tokens)[:, None] * frequencies(self.shape)
        x = network.embed_tokens(self.samples)
        for before in network.blocks()[:layer]:
            x = before(x, angles.cos(), angles.sin(), None)
        return network.blocks()[layer].input_layernorm(x)

    def _size(self, states: Tensor, reads: Tensor) -> float:
        return (states @ reads).norm(dim=-1).mean().item()

    def _embed(self) -> None:
        """Embeddings of equal size, their constant set, and nearly none of them in the slots."""
        weight, width = self.network.embed_tokens.weight, self.shape.width
        slots = torch.cat([*self.before, self.context, self.found, self.linked], dim=1)
        weight -= 0.85 * (weight @ slots) @ slots.T
        weight[:, 0] = 0
        weight *= width**0.5 / weight.norm(dim=1, keepdim=True)
        weight[:, 0] = width**0.5 * CONSTANT
        self.network.lm_head.weight.copy_(0.05 * weight)
        self.network.lm_head.weight[:, 0] = 0

    def _look(self, layer: int, head: int, look: Look) -> None:
        """A head attends to what stands at a distance, and copies a subspace of it.

        Query and key are constant vectors whose product is largest at that distance, after both
        were rotated.
        """
        attention, states = self.network.blocks()[layer].self_attn, self._states(layer)
        dim, half = self.shape.head_dim, self.shape.head_dim // 2
        constant = states[..., 0].mean().item()
        weights = torch.zeros(half)
        weights[:9] = torch.linspace(1.0, 0.5, 9)  # pairs that turn by 1 to 0.01 a token
        weights *= PLACE * dim**0.5 / weights.sum() / constant**2
        phase = look.distance * frequencies(self.shape)
        group, first = divmod(head, self.shape.heads // self.shape.kv_heads)
        if first == 0:
            rows = slice(group * dim, (group + 1) * dim)
            attention.k_proj.weight[rows] *= 0.05
            attention.k_proj.weight[rows, 0] = torch.cat([torch.ones(half), torch.zeros(half)])
            attention.v_proj.weight[group * dim : group * dim + CODE] = look.reads.T
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows] *= 0.05
        turned = [weights * torch.cos(phase), -weights * torch.sin(phase)]
        attention.q_proj.weight[rows, 0] = torch.cat(turned)
        size, width = self._size(states, look.reads), look.writes.shape[1]
        gain = WRITE * self.shape.width**0.5 / size
        attention.o_proj.weight[:, rows] *= 0.3
        attention.o_proj.weight[:, head * dim : head * dim + width] = gain * look.writes

    def _find(self, layer: int, head: int, find: Find) -> None:
        """A head attends to where its group's key is its query, and copies what is there."""
        attention, states = self.network.blocks()[layer].self_attn, self._states(layer)
        dim, per_group = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        group, size = head // per_group, self._size(states, find.reads)
        if head % per_group == 0:
            self._match(attention.k_proj.weight, group, states, find.key)
            attention.v_proj.weight[group * dim : group * dim + CODE] = find.reads.T
        self._match(attention.q_proj.weight, head, states, find.query)
        attention.q_proj.weight[head * dim : (head + 1) * dim] *= find.sharp
        gain = COPY * self.shape.width**0.5 / max(size, 1.0)
        attention.o_proj.weight[:, head * dim : head * dim + CODE] = gain * find.writes

    def _match(self, weight: Tensor, head: int, states: Tensor, reads: Tensor) -> None:
        """Rows of a head's slow pairs read `reads`; its other rows nearly nothing."""
        dim, half = self.shape.head_dim, self.shape.head_dim // 2
        slow = torch.arange(FIRST_PAIR, half)
        rows = torch.cat([slow, slow + half])[: reads.shape[1]]
        size = self._size(states, reads[:, : len(rows)])
        gain = (MATCH * dim**0.5) ** 0.5 / size
        weight[head * dim : (head + 1) * dim] *= 0.1
        weight[head * dim + rows] = gain * reads[:, : len(rows)].T
        weight[head * dim : (head + 1) * dim, 0] = 0
