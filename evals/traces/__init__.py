"""Request traces that say which prompts share a prefix, replayed through eviction policies."""
