"""llama.cpp as verifier, drafter and tokenizer, through the C API that the `xllamacpp` wheel exports.

capi          loads the shared object, checks that it is the build these declarations were written for
model         a GGUF file opened by llama.cpp, and its vocabulary
context       KV slots, batches, logits
tokenizer     text to ids and back; a header-only GGUF that carries a tokenizer to an edge
verification  one slice on its way through a step
target        the verifier's engine: exact or fast
selfcheck     at start-up: is this model exact here, or else how far apart are its batch shapes
reference     a slow decoder that is obviously right, to hold the engine against
proof         randomised schedules that count the logits which differ from the reference
draft         the drafter's engine
"""
