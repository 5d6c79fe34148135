"""Options for devices and types: what this build has is used, and what it lacks is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from wisp.check.doctor import engine as doctor
from wisp.core.errors import ConfigError
from wisp.core.protocol.sampling import Sampling
from wisp.core.protocol.step import Slice
from wisp.engines.build import check_engine, load_drafter, load_target
from wisp.engines.llama import capi, devices, target
from wisp.engines.llama.devices import KV_TYPES, Accelerator, LlamaOptions, parse_split
from wisp.engines.llama.draft import LlamaDraft
from wisp.engines.llama.target import LlamaTarget
from wisp.engines.options import EngineOptions

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GPU = Accelerator("Vulkan0", "a card", "GPU", 8192)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's list has a GPU. (A build without one ignores layers that are to go there.)"""
    for module in (devices, target):
        monkeypatch.setattr(module, "accelerators", lambda: [GPU])


def test_the_librarys_list_of_devices_is_read() -> None:
    lib = capi.api().lib
    assert (
        lib.ggml_backend_dev_type(lib.ggml_backend_dev_get(0)) == 0
    )  # the CPU, in a wheel of the usual index
    assert all(device.name and device.kind for device in devices.accelerators())
    assert lib.llama_max_devices() >= 1


def test_every_device_but_the_cpu_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    ffi = capi.api().ffi
    texts = [ffi.new("char[]", text) for text in (b"CPU", b"Metal", b"BLAS")]

    class Lib:
        """Three devices, as the declared functions of a Mac's build tell of them."""

        ggml_backend_dev_count = staticmethod(lambda: 3)
        ggml_backend_dev_get = staticmethod(lambda i: i)
        ggml_backend_dev_type = staticmethod(lambda i: [0, 1, 3][i])
        ggml_backend_dev_name = ggml_backend_dev_description = staticmethod(lambda i: texts[i])

        @staticmethod
        def ggml_backend_dev_memory(i: int, free: list[int], total: list[int]) -> None:
            free[0], total[0] = 1 << 30, 8 << 30

    monkeypatch.setattr(devices, "api", lambda: capi.Api(ffi, Lib(), capi.Log(), ()))
    metal, blas = devices.accelerators()
    assert str(metal) == "Metal (Metal, GPU, 8192 MiB)"
    assert (metal.holds_layers, blas.holds_layers) == (True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LlamaOptions(gpu_layers=20), r"can use no accelerator here; install xllamacpp=="),
        (LlamaOptions(gpu_layers=-1), r"can use no accelerator here"),
        (LlamaOptions(tensor_split=(3.0, 1.0)), r"has 2 shares, but .* can use 0 accelerators here \(none\)"),
        (LlamaOptions(gpu_layers=-2), "-1 for all, not -2"),
        (LlamaOptions(kv_type="fp8"), "unknown KV type 'fp8' for llama.cpp; choose one of: f32, f16"),
        (LlamaOptions(kv_type="q8_0", flash_attention="off"), "needs flash attention"),
        (LlamaOptions(flash_attention="maybe"), "auto, on or off"),
        (LlamaOptions(batch_rows=4), "from 8 to 8192"),
    ],
)
def test_options_that_the_build_lacks_or_that_are_wrong_are_refused(
    options: LlamaOptions, message: str, monkeypatch: pytest.MonkeyPatch, tiny_draft: Path
) -> None:
    monkeypatch.setattr(devices, "accelerators", list)
    with pytest.raises(ConfigError, match=message):
        LlamaDraft(tiny_draft, options=options)


@pytest.mark.parametrize(
    "options",
    [
        LlamaOptions(gpu_layers=5),
        LlamaOptions(tensor_split=(1.0,)),
        LlamaOptions(batch_rows=64),
        LlamaOptions(flash_attention="off"),
    ],
)
def test_exact_mode_takes_no_accelerator_and_says_what_does(
    options: LlamaOptions, with_gpu: None, tiny_target: Path
) -> None:
    with pytest.raises(ConfigError, match=r"exact mode computes on the CPU.*add --mode fast"):
        LlamaTarget(tiny_target, options=options)


def test_exact_mode_says_that_the_gpu_does_nothing(with_gpu: None, tiny_target: Path) -> None:
    engine = LlamaTarget(tiny_target, slots=1, slot_tokens=64)
    assert engine.info.mode == "exact"
    assert any("computes on the CPU, without Vulkan0" in n and "--mode fast" in n for n in engine.info.notes)
    engine.close()


def test_with_an_accelerator_calls_are_wide_and_batch_rows_decides(with_gpu: None, tiny_target: Path) -> None:
    wide = LlamaTarget(tiny_target, mode="fast", slots=1, slot_tokens=64)
    assert (wide.info.step_tokens, wide.context.rows) == (512, 512)
    wide.close()
    narrow = LlamaTarget(
        tiny_target, mode="fast", slots=1, slot_tokens=64, options=LlamaOptions(batch_rows=16)
    )
    assert (narrow.info.step_tokens, narrow.context.rows) == (16, 16)
    long = [i % 256 for i in range(40)]
    [result] = narrow.run([Slice(1, 0, 0, long)])  # in three calls
    assert len(result.tokens) == 1
    narrow.close()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_a_kv_type_is_the_contexts_and_in_the_digest(kv_type: str, tiny_target: Path) -> None:
    engine = LlamaTarget(
        tiny_target, mode="fast", slots=1, slot_tokens=64, options=LlamaOptions(kv_type=kv_type)
    )
    assert engine.context.kv_types == (KV_TYPES[kv_type],) * 2
    usual = LlamaTarget(tiny_target, mode="fast", slots=1, slot_tokens=64)
    assert (engine.info.digest == usual.info.digest) == (kv_type == "f16")
    [result] = engine.run([Slice(1, 0, 0, PROMPT)])
    assert len(result.tokens) == 1
    engine.close()
    usual.close()


def test_layers_and_shares_reach_the_library(
    with_gpu: None, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = capi.api()
    seen: list[tuple[int, list[float]]] = []

    class Lib:
        def __getattr__(self, name: str) -> object:
            return getattr(api.lib, name)

        def llama_model_load_from_file(self, path: bytes, params: object) -> object:
            shares = list(params.tensor_split[0:2]) if params.tensor_split else []  # type: ignore[attr-defined]
            seen.append((params.n_gpu_layers, shares))  # type: ignore[attr-defined]
            return api.lib.llama_model_load_from_file(path, params)

    from wisp.engines.llama import model

    monkeypatch.setattr(model, "api", lambda: capi.Api(api.ffi, Lib(), api.log, api.keep))
    LlamaDraft(tiny_draft, options=LlamaOptions(gpu_layers=7, tensor_split=(0.5,))).close()
    LlamaDraft(tiny_draft).close()
    assert seen == [(7, [0.5, 0.0]), (-1, [])]


def test_an_edges_model_takes_the_same_options(tiny_draft: Path) -> None:
    drafter, _ = load_drafter(
        str(tiny_draft), slots=1, threads=1, options=EngineOptions(kv_type="q8_0", batch_rows=8)
    )
    assert drafter is not None
    assert drafter.propose("a", PROMPT, 0, Sampling()) is not None
    with pytest.raises(ConfigError, match="--draft ngram has no model"):
        load_drafter("ngram", options=EngineOptions(gpu_layers=3))


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("vllm", EngineOptions(gpu_layers=3), r"--gpu-layers is for --engine llama\.cpp, not for vllm"),
        ("llama.cpp", EngineOptions(quantization="fp8"), "--quantization is for --engine vllm"),
        ("llama.cpp", EngineOptions(prefix_caching=False), "--no-prefix-caching is for --engine vllm"),
        ("emulated", EngineOptions(kv_type="q8_0"), r"--kv-type is for --engine llama\.cpp and vllm"),
    ],
)
def test_another_engines_option_is_refused_by_name(engine: str, options: EngineOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine(engine, options=options)


def test_options_travel_to_replicas_as_they_are_written(tiny_target: Path) -> None:
    engine, _ = load_target(str(tiny_target), mode="fast", slots=1, context=64, options={"kv_type": "f32"})
    assert isinstance(engine, LlamaTarget)
    assert engine.context.kv_types == (0, 0)
    engine.close()


@pytest.mark.parametrize(("text", "shares"), [("", ()), ("3,1", (3.0, 1.0)), ("0,1", (0.0, 1.0))])
def test_shares_are_numbers_by_comma(text: str, shares: tuple[float, ...]) -> None:
    assert parse_split(text) == shares


@pytest.mark.parametrize("text", ["a", "1,", "0,0", "-1,2", "nan"])
def test_other_shares_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tensor-split"):
        parse_split(text)


@pytest.mark.parametrize(
    ("usable", "seen", "status", "finding"),
    [
        ([GPU], "a GPU", "ok", "can use Vulkan0 (a card, GPU, 8192 MiB)"),
        ([], "an NVIDIA GPU", "warn", "has an NVIDIA GPU, and the installed llama.cpp can use none"),
        ([], "", "ok", "computes on the CPU"),
    ],
)
def test_the_doctor_names_what_the_wheel_can_use(
    usable: list[Accelerator], seen: str, status: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: usable)
    monkeypatch.setattr(doctor, "graphics", lambda: seen)
    check = doctor.accelerator()
    assert check.status == status
    assert finding in check.finding
    assert ("install xllamacpp==" in check.remedy) == (status == "warn")
