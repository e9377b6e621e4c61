"""Parts of `bench_store.py`: what runs beside LMCache, and the environment that it needs."""
