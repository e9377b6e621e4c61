"""What the engine does for a prompt of segments: find, complete, decide, blend, report."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from engine.blend.blend import affordable, blend_layers
from engine.blend.chunks import Chunks, Computed
from engine.blend.policies import Budget, Policy
from engine.blend.reorder import best_order
from engine.blend.repair import BlendConfig, BlendReport
from engine.blend.reuse import EXACT, FRESH, Reuse, plan
from engine.blend.segments import Segments, Tokens, digest
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.loading import BlocksLost, Loader
from engine.memory import Memory
from engine.model.pieces import Model, kv_depth
from engine.perfmodel import Decision, PerfModel, Work
from engine.plain import Plain
from engine.recorder import Recorder
from engine.request import Running
from engine.slices import Slices, Watch, drained, finished
from engine.sparse.cache import SparseCache
from engine.staging import Placed
from kvstore.block import BlockKey, Kind, Precision
from kvstore.identity import ModelIdentity
from kvstore.layout import layer_groups
from kvstore.sources import Shared
from kvstore.store import TieredStore

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # chunks done, of how many
ATTEMPTS = 3  # to load; after them everything is computed


@dataclass(frozen=True, slots=True)
class Found:
    """What the store has of one prompt, and where it goes."""

    segments: Segments
    start: Sequence[BlockKey]  # blocks from the first token on
    placed: Sequence[Placed]  # all blocks to load
    computed: Computed  # of these, what needs no load
    reuse: Reuse

    @property
    def made_tokens(self) -> int:
        """Tokens of the prompt whose KV was in no store, but computed for it, chunk by chunk."""
        done = sum(key.num_tokens for key in self.start)
        made = [block for block in self.placed if block.key in self.computed]
        return sum(b.key.num_tokens - max(0, done - b.start) for b in made)


class Blending:
    """Serves prompts of segments from one store. Thread-safe.

    Args:
        plain: serves those of which nothing is to be blended.
    """

    def __init__(
        self,
        model: Model,
        store: TieredStore,
        memory: Memory,
        identity: ModelIdentity,
        config: EngineConfig,
        plain: Plain,
    ) -> None:
        self._model, self._store, self._memory = model, store, memory
        self._size, self._plain = config.block_tokens, plain
        self._precision = config.store.precision
        layer_bytes = model.shape.kv_bytes_per_token // model.shape.num_layers * self._size
        self.speeds = PerfModel(len(layer_groups(model.shape.num_layers, layer_bytes)))
        self.chunks = Chunks(
            model,
            store,
            identity,
            tenant=config.tenant.encode(),
            size=config.block_tokens,
            step=config.chunk(model.shape.device),
            speeds=self.speeds,
        )

    def refuse(self) -> None:
        """ModelError for a model whose keys cannot move."""
        if any(layer.rope.max_positions is not None for layer in self._model.layers):
            raise ModelError(
                "chunks cannot be reused in another place: this model's rotary frequencies change "
                "with the length (dynamic NTK or longrope); pass the prompt as one list of tokens, "
                "whose stored start is reused"
            )

    def precompute(
        self, prefix: Tokens, chunks: Sequence[Tokens], progress: Progress
    ) -> Slices[None]:
        """Store the chunks that are not there yet, one a slice; not yet durable at the end.

        Raises:
            PromptError: a chunk cannot be read, e.g. because it is too long; none was stored.
        """
        self.refuse()
        for chunk in chunks:
            self.chunks.check(prefix, chunk)
        once = list(dict.fromkeys(chunks))
        for done, made in enumerate(self.chunks.complete(prefix, once, self._precision), 1):
            progress(done, len(once))
            yield sum(key.num_tokens for key in made)

    def order(self, segments: Segments, precision: Precision) -> tuple[int, ...]:
        """The chunks' numbers, in the order in which more of the prompt is stored exactly."""
        return best_order(
            segments, lambda t: self._store.lookup(self._plain.keys(t, precision=precision))
        )

    def shared(self, run: Running) -> dict[bytes, bool]:
        """What a shared tier says of the blocks that the prompt of `run` may be made of."""
        segments, precision = run.segments, run.precision
        if segments is None or not self._store.is_shared:
            return {}
        chains = [
            self._plain.keys(segments.tokens, precision=precision),
            self._repaired(run),
            *(self.chunks.keys(segments.prefix, chunk, precision) for chunk in segments.chunks),
        ]
        said = [self._store.shared(chain) for chain in chains]
        return {digest: is_there for one in said for digest, is_there in one.items()}

    def prefill(self, run: Running) -> Float[Tensor, " vocab"]:
        """Logits after the prompt of `run`, whose chunks are reused as its settings say."""
        return drained(self.prefill_slices(run))

    def prefill_slices(self, run: Running) -> Slices[Float[Tensor, " vocab"]]:
        """As `prefill`: a missing chunk, a layer of the blend, or a chunk of a plain prompt."""
        assert run.segments is not None
        report = run.stats.blend = BlendReport(
            run.blend.policy,
            len(run.request.prompt),
            chunks=len(run.segments.chunks),
            order=tuple(range(len(run.segments.chunks))),
        )
        if run.blend.reorder:
            self._reorder(run, report)
        lost: set[BlockKey] = set()
        for _ in range(ATTEMPTS):
            try:
                return (yield from self._attempt(run, report, lost))
            except BlocksLost as error:  # counted by the store, which will not offer them again
                log.warning("computing chunks again: %s", error)
                lost.update(error.keys)
                run.shared = None  # not all that was there then could be read
        report.reason, report.share = "compute: stored blocks could not be read", 1.0
        return (yield from self._compute(run, report))

    def _attempt(
        self, run: Running, report: BlendReport, lost: set[BlockKey]
    ) -> Slices[Float[Tensor, " vocab"]]:
        """One try; BlocksLost if a block cannot be read."""
        segments = run.segments
        assert segments is not None
        prefix, precision = segments.prefix, run.precision
        keys = {chunk: self.chunks.keys(prefix, chunk, precision) for chunk in segments.chunks}
        exact = self._plain.keys(segments.tokens, precision=precision)
        repaired = self._repaired(run)
        with self._store.pin(
            [*exact, *repaired, *(key for chain in keys.values() for key in chain)]
        ):
            leading = [self._leading(chain, lost, run) for chain in (exact, repaired)]
            start = max(leading, key=len)
            found = yield from self._find(run, report, keys, start, lost)
            report.repaired_tokens = len(start) * self._size * (start is leading[1])
            work = self._work(found, run.blend.share, run.shared)
            decision = self._decide(run.blend, found, work)
            report.policy = run.blend.policy
            report.share, report.reason = decision.share, decision.reason
            report.loaded = decision.load
            if not decision.load:
                return (yield from self._compute(run, report))
            run.keys = repaired
            return (yield from self._blend(run, report, found, work))

    def _find(
        self,
        run: Running,
        report: BlendReport,
        keys: Mapping[Tokens, list[BlockKey]],
        start: Sequence[BlockKey],
        lost: set[BlockKey],
    ) -> Slices[Found]:
        """Complete the chunks that are not wholly stored, and place all blocks in the prompt."""
        assert run.segments is not None
        computed: Computed = {}
        missing = 0
        prefix = run.segments.prefix
        for made in self.chunks.complete(prefix, list(keys), run.precision, lost, run.shared):
            computed |= made
            missing += bool(made)
            yield sum(key.num_tokens for key in made)
        report.corrupt = sum(not lost.isdisjoint(chain) for chain in keys.values())
        report.missed = report.missed or missing - report.corrupt
        done, placed = len(start) * self._size, []
        for chunk, (at, _) in zip(run.segments.chunks, run.segments.spans, strict=True):
            blocks = [Placed(key, at + i * self._size) for i, key in enumerate(keys[chunk])]
            placed += [b for b in blocks if b.start + b.key.num_tokens > done]
        placed += [Placed(key, i * self._size) for i, key in enumerate(start)]  # over the others
        reuse = plan(run.segments, done, self._model.shape.device)
        return Found(run.segments, start, placed, computed, reuse)

    def _blend(
        self, run: Running, report: BlendReport, found: Found, work: Work
    ) -> Slices[Float[Tensor, " vocab"]]:
        """Load, blend, and take note of what it took."""
        tokens = torch.tensor(found.segments.tokens, device=self._model.shape.device)
        budget = Budget(report.share, found.reuse, kv_depth(self._model))
        watch = Watch()
        run.release()  # what a lost block left
        cache = run.cache = self._memory.cache(run, self._recorder(run, found.start))
        loader = Loader(self._model, cache, self._store, found.placed, len(tokens), found.computed)
        try:
            policy = self._affordable(run.blend, report, found.reuse, budget)
            slices = blend_layers(self._model, cache, tokens, found.reuse, loader, policy, budget)
            logits = yield from watch.timed(finished(slices, self._model.shape.device))
            if isinstance(cache, SparseCache):
                yield from watch.timed(_settled(cache, len(tokens) // len(self._model.layers)))
        finally:
            loader.cancel()
        run.stored = [block.key for block in found.placed]
        report.compute_s = watch.seconds - loader.waited_s
        report.load_s, report.waited_s = loader.load_s, loader.waited_s
        report.charged, reuse = budget.charged, found.reuse
        report.exact_tokens, report.fresh_tokens = reuse.count(EXACT), reuse.count(FRESH)
        report.reused_tokens = reuse.reusable
        run.stats.cached_tokens = report.exact_tokens + report.reused_tokens - found.made_tokens
        self._learn(report, work)
        return logits

    def _affordable(
        self, settings: BlendConfig, report: BlendReport, reuse: Reuse, budget: Budget
    ) -> Policy:
        """The policy asked for, or what stands in for it, of which the report then tells."""
        asked = settings.chosen(self._model.shape.num_layers)
        policy = affordable(self._model, reuse, asked, budget)
        if policy is not asked and reuse.reusable:
            report.policy = "boundary"
            report.reason += (
                f"; boundaries instead of {settings.policy}: its probe of "
                f"{reuse.count(FRESH):,} tokens would take nearly all of the share"
            )
        return policy

    def _compute(self, run: Running, report: BlendReport) -> Slices[Float[Tensor, " vocab"]]:
        """Everything but a stored start, exactly."""
        run.repair = None
        watch = Watch()
        logits = yield from watch.timed(self._plain.prefill_slices(run))
        report.load_s, report.waited_s = run.load_s, run.waited_s
        report.compute_s = watch.seconds - run.waited_s
        report.loaded, report.charged = False, report.share
        report.exact_tokens = run.stats.cached_tokens
        report.repaired_tokens = report.reused_tokens = 0
        report.fresh_tokens = report.prompt_tokens - report.exact_tokens
        self.speeds.prefilled(report.fresh_tokens, report.compute_s, start=report.exact_tokens)
        return logits

    def _decide(self, settings: BlendConfig, found: Found, work: Work) -> Decision:
        """Whether to use what was found, and how much of it to compute all the same."""
        if not work.reusable:
            return self._lossless(found)
        if not settings.controller:
            return Decision(True, settings.share, "load: as configured")
        return self.speeds.decide(work)

    def _lossless(self, found: Found) -> Decision:
        """Nothing is there to repair: load what is exact, as every request does."""
        names = {key.kind for key in found.start} - {Kind.EXACT}
        if names or found.reuse.count(EXACT) > len(found.start) * self._size:
            return Decision(True, 0.0, "load: all that is stored is in its place")
        return Decision(False, 0.0, "compute: no chunk is reused beyond the stored start")

    def _leading(
        self, keys: Sequence[BlockKey], lost: set[BlockKey], run: Running
    ) -> list[BlockKey]:
        """Stored blocks at the start of a chain, all tokens but one at most."""
        usable = keys[: (len(run.request.prompt) - 1) // self._size]
        found = usable[: self._store.lookup(usable, run.shared)]
        return list(takewhile(lambda key: key not in lost, found))

    def _repaired(self, run: Running) -> list[BlockKey]:
        """Names of what this blend makes, where it is kept: for requests of the same kind alone."""
        assert run.segments is not None
        run.repair = None
        if not run.blend.keep_repaired:
            return []
        policy = run.blend.chosen(self._model.shape.num_layers)
        asked = run.segments.question if policy.probe else ()
        lengths = [len(chunk) for chunk in run.segments.chunks]
        settings = list(msgspec.json.encode(run.blend))
        run.repair = digest(run.segments.prefix, run.segments.separator, lengths, asked, settings)
        return self._plain.keys(run.segments.tokens, run.repair, run.precision)

    def _recorder(self, run: Running, start: Sequence[BlockKey]) -> Recorder | None:
        """Takes what the blend makes, where it is kept; never as exact KV."""
        if run.repair is None:
            return None
        kept = len(start) if start and start[0].kind is Kind.REPAIRED else 0
        return self._plain.recorder(run, kept * self._size)

    def _reorder(self, run: Running, report: BlendReport) -> None:
        """Change the order of the chunks where more of the prompt is then stored exactly."""
        assert run.segments is not None
        report.order = self.order(run.segments, run.precision)
        run.segments = run.segments.ordered(report.order)
        run.request = replace(run.request, prompt=run.segments.tokens)

    def _work(self, found: Found, share: float, shared: Shared) -> Work:
        """The prompt as the performance model sees it."""
        keys = [block.key for block in found.placed if block.key not in found.computed]
        loads: Counter[str] = Counter()
        for key, tier in zip(keys, self._store.resting(keys, shared), strict=True):
            if tier is not None:
                loads[tier] += key.num_tokens * self._model.shape.kv_bytes_per_token
        return Work(
            reusable=found.reuse.reusable,
            fresh=found.reuse.count(FRESH),
            loads=loads,
            share=share,
            start=found.reuse.count(EXACT),
        )

    def _learn(self, report: BlendReport, work: Work) -> None:
        """Measured speeds, for the next decision."""
        if len(work.loads) == 1:
            ((tier, nbytes),) = work.loads.items()
            self.speeds.loaded(tier, nbytes, report.load_s)
        self.speeds.blended(work, report.charged, report.compute_s)


def _settled(cache: SparseCache, cost: int) -> Slices[None]:
    """The indexes of a complete prompt, a layer a slice."""
    for _ in cache.settle():
        yield cost
