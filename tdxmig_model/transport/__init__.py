"""Who moves bytes between source and destination: inside one process, or over a socket."""

from tdxmig_model.transport.base import DEFAULT_TIMEOUT, Transport
from tdxmig_model.transport.capture import CapturedTransport, capture_paths
from tdxmig_model.transport.memory import Faults, MemoryTransport, memory_pair
from tdxmig_model.transport.queued import QueuedReceiver, QueuedSender
from tdxmig_model.transport.socket import Address, Listener, SocketTransport, connect

__all__ = [
    "DEFAULT_TIMEOUT",
    "Address",
    "CapturedTransport",
    "Faults",
    "Listener",
    "MemoryTransport",
    "QueuedReceiver",
    "QueuedSender",
    "SocketTransport",
    "Transport",
    "capture_paths",
    "connect",
    "memory_pair",
]
