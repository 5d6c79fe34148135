"""Replicas as Ray actors: Ray finds a machine with the resources, and gives each replica its GPUs.

An actor runs the ordinary app in a thread of its own and listens there; neither edges nor the router talk to it
through Ray. With RAY_ADDRESS the cluster there is used, otherwise a small Ray of our own is started here, which
listens on loopback alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

from wisp.api.logs import set_up_logging
from wisp.api.process import event_loop_factory
from wisp.api.tracing import set_up_tracing
from wisp.api.web_guard import is_loopback
from wisp.core.errors import ConfigError
from wisp.router.launch import Running, own_url
from wisp.router.replica import ReplicaSpec, listen_above, run_replica

log = logging.getLogger("wisp.router")

WAIT_S = 20.0  # between complaints that there is no room in the cluster
LINE = 200  # characters of what Ray says
STORE = 80 << 20  # bytes; nothing goes through Ray's object store


class ReplicaActor:
    """What Ray runs."""

    def __init__(self, line: bytes, router_ip: str) -> None:
        import ray

        spec = ReplicaSpec.decode(line)
        ip = ray.util.get_node_ip_address()
        self._here = ip == router_ip
        host = spec.listen.host
        if not self._here:
            if is_loopback(host):
                raise ConfigError(
                    f"this replica runs on {ip}, and edges could not reach it there, since the router listens on "
                    f"{host}; use --host 0.0.0.0, with --api-keys"
                )
            host = ip
        self._ip = ip
        self._tls = spec.listen.cert is not None
        self._bound = listen_above(host, spec.listen.port)  # held, or another replica might take it
        self._spec = spec.on(host, int(self._bound.getsockname()[1]))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._done = threading.Event()
        self._why = "ended"
        set_up_logging(spec.log_level, form=spec.log_format, who=spec.name)
        set_up_tracing("wisp-serve")
        threading.Thread(target=self._main, name="replica", daemon=True).start()

    def where(self) -> tuple[str, str, int]:
        """(address for edges, URL for the router, process id)"""
        port = self._spec.listen.port
        if self._here:
            return f":{port}", own_url(self._spec.listen.host, port, tls=self._tls), os.getpid()
        ip = f"[{self._ip}]" if ":" in self._ip else self._ip
        return f"{ip}:{port}", own_url(self._ip, port, tls=self._tls), os.getpid()

    def wait(self) -> str:
        """Blocks until the server has ended. Returns how."""
        self._done.wait()
        return self._why

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._over.set)

    def _main(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()

            async def stopped() -> None:
                await self._over.wait()

            await run_replica(self._spec, stopped, signals=False, bound=self._bound)

        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                runner.run(serve())
        except BaseException as error:
            self._why = str(error) or repr(error)
            logging.getLogger("wisp.serve").error("%s", self._why)
        finally:
            self._done.set()


class RayLauncher:
    """Starts actors. To be made before the event loop runs, in the main thread: Ray sets up signals."""

    name = "ray"

    def __init__(self, gpus: float = 0.0, *, keyed: bool = False) -> None:
        """`gpus` for each replica; keyed: are there API keys? Raises ConfigError where a cluster has none, Ray
        is not installed, or its cluster not there."""
        cluster = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
        if cluster and not keyed:
            raise ConfigError(
                "RAY_ADDRESS names a cluster, whose processes listen beyond this machine: give --api-keys or "
                "WISP_API_KEYS, or unset it for a Ray on loopback"
            )
        if not cluster:
            # Ray's own name for loopback alone; `_node_ip_address` is turned into an outer address
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        try:
            import ray
        except ImportError:
            raise ConfigError("--launcher ray needs Ray: pip install 'wisp-serve[ray]'") from None
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
        if not cluster:
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": STORE}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot start or reach Ray: {error}") from None
        self._ray = ray
        self._ip = ray.util.get_node_ip_address()
        self._actors: list[Any] = []
        # No CPUs are claimed: what a replica needs of them is not Ray's to know, and it spreads them anyway.
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(max_concurrency=4, **options)(ReplicaActor)

    async def start(self, spec: ReplicaSpec) -> Running:
        """Start an actor, as soon as the cluster has room for one. Raises ConfigError if it fails."""
        actor = self._actor.remote(spec.encode(), self._ip)
        self._actors.append(actor)
        where = asyncio.ensure_future(_result(actor.where.remote()))
        try:
            while not (await asyncio.wait({where}, timeout=WAIT_S))[0]:
                log.warning("replica %s waits for room in the Ray cluster; see `ray status`", spec.name)
            address, url, pid = where.result()
        except self._ray.exceptions.RayError as error:
            raise ConfigError(f"replica {spec.name} could not start: {_reason(error)}") from None
        except BaseException:  # nobody else knows of it
            where.cancel()
            self._ray.kill(actor)
            raise
        log.info("replica %s is process %d, at %s", spec.name, pid, url)
        return _ActorHandle(self._ray, actor, address, url)

    def close(self) -> None:
        """End our Ray, and with it whatever is left."""
        self._ray.shutdown()


class _ActorHandle:
    def __init__(self, ray: Any, actor: Any, address: str, url: str) -> None:
        self._ray = ray
        self._actor = actor
        self.address = address
        self.url = url

    async def ended(self) -> str:
        try:
            return str(await _result(self._actor.wait.remote()))
        except self._ray.exceptions.RayError as error:
            return _reason(error)
        finally:
            self.kill()  # the server has ended; its process still holds the GPUs

    def stop(self) -> None:
        self._actor.stop.remote()

    def kill(self) -> None:
        self._ray.kill(self._actor)


async def _result(reference: Any) -> Any:
    return await reference


def _reason(error: Exception) -> str:
    """Ray's errors carry whole tracebacks, whose last line says it; the others their reason in the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines[-1] if any(line.startswith("File ") for line in lines) else lines[0]
    return said if len(said) <= LINE else f"{said[:LINE]}..."
