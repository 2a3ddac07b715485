"""Who moves bytes between source and destination: in one process, over a socket, TLS or a file."""

from tdxmig_model.transport.address import Address
from tdxmig_model.transport.base import DEFAULT_TIMEOUT, Transport
from tdxmig_model.transport.capture import CapturedTransport, capture_paths
from tdxmig_model.transport.faults import Faults, FaultyLine, Span
from tdxmig_model.transport.file import FileReader, FileWriter
from tdxmig_model.transport.memory import MemoryTransport, memory_pair
from tdxmig_model.transport.queued import QueuedReceiver, QueuedSender
from tdxmig_model.transport.socket import Listener, SocketTransport, connect
from tdxmig_model.transport.tls import TlsFiles, TlsTransport, secure

__all__ = [
    "DEFAULT_TIMEOUT",
    "Address",
    "CapturedTransport",
    "Faults",
    "FaultyLine",
    "FileReader",
    "FileWriter",
    "Listener",
    "MemoryTransport",
    "QueuedReceiver",
    "QueuedSender",
    "SocketTransport",
    "Span",
    "TlsFiles",
    "TlsTransport",
    "Transport",
    "capture_paths",
    "connect",
    "memory_pair",
    "secure",
]
