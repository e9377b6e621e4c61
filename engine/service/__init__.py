"""Requests that come and go: who runs next, on one thread that turns."""
