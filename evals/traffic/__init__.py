"""Requests over time: recorded ones, and ones drawn to be like them."""
