"""The engine: a model, a store, and the loops between them."""

import logging
from collections.abc import Generator, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from engine.blend.blending import Blending, Progress
from engine.blend.repair import BlendConfig
from engine.blend.segments import Segments, ids_of
from engine.breakeven import BreakEven
from engine.cache import SequenceCache
from engine.config import EngineConfig
from engine.decoding import decoding
from engine.errors import EngineError, ModelError, PromptError
from engine.memory import Memory
from engine.model.adapter import merge
from engine.model.check import check
from engine.model.hf import HFModel
from engine.model.identity import identity
from engine.model.loader import load_module, load_tokenizer, locate, pick_device, refuse_module
from engine.plain import Plain
from engine.prefill import hidden_states
from engine.prompting import flat, rendered, tokenized
from engine.request import Completion, Event, Prompt, Request, Running, listed, whole
from engine.sampling import Sampling
from engine.slices import Slices, drained
from engine.sparse.compiled import compile_ahead
from engine.splitter import Splitter
from kvstore.block import Precision
from kvstore.errors import StoreError
from kvstore.layout import layer_groups
from kvstore.stats import StoreStats
from kvstore.store import TieredStore

log = logging.getLogger(__name__)


class Engine:
    """Generates with one model, reusing whatever prefix of a prompt its store has.

    May be used from several threads. Close it (or use it as a context manager): that is when the
    last blocks are certain to be on disk.

    Args:
        module: a loaded `transformers` causal language model, on one device.
        tokenizer: its tokenizer; without one, prompts are token lists and answers have no text.
        config: settings; the default keeps KV in host memory only.

    While an engine is made of a module, nobody else may use the module; and its weights must not
    change afterwards, or stored KV would be that of the old ones.

    Raises:
        ModelError: unknown architecture, quantized, on several devices, or not reproduced.
        StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        *,
        _folder: Path | None = None,  # of the weights, which need not be hashed in memory
        _adapters: tuple[tuple[str, bytes], ...] = (),  # merged into them since
    ) -> None:
        refuse_module(module)
        self._closed = False
        self._parent: Engine | None = None  # whose store and memory these are
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.splitter = Splitter(tokenizer)  # of all tenants
        self.model = HFModel(module.eval())
        check(self.model)
        self.config.check(self.model.shape)
        if self.config.method.sparse:
            compile_ahead()
        self.identity = identity(self.model, _folder, _adapters)
        self.memory = Memory(self.model, self.config)
        self.store = TieredStore.open(self.config.store)
        token_bytes, layers = self.model.shape.kv_bytes_per_token, self.model.shape.num_layers
        block_bytes = token_bytes // layers * self.config.block_tokens
        steps = len(layer_groups(layers, block_bytes))
        self.speeds = BreakEven(self.store, token_bytes, steps)
        self._serve()

    def _serve(self) -> None:
        parts = self.model, self.store, self.memory, self.identity, self.config
        self.plain = Plain(*parts, self.speeds)
        self.blending = Blending(*parts, self.plain)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | PreTrainedModel,
        config: EngineConfig | None = None,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "Engine":
        """An engine for a model folder, a hub id, or a loaded module.

        Args:
            adapter: folder or hub id of a LoRA adapter (PEFT), which is merged into the weights; an
                engine has one at most. KV is never shared between adapters, or with the model.
            dtype: None takes the checkpoint's (on a CPU: float32 where it lacks the instructions).
            device: "cpu" or "cuda[:N]"; None takes a GPU where there is one.
        """
        if isinstance(path_or_id, PreTrainedModel):
            if adapter is not None:
                raise ModelError("an adapter needs a model folder or hub id, not a loaded module")
            moved: Any = path_or_id
            return cls(moved.to(device=device, dtype=dtype), None, config)
        folder = locate(path_or_id)
        module = load_module(folder, dtype=dtype, device=pick_device(device))
        merged = () if adapter is None else (merge(module, locate(adapter, "adapter")),)
        tokenizer = load_tokenizer(folder)
        return cls(module, tokenizer, config, _folder=folder, _adapters=merged)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Int[Tensor, " T"],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        blend: BlendConfig | None = None,
        exact: bool = False,
    ) -> list[Completion]:
        """Answers to prompts (texts, token lists, `Segments`), in order, decoded as one batch.

        One text, one list of token ids, or one `Segments` is a batch of one. `blend` takes the
        place of the configuration's, for the `Segments` among them. `exact` takes no KV from the
        store that a codec of `store.codec` has changed, and none that rests on such.

        Every prompt is answered as if it were alone: with a seed, each starts from that seed.

        Raises:
            PromptError: a prompt or a setting is out of range; nothing was generated.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        asked = listed(prompts)
        runs = [self.accept(p, max_new_tokens, sampling, stop, blend, exact=exact) for p in asked]
        for group in list(self.memory.groups(runs)):  # all, before the first runs
            for _ in self._steps(group):
                pass
        return [run.completion() for run in runs]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        blend: BlendConfig | None = None,
        exact: bool = False,
    ) -> Generator[Event]:
        """Token by token; the last event carries the completion. Closing it cancels the request."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        run = self.accept(prompt, max_new_tokens, sampling, stop, blend, exact=exact)
        list(self.memory.groups([run]))  # refuse now what does not fit
        return (event for _, event in self._steps([run]))

    def precompute(
        self,
        chunks: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        progress: Progress = lambda done, of: None,
    ) -> None:
        """Store the KV of chunks behind `prefix`, as far as it is not there yet.

        Prompts of these chunks behind the same prefix then reuse it, wherever they stand. What is
        kept on disk is there when this returns.
        """
        drained(self.precompute_slices(chunks, prefix, progress))
        self.store.flush()

    def precompute_slices(
        self,
        chunks: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        progress: Progress = lambda done, of: None,
    ) -> Slices[None]:
        """As `precompute`, a chunk a slice: for whoever has other things to do between them.

        What is kept on disk may still be on its way there at the end: see `TieredStore.flush`.
        """
        self._refuse_closed()
        whole = [ids_of(chunk) for chunk in chunks]
        yield from self.blending.precompute(ids_of(prefix), whole, progress)

    def of_tenant(self, secret: str) -> "Engine":
        """This engine for another owner of KV: same model, store and memory, other blocks.

        Neither finds what the other stored. It works as long as this engine does; to close it
        closes nothing else.
        """
        view = copy(self)
        view._parent = self
        view.config = msgspec.structs.replace(self.config, tenant=secret)
        view._serve()
        return view

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"}), by the tokenizer's chat template."""
        return rendered(self.tokenizer, messages)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the tokenizer adds."""
        return tokenized(self.tokenizer, text)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int] | Tensor) -> Float[Tensor, "T vocab"]:
        """Next-token logits after every one of `tokens`, computed without the store."""
        self._refuse_closed()
        request = Request(ids_of(tokens), 1)
        request.check(self.model.shape.vocab, self.model.shape.max_positions)
        cache = SequenceCache(self.model.shape, len(request.prompt))
        ids = self._ids(request.prompt)
        chunks = hidden_states(self.model, cache, ids, chunk=self.config.chunk(ids.device))
        return torch.cat([self.model.logits(x) for x in chunks])

    def stats(self) -> StoreStats:
        """What every tier of the store holds, and how often it helped."""
        choices = self.speeds.choices()
        return replace(
            self.store.stats(), loaded_starts=choices.loaded, computed_starts=choices.computed
        )

    def close(self) -> None:
        """Write what is still to be written, and close the store.

        Raises:
            StoreError: some blocks could not be written, e.g. because the disk is full.
        """
        self._closed = True
        if self._parent is not None:
            return
        try:
            self.store.close()
        finally:
            self.memory.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except StoreError as error:
            if kind is None:
                raise
            log.error("%s", error)  # what went wrong before it matters more

    # one request

    def accept(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str] = (),
        blend: BlendConfig | None = None,
        logprobs: int | None = None,
        *,
        exact: bool = False,
    ) -> Running:
        """A request that has not begun. PromptError if it can never be served."""
        self._refuse_closed()
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer")
        segments = prompt if isinstance(prompt, Segments) else None
        if segments is not None:
            self.blending.refuse()
        tokens = flat(self.tokenizer, prompt)
        request = Request(
            tokens, whole("max_new_tokens", max_new_tokens), sampling, stops, logprobs
        )
        positions = self.model.shape.max_positions
        request.check(self.model.shape.vocab, positions)
        left = positions - len(tokens) + 1  # the last one is not fed back
        return Running(
            request,
            eos=self.model.eos,
            limit=min(request.max_new_tokens, left),
            tokenizer=self.tokenizer,
            segments=segments,
            blend=blend or self.config.blend,
            precision=Precision.EXACT if exact else self.config.store.precision,
        )

    def _steps(self, runs: Sequence[Running]) -> Iterator[tuple[Running, Event]]:
        """Prefill each run, then decode all that are not finished, one token a step."""
        try:
            decoder = decoding(self.model, self.memory, runs)
            for run in runs:
                yield run, self._step(run, self._prefill(run))
                if run.finish_reason is None:
                    decoder.join(run)
            while live := [run for run in runs if run.finish_reason is None]:
                self._refuse_closed()
                for run, row in zip(live, decoder.step(live), strict=True):
                    yield run, self._step(run, row)
        finally:
            for run in runs:
                run.release()
            for run in [] if self._ended else runs:
                if run.finish_reason is not None:  # behind the last token: it reads them once more
                    self.store.promote(run.stored)

    def _step(self, run: Running, logits: Float[Tensor, " vocab"]) -> Event:
        """Choose the next token; what the store may have goes there, and an ended run is freed."""
        self.plain.save(run)
        event = run.step(logits)
        if run.finish_reason is not None:
            run.release()
        return event

    def _prefill(self, run: Running) -> Float[Tensor, " vocab"]:
        """Logits after the prompt."""
        return (self.plain if run.segments is None else self.blending).prefill(run)

    @property
    def _ended(self) -> bool:
        return self._closed or (self._parent is not None and self._parent._closed)

    def _refuse_closed(self) -> None:
        if self._ended:
            raise EngineError("this engine is closed: make a new one")

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.shape.device)
