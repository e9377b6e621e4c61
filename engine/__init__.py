"""The loops: prefill, decode, and the engine that drives them."""
