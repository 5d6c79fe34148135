"""`wisp serve --replicas N` as a process: a launcher, a router, and the end of both."""

from __future__ import annotations

import asyncio

from wisp.api.keys import Keyring
from wisp.api.process import event_loop_factory, run_app
from wisp.core.errors import ConfigError
from wisp.router.app import RouterApp
from wisp.router.launch import Launcher, LocalLauncher
from wisp.router.replica import ReplicaSpec

LAUNCHERS = ("local", "ray")


def serve_replicas(spec: ReplicaSpec, keys: Keyring, replicas: int, launcher: str, gpus: float) -> None:
    """Serve until stopped. Raises WispError."""
    if spec.listen.port == 0:
        raise ConfigError("replicas take the ports above the router's: give --port a number")
    if gpus and launcher != "ray":
        raise ConfigError("--gpus-per-replica goes with --launcher ray")
    try:
        spec.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"a replica is told of files by names in UTF-8, and {error.object!r} is none; rename it"
        ) from None
    launch = _launcher(launcher, gpus, keyed=bool(keys))

    async def run() -> None:
        router = RouterApp(spec, replicas, launch, keys)
        await run_app(
            router.asgi, spec.listen, router.drain, router.fleet.ended, keyed=bool(keys), at_once=launch.close
        )
        if router.failed is not None:
            raise router.failed

    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(run())
    finally:
        launch.close()


def _launcher(name: str, gpus: float, *, keyed: bool) -> Launcher:
    if name == "local":
        return LocalLauncher()
    if name == "ray":
        from wisp.router.ray_launcher import RayLauncher

        return RayLauncher(gpus, keyed=keyed)
    raise ConfigError(f"unknown launcher {name!r}; choose one of: {', '.join(LAUNCHERS)}")
