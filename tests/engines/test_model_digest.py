"""Digests: equal where one engine may go on with another's text, and otherwise not."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_files import Weights
from wisp.core.errors import ModelError
from wisp.core.protocol.sampling import RULE
from wisp.engines import identity
from wisp.engines.build import load_target
from wisp.engines.emulated import Written
from wisp.engines.identity import engine_digest, files_digest, folder_digest, gguf_digest
from wisp.engines.llama.target import LlamaTarget

GIB = 1 << 30


def digest(path: Path, **settings: object) -> str:
    more = {"slots": 2, "slot_tokens": 64, "threads": 1, "check": False} | settings
    engine = LlamaTarget(path, **more)  # type: ignore[arg-type]
    engine.close()
    return engine.info.digest


def test_a_files_name_and_the_slots_do_not_change_the_digest(tiny_target: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(tiny_target, tmp_path / "other-name.gguf"))
    os.utime(copy, (1, 1))
    assert digest(tiny_target) == digest(copy, name="another", slots=3, threads=2)


def test_weights_and_settings_that_change_logits_change_the_digest(tiny_target: Path, tmp_path: Path) -> None:
    weights = Weights(tiny_target)
    weights.tensors["blk.2.ffn_up.weight"][7, 7] += 1e-3
    digests = [
        digest(tiny_target),
        digest(weights.write(tmp_path / "tiny-target.gguf")),
        digest(tiny_target, mode="fast"),
        digest(tiny_target, slot_tokens=128),  # models whose rotary factors depend on it are about
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 32 for d in digests)


@pytest.mark.parametrize(
    ("what", "value"), [("PIN", "another build"), ("kernels", lambda: "of another processor")]
)
def test_another_build_or_processor_changes_the_digest(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: object
) -> None:
    before, fast = digest(tiny_target), digest(tiny_target, mode="fast")
    monkeypatch.setattr(f"wisp.engines.llama.target.{what}", value)
    assert digest(tiny_target) != before
    # Fast mode differs in its last bits from batch to batch, and may do so from processor to processor.
    assert (digest(tiny_target, mode="fast") == fast) == (what == "kernels")


def test_another_rule_of_sampling_changes_every_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_digest("null")
    monkeypatch.setattr(identity, "RULE", RULE + 1)
    assert engine_digest("null") != before


def test_engines_without_weights_have_digests_of_their_text() -> None:
    def emulated(**written: object) -> str:
        fields = {"text": lambda *_: 0, "n_vocab": 300, "eos": frozenset({1}), "digest": "a"} | written
        return target("a100-qwen3-32b", written=Written(**fields))  # type: ignore[arg-type]

    def target(name: str, **more: object) -> str:
        return load_target(name, engine="emulated", **more)[0].info.digest  # type: ignore[arg-type]

    null = load_target("null", engine="null")[0].info.digest
    digests = [null, target("a100-qwen3-32b"), emulated(), emulated(digest="b"), emulated(n_vocab=301)]
    assert len(set(digests)) == len(digests)
    assert target("a100-qwen3-32b", slots=3) == target("a100-llama-70b-w4")  # timing is no text


# --- files


def large(path: Path, change: Callable[[int], int] | None = None) -> Path:
    """4 GiB of nothing, with a byte changed where `change` says of its size."""
    with path.open("wb") as file:
        file.truncate(4 * GIB)
        if change is not None:
            file.seek(change(4 * GIB))
            file.write(b"!")
    return path


@pytest.mark.parametrize(
    "change",
    [lambda size: 0, lambda size: identity._HEAD - 1, lambda size: identity._HEAD, lambda size: size - 1],
    ids=["first", "last of the head", "first of the rest", "last"],
)
def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(
    tmp_path: Path, change: Callable[[int], int]
) -> None:
    assert files_digest([large(tmp_path / "a")]) != files_digest([large(tmp_path / "b", change)])


def test_whatever_replaces_a_hundredth_of_a_large_file_is_noticed(tmp_path: Path) -> None:
    """As another training of a single layer would."""
    before, share = files_digest([large(tmp_path / "a")]), 4 * GIB // 100
    for i in range(0, 100, 9):
        path = large(tmp_path / "b")
        with path.open("rb+") as file:
            for at in range(i * share, (i + 1) * share, identity._BLOCK):
                file.seek(at)
                file.write(b"!")
        assert files_digest([path]) != before


def test_no_more_of_a_large_file_is_read_than_some_tens_of_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = large(tmp_path / "a"), []

    class Counting:
        def update(self, data: bytes) -> None:
            read.append(len(data))

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(hashlib, "sha256", Counting)
    files_digest([path])
    assert sum(read) < 40 << 20


def test_every_part_of_a_split_model_counts(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        part.write_bytes(part.name.encode())
    before = gguf_digest(parts[0])
    parts[2].write_bytes(b"other weights")
    assert gguf_digest(parts[0]) != before
    parts[1].unlink()
    with pytest.raises(ModelError, match="00002"):
        gguf_digest(parts[0])


def test_weights_and_settings_of_a_hugging_face_folder_count_and_nothing_else(tmp_path: Path) -> None:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    seen = {folder_digest(tmp_path)}
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_text("changed")
        seen.add(folder_digest(tmp_path))
    assert len(seen) == 4
    (tmp_path / "README.md").write_text("changed")
    assert folder_digest(tmp_path) in seen
