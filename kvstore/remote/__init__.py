"""Blocks that machines share, over the Redis protocol."""
