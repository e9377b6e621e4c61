"""A batch on a device beside the index of each of its requests, by slot."""

import torch

from retrieval.kernels.scores import lse
from retrieval.select import Policy, top_tokens
from tests.retrieval.keys import make_query

SLOTS, SCALE = 4, 0.1


def decode(device, requests, prompts, steps):
    """Append the next key of every request, one step at a time.

    Args:
        requests: keys by slot, of which `prompts` says how many are there already.
    """
    like = next(iter(requests.values()))
    for step in range(steps):
        keys = like.new_full((SLOTS, len(like), like.shape[2]), torch.nan)
        positions = torch.full((SLOTS,), -1, dtype=torch.int32)
        for slot, own in requests.items():
            positions[slot] = prompts[slot] + step
            keys[slot] = own[:, prompts[slot] + step]
        device.append(keys, positions)


def check(device, indexes, query):
    """Every slot's scores, statistics, outliers and the tokens selected are those of its index."""
    lengths = torch.tensor(
        [indexes[s].length if s in indexes else 0 for s in range(SLOTS)], dtype=torch.int32
    )
    found = device.score(query, lengths, SCALE)
    for slot in range(SLOTS):
        if slot not in indexes:
            assert (found.raw[slot] == -torch.inf).all()
            assert (lse(found)[slot] == -torch.inf).all()
            continue
        index, want = indexes[slot], indexes[slot].score(query[slot])
        units = want.shape[1]
        torch.testing.assert_close(found.raw[slot, :, :units], want, rtol=1e-5, atol=1e-4)
        assert (found.raw[slot, :, units:] == -torch.inf).all()
        torch.testing.assert_close(
            lse(found)[slot], (want * SCALE).logsumexp(-1), rtol=1e-5, atol=1e-5
        )
        outliers = index.outliers
        if device.outliers is not None:
            count = outliers.shape[1]
            assert torch.equal(device.outliers[slot, :, :count].long(), outliers)
            assert (device.outliers[slot, :, count:] == -1).all()
        policy = Policy(96)
        how = {
            "num_kv_heads": len(outliers),
            "length": index.length,
            "scale": SCALE,
            "unit": device.unit_tokens,
            "outliers": outliers,
        }
        assert torch.equal(
            top_tokens(found.raw[slot, :, :units], policy, **how), top_tokens(want, policy, **how)
        )


def queries(heads, dim, dtype=torch.float32):
    return torch.stack([make_query(heads, dim, dtype, seed=10 + s) for s in range(SLOTS)])
