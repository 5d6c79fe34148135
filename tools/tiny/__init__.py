"""The tiny pair: a target and a drafter small enough to ship, so that every test and demo runs a real model.

Both are llama-architecture models over one vocabulary of 512 tokens, trained on generated text (`text`), written
as f32 GGUF files. `python -m tools.tiny.train` makes them again from nothing.
"""
