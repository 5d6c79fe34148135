"""Records traces: prompts in, trace files out.

for each group of prompts:                     (a group has a part file; one that is there already is done)
    the target's texts, under every sampling   target.py
    the drafter along them and off them        draft.py
    write the part
join the parts into a file for each domain and sampling

A group is evaluated in the same batches whenever it is, so a recording that was interrupted ends in the same files.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from wisp import __version__
from wisp.api.template import chat_template
from wisp.calibrate.traces.draft import DraftRecorder, Line
from wisp.calibrate.traces.format import Trace, TraceSet, load_file, save_file
from wisp.calibrate.traces.prompts import Prompt
from wisp.calibrate.traces.statistics import COLUMNS
from wisp.calibrate.traces.target import target_texts
from wisp.core.errors import ConfigError, ModelError
from wisp.core.protocol.sampling import Sampling
from wisp.engines.llama.capi import PIN, api
from wisp.engines.llama.context import physical_cores
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.llama.tokenizer import LlamaTokenizer
from wisp.engines.models.store import sha256_of

PARTS = ".parts"

Report = Callable[[str, float], None]
"""Told (the present task, share of the whole recording that is done)."""


class ModelFile(msgspec.Struct, frozen=True):
    """The provenance of a model."""

    name: str
    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, path: Path) -> ModelFile:
        return cls(name, path.name, path.stat().st_size, sha256_of(path))


class Settings(msgspec.Struct, frozen=True):
    """Settings of a recording, beside models and prompts.

    samplings:  names as `parse_sampling` reads them
    max_tokens: of each text
    depth:      of an off-path continuation, tokens
    seed:       from which the seed of each trace is made
    mode:       of the target; in fast mode, too, the trace is exact by definition: it *is* the target's text
    group:      prompts decoded together
    """

    samplings: tuple[str, ...] = ("greedy", "t0.7")
    max_tokens: int = 64
    depth: int = 16
    seed: int = 0
    mode: Literal["exact", "fast"] = "fast"
    threads: int = 1
    group: int = 16

    @classmethod
    def named(
        cls, samplings: str, max_tokens: int, depth: int, seed: int, mode: str, threads: int | None
    ) -> Settings:
        """From a command line. Threads: default one per physical core. Raises ConfigError."""
        if mode not in ("exact", "fast"):
            raise ConfigError(f"unknown mode {mode!r}; choose exact or fast")
        settings = cls(
            samplings=tuple(name.strip() for name in samplings.split(",")),
            max_tokens=max_tokens,
            depth=depth,
            seed=seed,
            mode="exact" if mode == "exact" else "fast",
            threads=threads or physical_cores(),
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ConfigError where a recording cannot be made so."""
        if not self.samplings or len(set(self.samplings)) != len(self.samplings):
            raise ConfigError("name each sampling once, e.g. greedy,t0.7")
        for name in self.samplings:
            parse_sampling(name, 0)
        if self.max_tokens < 1 or not 1 <= self.depth <= 255:
            raise ConfigError("a trace has at least 1 token, and off-path continuations have 1 to 255")


def parse_sampling(name: str, seed: int) -> Sampling:
    """ "greedy", or "t" and a temperature. Raises ConfigError."""
    if name == "greedy":
        return Sampling(seed=seed)
    try:
        sampling = Sampling(temperature=float(name.removeprefix("t")), seed=seed)
    except ValueError:
        sampling = Sampling()
    if not name.startswith("t") or sampling.greedy or sampling.problem():
        raise ConfigError(f"unknown sampling {name!r}: choose greedy, or a temperature, e.g. t0.7")
    return sampling


def seed_of(seed: int, prompt_id: str, label: str) -> int:
    """The seed of one trace, 53 bits: noise differs from trace to trace, and from one recording seed to another."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{label}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


class Recording:
    """One recording into the folder `out`.

    target, draft: (name, path) of the models
    date:          that goes into the files (default: today, UTC)

    Raises ConfigError, ModelError or EngineError.
    """

    def __init__(
        self,
        target: tuple[str, Path],
        draft: tuple[str, Path],
        prompts: Sequence[Prompt],
        settings: Settings,
        out: Path,
        *,
        date: str | None = None,
    ) -> None:
        settings.check()
        self._paths = (target[1], draft[1])
        self._models = (ModelFile.of(*target), ModelFile.of(*draft))
        self._prompts, self._settings, self._out = list(prompts), settings, out
        self._date = date or datetime.datetime.now(datetime.UTC).date().isoformat()
        self.plan = self._digest(self._prompts)

    def run(self, report: Report = lambda what, share: None) -> TraceSet:
        """Record the missing parts. After an interruption the same call goes on."""
        if not self._finished():
            (self._out / PARTS).mkdir(parents=True, exist_ok=True)
            (self._out / PARTS / ".gitignore").write_text("*\n")
            parts = self._record_parts(report)
            self._join(parts)
        shutil.rmtree(self._out / PARTS, ignore_errors=True)
        return TraceSet.load(self._out)

    def _finished(self) -> bool:
        """Are all files there? Raises ConfigError where there are others."""
        files = {file.name: load_file(file)[0] for file in self._out.glob("*.npz")}
        if not files.keys() <= self._names() or any(h.get("plan") != self.plan for h in files.values()):
            raise ConfigError(
                f"{self._out} has traces of other models, prompts or settings: remove them, or choose another --out"
            )
        return files.keys() == self._names()

    def _names(self) -> set[str]:
        domains = {prompt.domain for prompt in self._prompts}
        return {f"{domain}.{label}.npz" for domain in domains for label in self._settings.samplings}

    def _record_parts(self, report: Report) -> list[Path]:
        size = self._settings.group
        groups = [self._prompts[i : i + size] for i in range(0, len(self._prompts), size)]
        parts = [self._out / PARTS / f"{self._digest(group)[:16]}.npz" for group in groups]
        done = sum(part.exists() for part in parts)
        if done == len(parts):
            return parts
        report("loading the models", done / len(parts))
        with _Pair(self._paths, self._prompts, self._settings) as pair:
            header = self._header(pair)
            for n, (group, part) in enumerate(zip(groups, parts, strict=True)):

                def told(what: str, share: float, n: int = n) -> None:
                    report(f"{what}, group {n + 1} of {len(parts)}", (n + share) / len(parts))

                if not part.exists():
                    save_file(part, header, pair.record(group, told))
        return parts

    def _join(self, parts: Sequence[Path]) -> None:
        loaded = [load_file(part) for part in parts]
        about = {key: value for key, value in loaded[0][0].items() if key != "traces"}
        traces = [trace for _, some in loaded for trace in some]
        for domain in dict.fromkeys(trace.domain for trace in traces):
            for label in self._settings.samplings:
                chosen = [t for t in traces if (t.domain, t.label) == (domain, label)]
                header = {**about, "domain": domain, "sampling": label}
                save_file(self._out / f"{domain}.{label}.npz", header, chosen)

    def _digest(self, prompts: Sequence[Prompt]) -> str:
        """Of everything that the traces of these prompts depend on."""
        engine = f"xllamacpp {PIN}"
        what = [engine, COLUMNS, self._models, self._settings, prompts]
        return hashlib.sha256(msgspec.json.encode(what)).hexdigest()

    def _header(self, pair: _Pair) -> dict[str, Any]:
        info = pair.target.info
        system = api().ffi.string(api().lib.llama_print_system_info()).decode("utf-8", "replace")
        engine = {
            "name": "llama.cpp",
            "build": f"xllamacpp {PIN}",
            "system": system.strip(),
            "mode": info.mode,
            "flip_gap": info.flip_gap,
            "notes": list(info.notes),
        }
        described = zip(self._models, pair.descriptions, strict=True)
        target, draft = ({**msgspec.to_builtins(m), "description": d} for m, d in described)
        prompts = hashlib.sha256(msgspec.json.encode(self._prompts)).hexdigest()
        return {
            "plan": self.plan,
            "wisp": __version__,
            "date": self._date,
            "target": target,
            "draft": draft,
            "vocabulary": pair.fingerprint,
            "eos": sorted(info.eos),
            "engine": engine,
            "settings": msgspec.to_builtins(self._settings),
            "prompts": {"count": len(self._prompts), "sha256": prompts},
            "columns": list(COLUMNS),
        }


class _Pair:
    """Both models, open, and the prompts in tokens."""

    def __init__(self, paths: tuple[Path, Path], prompts: Sequence[Prompt], settings: Settings) -> None:
        self._settings = settings
        self.fingerprint = _shared_vocabulary(*paths)
        self._ids = _tokenized(paths[0], prompts)
        line = max(map(len, self._ids.values())) + settings.max_tokens
        self.target = LlamaTarget(
            paths[0],
            mode=settings.mode,
            slots=settings.group * len(settings.samplings),
            slot_tokens=line,
            threads=settings.threads,
        )
        try:
            self._draft = DraftRecorder(
                paths[1],
                n_vocab=self.target.info.n_vocab,
                line_tokens=line,
                depth=settings.depth,
                threads=settings.threads,
            )
        except ModelError:
            self.target.close()
            raise
        self.descriptions = (self.target.model.description, self._draft.description)

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._draft.close()
        self.target.close()

    def record(self, prompts: Sequence[Prompt], report: Report) -> list[Trace]:
        """The traces of a group: of each prompt in turn, under each sampling."""
        settings = self._settings
        ids = [self._ids[prompt.id] for prompt in prompts]
        samplings = [
            [parse_sampling(label, seed_of(settings.seed, prompt.id, label)) for label in settings.samplings]
            for prompt in prompts
        ]
        texts = target_texts(
            self.target, ids, samplings, settings.max_tokens, lambda share: report("target", 0.5 * share)
        )
        lines = [
            Line(prompt, text, sampling)
            for prompt, some, under in zip(ids, texts, samplings, strict=True)
            for text, sampling in zip(some, under, strict=True)
        ]
        self._draft.follow(lines, lambda share: report("drafter", 0.5 + 0.5 * share))
        of = [(prompt, label) for prompt in prompts for label in settings.samplings]
        return [self._trace(*each, line) for each, line in zip(of, lines, strict=True)]

    def _trace(self, prompt: Prompt, label: str, line: Line) -> Trace:
        return Trace(
            prompt_id=prompt.id,
            domain=prompt.domain,
            split=prompt.split,
            label=label,
            sampling=line.sampling,
            finish="stop" if line.text[-1] in self.target.info.eos else "length",
            prompt=np.array(line.prompt, np.int32),
            target=np.array(line.text, np.int32),
            draft=np.array(line.draft, np.int32),
            signals=np.array(line.signals, np.float32),
            off=line.off,
            columns=COLUMNS,
        )


def _shared_vocabulary(target: Path, draft: Path) -> str:
    """The fingerprint that both models share. Raises ModelError where they do not."""
    prints = []
    for path in (target, draft):
        tokenizer = LlamaTokenizer.open(path)
        prints.append(tokenizer.fingerprint)
        tokenizer.close()
    if prints[0] != prints[1]:
        raise ModelError(f"{draft.name} has another vocabulary than {target.name}, and cannot draft for it")
    return prints[0]


def _tokenized(path: Path, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Each prompt as a chat's first message, in the target's template and tokens, by id."""
    tokenizer = LlamaTokenizer.open(path)
    template = chat_template(tokenizer.chat_template)
    found = {}
    for prompt in prompts:
        text = template.render(
            [{"role": "user", "content": prompt.text}],
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
        found[prompt.id] = tokenizer.encode(text, add_bos=False, parse_special=True)
    tokenizer.close()
    return found


def summary(traces: TraceSet, out: Path) -> dict[str, Any]:
    """Of a recording: positions, acceptance by domain and sampling, size in bytes."""
    groups = dict.fromkeys((t.domain, t.label) for t in traces)
    return {
        "out": str(out),
        "prompts": len({t.prompt_id for t in traces}),
        "traces": len(traces),
        "positions": traces.positions,
        "off_path_positions": sum(len(o.tokens) for t in traces for o in t.off.values()),
        "acceptance": _acceptance(traces),
        "bytes": sum(file.stat().st_size for file in out.glob("*.npz")),
        "rows": [_summary_row(traces.select(domain=domain, label=label)) for domain, label in groups],
    }


def _summary_row(some: TraceSet) -> dict[str, Any]:
    first = some.traces[0]
    return {
        "domain": first.domain,
        "split": ", ".join(sorted({t.split for t in some}, reverse=True)),
        "sampling": first.label,
        "prompts": len(some),
        "positions": some.positions,
        "acceptance": _acceptance(some),
    }


def _acceptance(traces: TraceSet) -> float:
    """Share of positions at which drafter, on the true path, and target agree."""
    return round(sum(int(t.accepted.sum()) for t in traces) / max(1, traces.positions), 4)
