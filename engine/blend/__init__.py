"""Prompts of parts: chunks' KV reused in any order, and what that spoils computed anew."""
