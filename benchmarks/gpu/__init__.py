"""`benchmarks/gpu.sh`: what to measure when a GPU is at hand, in less than ten minutes. PyTorch and Triton are enough.

transformer.py  a decoder with random weights in the shape of a known model, and its KV
steps.py        step times over rows and cached tokens; the roofline and the cost model fitted to them
choice.py       the fused choice of tokens against the rule (equality) and against plain torch (time)
bits.py         one row a step against several: which logits keep their bits
serving.py      a verifier on vLLM, an edge before it, and `requests.py`: streamed completions against both
everything.py   all of these in turn, what became of each, and the time that they may take
report.py       device, versions, date, and where the figures go
__main__.py     `python -m benchmarks.gpu steps|choice|bits|serving`
"""
