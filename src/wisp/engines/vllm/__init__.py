"""The verifier's vLLM engine: WISP decides who takes part in a step, vLLM runs it.

    target.py     TargetEngine, and the thread that all of it runs in
    stepping.py   slices become steps of vLLM
    slots.py      what slots hold, and which of it has KV
    scheduler.py  a subclass of vLLM's scheduler that schedules exactly the parts of the step at hand
    worker.py     hooks in vLLM's worker: which tokens go in, which rows come out, what is chosen there
    runner_v1.py  these hooks in Model Runner V1, and the inputs that they make for it
    runner_v2.py  the same for V2
    choosing.py   what the target says along the parts of a step: by `core.protocol.sampling` on a CPU, otherwise for
                  many rows at once, by torch or by the next two; `editing.py` has the constraints for torch
    kernels/      the same in Triton
    fused.py      the kernels from the host's side
    rows.py       what is asked of the rows of a step, as arrays
    selftest.py   what it asks of itself at every start
    starting.py   the supported versions, vLLM's settings, and its engine
    models.py     from the name of a target to its folder and tokenizer
    converting.py a GGUF file as a folder in Hugging Face format, for tests and the demo

Only `scheduler.py`, `worker.py`, the runners, `starting.py` and what chooses import vLLM or torch, and nothing imports
them until an engine is started.
"""
