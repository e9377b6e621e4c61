"""Where KV lives: blocks, the keys that name them, and the tiers they rest in."""
