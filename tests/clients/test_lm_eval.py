"""lm-eval: a task by log likelihood and one that generates, over the server's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import MODEL

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["aaa", "zzz"]
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "Hello"
generation_kwargs: {{until: ["!"], max_gen_toks: 32}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Which is it, {n}? "}) + "\n" for n in range(3)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=data))
    return tmp_path


def test_tasks_run(url: str, tasks: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": MODEL, "base_url": f"{url}/completions", "max_length": 2048},
        tasks=["choice", "generate"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["choice"]["acc,none"] == 1.0  # letters are the likelier, the earlier they come
    assert found["results"]["generate"]["exact_match,none"] == 1.0
