"""Vector quantization for a batch: one code a token, and keys that are kept where it misleads."""

import torch
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

from retrieval.codebook import Codebook
from retrieval.device.codebook import DeviceBooks
from retrieval.device.coded import Coded
from retrieval.device.codes import put_codes
from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.score_lookup import score_lookup
from retrieval.kernels.scores import Scores
from retrieval.vq import VQIndex


class DeviceVQ(Coded):
    """A `DeviceIndex` of `VQIndex`.

    A kept key is a centroid of its token alone: its code is C plus its number among the kept ones,
    and the table's entry there q · k. So its score is exact, and the softmax's statistics as well.

        codes [B, Hk, T, 1]   of a byte if there are 256 entries at most, else of 16 bits, unsigned
        kept [B, Hk, S, D]    keys of badly coded tokens; some slots have fewer

    Args:
        slots: B.
        capacity: of a slot, in tokens.
        dtype: of keys.
        centroids: of a codebook at most.
        exact_tokens: whose keys are kept, of each KV head at most: the guard's `tokens`.
    Raises:
        ValueError: for more centroids and kept keys than 16 bits can tell apart.
    """

    kind = VQIndex

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        key_space: KeySpace = "windowed",
        centroids: int = 1024,
        exact_tokens: int = 64,
    ) -> None:
        entries = centroids + exact_tokens
        if not 1 <= centroids <= entries <= 1 << 16:
            raise ValueError(
                f"centroids and exact tokens must be 1 .. 65536 together, "
                f"got {centroids} and {exact_tokens}"
            )
        super().__init__(key_space, capacity)
        self._books = DeviceBooks(slots, num_kv_heads, head_dim, 1, centroids, device)
        heads = (slots, num_kv_heads)
        code = torch.uint8 if entries <= 256 else torch.int16
        self._codes = torch.zeros((*heads, capacity, 1), dtype=code, device=device)
        self._kept = torch.zeros((*heads, exact_tokens, head_dim), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Of all tensors, whether slots are free or not."""
        return self._books.nbytes + self._codes.nbytes + self._kept.nbytes

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy the finalized index of one request into a slot.

        Raises:
            ValueError: if it is of another kind, shape or dtype, not final, or too large.
        """
        state = self._accepted(index)
        tokens, keys = state["exact"], state["exact_keys"]
        most = self._kept.shape[2]
        if tokens.shape[1] > most or keys.dtype != self._kept.dtype:
            raise ValueError(
                f"need at most {most} kept keys in {self._kept.dtype}, got {tokens.shape[1]} in "
                f"{keys.dtype}: lower the guard's tokens, or raise exact_tokens"
            )
        self._books.adopt(slot, Codebook.from_state(state))
        codes = state["codes"].long() & 0xFFFF
        own = torch.arange(tokens.shape[1], device=codes.device) + self._books.half.shape[3]
        codes = codes.scatter(1, tokens, own.expand_as(tokens))
        self._codes[slot, :, : codes.shape[1], 0] = self._narrow(codes)
        self._kept[slot] = 0
        self._kept[slot, :, : tokens.shape[1]] = keys

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """A key of each slot, of the token number `positions[b]`; nothing where it is negative."""
        put_codes(self._codes, self._narrow(self._books.encode(keys)), positions)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """What `score` of each request's own index says."""
        q = query.float()
        grouped = q.unflatten(1, (self._kept.shape[1], -1))
        exact = (grouped @ self._kept.float().mT).flatten(1, 2)  # [B, Hq, S]
        table = torch.cat([self._books.table(q), exact[:, :, None]], -1)
        return score_lookup(self._codes, table, lengths, scale)

    def _narrow(self, codes: Int64[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """As they are kept: of 16 bits, whatever their sign says."""
        if self._codes.dtype == torch.int16:
            codes = ((codes + 0x8000) & 0xFFFF) - 0x8000
        return codes.to(self._codes.dtype)
