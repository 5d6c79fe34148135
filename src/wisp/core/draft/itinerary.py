"""The itinerary of a session on a device: which server serves it, and where it goes next; no I/O, no clock, no chance.

    home --Open--> a verifier                       it answers: the session is served at home
    home --Open--> a router --Redirect--> address   the Open is repeated there, and the drafts that were said since
    address --lost, full, shutting down--> home     the session is opened again, with the address to avoid

A session begins at home, the server that the user named. A router redirects it to a verifier. When that verifier is
lost, is full or shuts down, the session comes home and opens again from what is committed. If the router names only
useless verifiers for too long, the session ends. A session without a token is refused at once when a second verifier is
full: its user can try again later, and loses nothing.

The host connects, sends and waits. It passes the drafter's messages through `say`, and all that arrives through
`heard` and `lost`. Their answers tell it what to do.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from wisp.core.draft.patience import Patience
from wisp.core.draft.refusals import model_changed
from wisp.core.errors import RequestError, UnavailableError
from wisp.core.protocol.messages import (
    Cancel,
    Draft,
    Open,
    Redirect,
    Refused,
    ServerMessage,
    Verdict,
    Welcome,
)

HOME = None  # instead of an address: the server that the user named
ELSEWHERE = frozenset({"shutting_down", "overloaded"})  # one verifier's refusals; another may accept
MAX_LOSSES = 5  # a request that kills its verifiers must not go round the whole fleet for ever
BOUNCE_S = (0.05, 2.0)  # shortest and longest wait at home, from the second trip in vain

Said = Open | Draft | Cancel


class Send(msgspec.Struct, frozen=True):
    """Send these messages to `Itinerary.at`. Its `welcome` says what it takes from now on."""

    messages: list[Said]
    welcome: Welcome


class Go(msgspec.Struct, frozen=True):
    """Connect to `address`, and listen only there from now on."""

    address: str


class Home(msgspec.Struct, frozen=True):
    """Nothing is in flight any more, and only home is listened to.

    after_s: seconds until the session is to be opened again, if home is connected then; None: when it is connected
    """

    after_s: float | None


# Verdict, Refused: for the drafter. Welcome: open the session, or open it again, with this verifier. None: do nothing.
Step = Send | Go | Home | Welcome | Verdict | Refused | None


class Itinerary:
    """The itinerary of one session. `patience` is that of the connection to home, and times are seconds of its clock.

    at: the address where the session is, or to which it is on its way; HOME at home
    """

    def __init__(self, session: str, patience: Patience, jitter: Callable[[], float] = lambda: 1.0) -> None:
        """`jitter`: makes a factor for each wait, so that many devices do not come back in the same moment."""
        self.session = session
        self.at: str | None = HOME
        self._patience = patience
        self._jitter = jitter
        self._opening: Open | None = None  # not answered yet: to be repeated where a router redirects it to
        self._since: list[Draft] = []  # drafts said behind it, which are repeated, too
        self._avoid = ""  # the address that was of no use
        self._trips = 0  # from an address back home, since the last verdict
        self._astray_since = 0.0  # when the first of them ended
        self._home_since = 0.0  # when the last of them ended
        self._begun = False  # it has tokens
        self._full = False  # a verifier had no room for it before it began

    def say(self, message: Said) -> list[Said]:
        """The drafter says `message`. Returns what is to be sent to `at` now."""
        if isinstance(message, Cancel):
            return [message]
        under_way = self.at is not HOME and self._opening is not None
        if isinstance(message, Open):
            self._begun = self._begun or bool(message.committed)
            if self.at is HOME and self._avoid:
                message = msgspec.structs.replace(message, avoid=self._avoid)
            if self.at is HOME or under_way:
                self._opening, self._since = message, []
        elif self._opening is not None:
            self._since.append(message)
        return [] if under_way else [message]

    def heard(self, where: str | None, message: ServerMessage, now_s: float) -> Step:
        """`message` arrived from the address `where`. A Welcome says that there is a connection to it.

        Raises RequestError if the session cannot go on.
        """
        if where != self.at:
            return None  # it was said before the session moved
        if isinstance(message, Welcome):
            return self._arrive(message)
        if message.session != self.session:
            return None
        if isinstance(message, Verdict):
            self._opening, self._avoid, self._trips, self._begun = None, "", 0, True
            return message
        opening = self._opening
        if isinstance(message, Redirect):
            if where is not HOME or opening is None:
                return None  # the answer to an Open that a later one replaced
            self.at = message.address
            return Go(message.address)
        if where is not HOME and message.code in ELSEWHERE:
            if message.code == "overloaded" and not self._begun:
                if self._full:
                    return message
                self._full = True
            return self._come_home(now_s, message.message, refused=True)
        if opening is not None and message.code == "unknown_session" and message.round > opening.round:
            return None  # a router takes no drafts; this one is repeated where the router sends the session
        return message

    def lost(self, where: str | None, now_s: float, why: str = "") -> Step:
        """The connection to `where` is gone, or could not be made; `why` is for the error.

        Raises RequestError if the session cannot go on.
        """
        if where != self.at:
            return None
        return Home(None) if where is HOME else self._come_home(now_s, why, refused=False)

    def left_s(self, now_s: float) -> float:
        """Without a connection to home: seconds to wait before asking again; 0: give up."""
        return self._patience.left_s(now_s, self._home_since)

    def _arrive(self, welcome: Welcome) -> Step:
        opening = self._opening
        if self.at is HOME or opening is None:
            return welcome
        if opening.digest and welcome.digest != opening.digest:
            raise model_changed()
        self._opening = None
        if not _takes(welcome, opening, self._since):
            return welcome
        return Send([opening, *self._since], welcome)

    def _come_home(self, now_s: float, why: str, *, refused: bool) -> Home:
        """The verifier at `at` is lost, full, shut down or out of reach: ask the router again."""
        useless = refused or self._opening is not None  # it never served this session, or will not
        wait_s, now_s = 0.0, self._patience.beat(now_s)
        self._home_since = now_s
        self._trips += 1
        if self._trips == 1:
            self._astray_since = now_s
        else:
            wait_s = min(BOUNCE_S[0] * 2**self._trips, BOUNCE_S[1]) * self._jitter()
            in_time = now_s <= self._astray_since + self._patience.give_up_s
            if not in_time and (useless or self._trips > MAX_LOSSES):
                raise self._astray(why, useless=useless)
        if useless:
            self._avoid = self.at or ""
        self.at, self._opening = HOME, None
        return Home(wait_s)

    def _astray(self, why: str, *, useless: bool) -> RequestError:
        if useless:
            message = f"the router sends sessions to {self.at}, which is of no use from here ({why})"
            return UnavailableError(f"{message}; is that port open to this device?")
        message = f"{self._trips} verifiers in a row were lost over this request; it is not tried again"
        return RequestError(502, message, code="verifiers_lost", type="server_error")


def _takes(welcome: Welcome, opening: Open, since: list[Draft]) -> bool:
    """Are all drafts within this verifier's limits? They were made for those of home."""
    drafts = [opening.draft, *(d.tokens for d in since)]
    drafts += [[b.token, *b.tokens] for d in since for b in d.branches]
    branches = max((len(d.branches) for d in since), default=0)
    return max(map(len, drafts)) <= welcome.max_draft and branches <= welcome.max_branches
