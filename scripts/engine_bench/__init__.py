"""Tables of the benchmarks of the engine's loops."""
