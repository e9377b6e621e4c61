"""Seconds to train codebooks: FAISS on the processor, and on the GPU where it has one."""

import traceback
from collections.abc import Iterator
from typing import Any

import torch

from gpu_bench.timing import synchronized
from retrieval.codebook import faiss_module, train_codebook
from retrieval.metric import Metric

SHAPES = {"VQ, 1024 centroids": (1, 1024), "PQ, 16 x 256 centroids": (16, 256)}


def lines(device: torch.device) -> Iterator[dict[str, Any]]:
    """One line for each codebook and place; the errors are those of all keys, coded by it."""
    heads, tokens, dim = (8, 1 << 17, 128) if device.type == "cuda" else (2, 600, 32)
    keys = torch.randn(heads, tokens, dim, device=device)
    for name, (subspaces, centroids) in SHAPES.items():
        few = centroids if device.type == "cuda" else 16
        for where in dict.fromkeys((torch.device("cpu"), device)):
            line: dict[str, Any] = {"part": "codebook", "name": name, "keys_on": where.type}
            line |= {"keys": [heads, tokens, dim]}
            try:
                yield line | _trained(keys.to(where), subspaces, few)
            except ImportError as error:  # FAISS is an extra
                yield line | {"skipped": str(error)}
            except Exception as error:
                traceback.print_exc()
                said = "".join(traceback.format_exception_only(error)).strip()[:500]
                yield line | {"error": said}


def _trained(keys: torch.Tensor, subspaces: int, centroids: int) -> dict[str, Any]:
    metric = Metric(keys.mean(1), None, None)
    began = synchronized(keys.device)
    book = train_codebook(keys, metric, subspaces=subspaces, centroids=centroids)
    seconds = synchronized(keys.device) - began
    found: dict[str, Any] = {"mean_error": float(book.encode(keys).errors.mean())}
    found |= {"faiss_gpus": faiss_module().get_num_gpus()}
    return found | ({"seconds": seconds} if torch.cuda.is_available() else {})
