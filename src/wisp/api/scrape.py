"""/metrics of all processes: the common part.

Every series has the label `model_name`, as vLLM's have. Series with the label `key` name customers. Where keys are
configured, an admin key reads all of them and any other key its own; a request without a key reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import Response

from wisp.api.counting import Counter, Histogram, Histograms
from wisp.api.errors import error_response, request_id
from wisp.api.keys import Keyring
from wisp.core.errors import RequestError


class Registry(CollectorRegistry):
    """A registry that makes its metrics, with our prefix before their names."""

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self, f"wisp:{name}", text, labels)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *, signed: bool = False) -> Histogram:
        return Histograms(self, f"wisp:{name}", text, buckets, signed=signed).of[0]

    def histograms(
        self, name: str, text: str, buckets: Sequence[float], label: str, values: Sequence[str]
    ) -> list[Histogram]:
        """One for each value of the label."""
        return Histograms(self, f"wisp:{name}", text, buckets, label, values).of

    def gauge(self, name: str, text: str, read: Callable[[], float] | None = None) -> Gauge:
        """`read`: called whenever the value is asked for."""
        gauge = Gauge(f"wisp:{name}", text, registry=self)
        if read is not None:
            gauge.set_function(read)
        return gauge


def scraped(request: Request, registry: CollectorRegistry, model: str, keys: Keyring) -> Response:
    """All that the caller may see, in the text format that Prometheus reads; as OpenMetrics where that is asked for.
    `model`: "" while none is known."""
    try:
        shown = _shown(keys, request.headers.get("authorization"))
    except RequestError as error:
        return error_response(error, request_id(request))
    view = _View(registry, model, shown)
    if "application/openmetrics-text" in request.headers.get("accept", ""):
        # Without that, colons become underscores, and no query of a dashboard finds its metric.
        page = openmetrics.generate_latest(view, escaping="allow-utf-8")  # type: ignore[no-untyped-call]
        return Response(page, media_type=openmetrics.CONTENT_TYPE_LATEST)
    page = generate_latest(view)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def read_page(page: str) -> dict[str, float]:
    """The values of such a page by name and labels as they are written there, but for the model's name."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items() if k != "model_name")
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def _shown(keys: Keyring, header: str | None) -> Callable[[str], bool]:
    """Of which keys may the caller see series? Raises RequestError 401 for a wrong key."""
    if not keys:
        return lambda key: True
    if header is None:
        return lambda key: False
    caller = keys.authorize(header)
    return lambda key: key == caller or keys.is_admin(caller)


class _View(CollectorRegistry):
    """A registry as one caller sees it."""

    def __init__(self, registry: CollectorRegistry, model: str, shown: Callable[[str], bool]) -> None:
        super().__init__()
        self._of = registry
        self._model = {"model_name": model} if model else {}
        self._shown = shown

    def collect(self) -> Iterable[Metric]:
        for metric in self._of.collect():
            seen = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            seen.samples = [
                sample._replace(labels=self._model | sample.labels)
                for sample in metric.samples
                if "key" not in sample.labels or self._shown(sample.labels["key"])
            ]
            yield seen
