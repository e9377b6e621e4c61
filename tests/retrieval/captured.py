"""A step of an index on a device, as a CUDA graph."""

import torch


def captured_step(device, key, position, query, want, scale):
    """Append `key` to slot 0 and score, captured and replayed: `want`, and as the eager step does.

    The same key at the same place twice changes nothing.
    """
    slots = len(query)
    keys = key.expand(slots, *key.shape).contiguous().cuda()
    positions = torch.full((slots,), -1, dtype=torch.int32, device="cuda")
    positions[0] = position
    lengths, query = positions + 1, query.cuda()

    def step():
        device.append(keys, positions)
        return device.score(query, lengths, scale)

    eager, graph = step(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    for part in captured:
        part.fill_(torch.nan)
    graph.replay()
    for one, other in zip(eager, captured):
        assert torch.equal(one, other)
    found = captured.raw[0].cpu()
    torch.testing.assert_close(found[:, : want.shape[1]], want, rtol=1e-5, atol=1e-4)
    assert (captured.raw[1:] == -torch.inf).all()
