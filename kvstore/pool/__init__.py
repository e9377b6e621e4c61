"""KV of running requests, in slabs of blocks that may overflow to disk."""
