"""The model: pieces of one from transformers, checked, named and loaded."""
