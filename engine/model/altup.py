"""Gemma 3n's way through its layers: several streams, and inputs of each layer's own.

A layer computes with one of the streams, predicts all of them before and corrects them after
(AltUp), and is given a short vector for every token, made of the token's id and its embedding.
Loops know nothing of that: of each token they hand a row from layer to layer, which here is

    stream 0 | ... | stream A-1 | input of layer 0 | ... | input of layer L-1

(Gemma 3n, Google 2025.)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from engine.model.hf_layer import HFLayer
from engine.model.linear import borrowed
from engine.model.pieces import QKV

QUIET = 1e-5  # mean square below which a stream is not made louder


class AltUpLayer:
    """A layer of that kind around the pieces that it has in common with others.

    Args:
        number: among all layers: which of the inputs is its own.
    """

    def __init__(self, layer: HFLayer, number: int) -> None:
        self.module, self.attention, self.rope = layer.module, layer.attention, layer.rope
        self.owner, self.owns = layer.owner, layer.owns
        self._layer, config = layer, layer.module.config
        self._twin: Any = borrowed(layer.module)
        self._count, self._active = config.altup_num_inputs, config.altup_active_idx
        self._scaled = config.altup_correct_scale
        self._width = config.hidden_size * self._count
        start = self._width + number * config.hidden_size_per_layer_input
        self._own = slice(start, start + config.hidden_size_per_layer_input)

    def qkv(self, x: Float[Tensor, "N R"]) -> QKV:
        """Projections of N tokens' active streams, unrotated."""
        return self._layer.qkv(self._predicted(x)[self._active, 0])

    def finish(
        self, x: Float[Tensor, "N R"], heads: Float[Tensor, "Hq N D"]
    ) -> Float[Tensor, "N R"]:
        """The rows with all streams brought up to date."""
        predicted = self._predicted(x)
        active = predicted[self._active, 0]
        attended = active + self._layer.attended(heads)
        both = (attended + self._twin.laurel(self._layer.normed(active))) / math.sqrt(2)
        streams = self._twin.altup.correct(predicted, (both + self._layer.fed(both))[None])
        streams[1:] += self._told(streams[self._active], x[:, self._own])
        return torch.cat([streams[:, 0].transpose(0, 1).flatten(1), x[:, self._width :]], 1)

    # for the load-time check

    def given(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], embedded: Float[Tensor, "N R"]
    ) -> Float[Tensor, "N R"]:
        """What a call of the module begins with; other layers' inputs are those of `embedded`."""
        x = embedded.clone()
        x[:, : self._width] = args[0][:, 0].transpose(0, 1).flatten(1)
        x[:, self._own] = args[2][0]
        return x

    def made(self, output: Any, x: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
        """What the module made of it."""
        return torch.cat([output[:, 0].transpose(0, 1).flatten(1), x[:, self._width :]], 1)

    def _predicted(self, x: Float[Tensor, "N R"]) -> Float[Tensor, "A 1 N E"]:
        streams = x[:, : self._width].unflatten(1, (self._count, -1)).transpose(0, 1)[:, None]
        predicted: Tensor = self._twin.altup.predict(streams)
        return predicted

    def _told(
        self, active: Float[Tensor, "1 N E"], own: Float[Tensor, "N P"]
    ) -> Float[Tensor, "1 N E"]:
        """What the layer's own input adds to the streams that it did not compute with."""
        twin = self._twin
        x = twin.altup.scale_corrected_output(active) if self._scaled else active
        x = twin.act_fn(twin.per_layer_input_gate(x)) * own
        told: Tensor = twin.post_per_layer_input_norm(twin.per_layer_projection(x))
        return told


class Streams:
    """Where rows begin and end, around the layers.

    Args:
        body: the model without its head.
    """

    def __init__(self, body: Any) -> None:
        self._body: Any = borrowed(body)
        self._count, self._width = body.config.altup_num_inputs, body.config.hidden_size
        self.modules: list[nn.Module] = [  # all that computes here
            *(body.per_layer_model_projection, body.per_layer_projection_norm),
            *(body.altup_projections, body.altup_unembed_projections),
        ]
        self.tables: list[nn.Embedding] = [body.embed_tokens, body.embed_tokens_per_layer]

    def begin(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N R"]:
        """Rows of tokens, as layer 0 takes them.

        The table of own inputs may have fewer tokens than there are (no text has the others): the
        first one's stand for theirs. transformers 5.17 fails at them instead.
        """
        body, ids = self._body, tokens[None]
        x = body.embed_tokens(ids)
        told = ids.where(ids < body.embed_tokens_per_layer.num_embeddings, 0)
        own = body.project_per_layer_inputs(x, body.get_per_layer_inputs(told))
        streams = [x, *(_as_loud(project(x), x) for project in body.altup_projections)]
        return torch.cat([*(stream[0] for stream in streams), own[0].flatten(1)], 1)

    def end(self, x: Float[Tensor, "N R"]) -> Float[Tensor, "N E"]:
        """What the last norm takes, of rows behind the last layer: the mean of the streams."""
        first, *others = x[:, : self._count * self._width].split(self._width, 1)
        back = zip(self._body.altup_unembed_projections, others, strict=True)
        streams = [first, *(_as_loud(project(other), first) for project, other in back)]
        return torch.stack(streams).mean(0)


def _as_loud(x: Float[Tensor, "*N E"], like: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
    """`x`, each of its vectors scaled to the mean square of that of `like`."""
    loud = like.square().mean(-1, keepdim=True).sqrt()
    return x * loud / x.square().mean(-1, keepdim=True).clamp_min(QUIET).sqrt()
