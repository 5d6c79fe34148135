"""Greedy decoding by vLLM as it comes: `python stock_vllm.py FOLDER`, prompts and lengths as JSON on standard input."""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        kv_cache_memory_bytes=1 << 28,
    )
    how = SamplingParams(temperature=0.0, max_tokens=asked["n"], detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], how, use_tqdm=False)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
