"""What decides in a router: its replicas, where their sessions go, and its own thin clients, wired to each other."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from wisp.api.keys import Keyring
from wisp.core.route.placement import Placement
from wisp.core.verify.admission import Admission
from wisp.router.fleet import Fleet, Replica
from wisp.router.host import RouterHost
from wisp.router.launch import Launcher
from wisp.router.metrics import RouterMetrics
from wisp.router.replica import ReplicaSpec
from wisp.router.thin import RouterBackend
from wisp.server.control import Report

UNLIMITED = 1 << 40  # sessions: the placement knows when all replicas are full


class Routing:
    """A router without its HTTP. Build it on the running event loop. Arguments: see `Fleet`."""

    def __init__(
        self,
        launcher: Launcher,
        spec: Callable[[Replica], ReplicaSpec],
        tls: ssl.SSLContext | None,
        keys: Keyring,
        *,
        drain_s: float,
    ) -> None:
        self._keys = keys
        self.placement = Placement()
        self.metrics = RouterMetrics(lambda: self.fleet)
        self.fleet = Fleet(
            launcher,
            spec,
            self.placement,
            tls,
            drain_s=drain_s,
            changed=self._changed,
            heard=self._heard,
        )
        admission = Admission(UNLIMITED, keys.limits)
        self.host = RouterHost(self.fleet, self.placement, admission, self.metrics)
        self.backend = RouterBackend(self.host, tls)

    def ready(self) -> RouterHost:
        """The host. Raises UnavailableError while no replica is up."""
        self.host.welcome()
        return self.host

    def keys_changed(self) -> None:
        self.host.admission.set_limits(self._keys.limits)

    def _changed(self) -> None:
        self.host.changed()
        self.backend.changed()

    def _heard(self, replica: Replica, report: Report) -> None:
        self.host.heard(replica, report)
