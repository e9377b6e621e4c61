"""The demonstrations, and the processes that they start."""
