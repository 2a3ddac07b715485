"""The channels of the destination: records in the order in which they can be taken.

Each channel is parsed on its own and has its own order.  A record that has to wait for others stays
at the head of its channel, and that channel is not read further meanwhile: what is kept is bounded
by what one read brings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from tdxmig_model.errors import PeerLost
from tdxmig_model.transport.base import Transport
from tdxmig_model.wire.records import Record, RecordParser

RECEIVE_SIZE = 1 << 20


class Inlet:
    """One channel: its transport, its parser, and what was read and not yet taken."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.parser = RecordParser()
        self.records: deque[Record] = deque()
        self.lost: PeerLost | None = None

    @property
    def readable(self) -> bool:
        """Whether more may be read: nothing waits, and the connection has not ended."""
        return not self.records and self.lost is None

    def read(self) -> bool:
        """Take in what has arrived, without waiting; False if there is nothing."""
        try:
            if not self.transport.poll(0.0):
                return False
            self.records.extend(self.parser.records(self.transport.recv(RECEIVE_SIZE)))
        except PeerLost as error:
            self.lost = self._inside(error)
        return True

    def _inside(self, error: PeerLost) -> PeerLost:
        if self.parser.at_boundary:
            return error
        at = self.parser.offset
        return PeerLost(f"{error}; the stream ends inside the record at byte {at}")


class Inlets:
    """All channels of a destination; the first one has everything but memory of other streams.

    `ready` says whether a record has everything before it here.  With one channel it is not asked:
    nothing could still come that a record waits for.
    """

    def __init__(self, transports: Sequence[Transport], ready: Callable[[Record], bool]) -> None:
        self.channels = [Inlet(transport) for transport in transports]
        self._ready = ready

    @property
    def at_boundary(self) -> bool:
        """True if no channel is inside a record."""
        return all(inlet.parser.at_boundary for inlet in self.channels)

    @property
    def awaited(self) -> list[Transport]:
        """The channels that are read."""
        return [inlet.transport for inlet in self.channels if inlet.readable]

    def take(self) -> Record | None:
        """The next record that can be taken, or None.

        The channels take turns, so that none of them waits for the memory of another.
        """
        for number, inlet in enumerate(self.channels):
            if inlet.records and self._may_be_taken(inlet.records[0]):
                self.channels.append(self.channels.pop(number))
                return inlet.records.popleft()
        return None

    def _may_be_taken(self, record: Record) -> bool:
        return len(self.channels) == 1 or self._ready(record)

    def read(self) -> bool:
        """Read the channels that can be read; False if nothing had arrived."""
        arrived = False
        for inlet in self.channels:
            arrived |= inlet.readable and inlet.read()
        return arrived

    def lost(self) -> PeerLost | None:
        """How the first channel that ended did so, if one ended with nothing left to take."""
        return next((one.lost for one in self.channels if one.lost and not one.records), None)

    @property
    def unfinished(self) -> int:
        """Offset of the first record that is not complete, in the stream of its channel."""
        inside = (one.parser for one in self.channels if not one.parser.at_boundary)
        return next((parser.offset for parser in inside), 0)

    def held_back(self) -> Record | None:
        """A record that waits for others."""
        return next((one.records[0] for one in self.channels if one.records), None)
