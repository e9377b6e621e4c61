"""How the project's reference model is made: texts, tokenizer, windows, wiring, training."""
