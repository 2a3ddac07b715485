"""The C client of tests/c as a shared library, its system calls routed to a SoftKvm."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdxmig_model.backend.softkvm import SoftKvm

SOURCES = Path(__file__).resolve().parent / "c"
COMPILER = shutil.which("gcc")
_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_PROTOTYPES = {
    "create_device": (_INT, ctypes.c_uint32, _INT),
    "ioctl": (_INT, _INT, ctypes.c_ulong, _POINTER),
    "mmap": (ctypes.c_int64, _INT, _SIZE, ctypes.c_int64),
    "munmap": (_INT, _POINTER, _SIZE),
    "close": (_INT, _INT),
    "put": (_INT, _POINTER, _SIZE),
    "get": (_INT, _POINTER, _SIZE),
}


class _Calls(ctypes.Structure):
    _fields_ = tuple((name, ctypes.CFUNCTYPE(*types)) for name, types in _PROTOTYPES.items())


def build(folder: Path, dialect: str) -> Path:
    """Compile the client for a dialect."""
    assert COMPILER is not None
    library = folder / f"client-{dialect}.so"
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared"]
    if dialect == "Gen-1b":
        options.append("-DTDX_GEN_1B")
    command = [COMPILER, *options, str(SOURCES / "client.c"), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return library


class Client:
    """One end of a migration, run by C code; `stream` is what it wrote, or what it has to read."""

    def __init__(self, library: Path, kvm: SoftKvm, stream: bytes = b"") -> None:
        # A copy of the file has its own state, so that both ends can be C.
        own = library.with_name(f"{library.stem}-{id(self)}.so")
        shutil.copy(library, own)
        self._code = ctypes.CDLL(str(own))
        self._code.client_cleanup.restype = None
        self.kvm = kvm
        self.stream = bytearray(stream)
        self.read = 0
        self.raised: list[BaseException] = []
        self._calls = _Calls(
            *(ctypes.CFUNCTYPE(*types)(self._routed(name)) for name, types in _PROTOTYPES.items())
        )

    def _routed(self, name: str) -> Callable[..., int]:
        target = getattr(self, f"_{name}", None) or getattr(self.kvm, name)

        def call(*arguments: Any) -> int:
            try:
                return target(*(argument or 0 for argument in arguments))
            except BaseException as error:
                self.raised.append(error)
                return -errno.EIO

        return call

    def _put(self, address: int, length: int) -> int:
        self.stream += ctypes.string_at(address, length)
        return 0

    def _get(self, address: int, length: int) -> int:
        data = bytes(self.stream[self.read : self.read + length])
        if len(data) < length:
            return -errno.EPIPE
        ctypes.memmove(address, data, length)
        self.read += length
        return 0

    def setup(self, streams: int, pages: int) -> int:
        return self._code.client_setup(ctypes.byref(self._calls), streams, pages)

    def call(self, name: str, *arguments: int) -> int:
        """A function of the client, by its name without the prefix."""
        types = (ctypes.c_uint64(argument) for argument in arguments)
        result = getattr(self._code, f"client_{name}")(*types)
        assert not self.raised, self.raised
        return result

    def send_pages(self, gpas: list[int], stream: int = 0, cancel: bool = False) -> int:
        """How many pages were refused, or -errno."""
        column = (ctypes.c_uint64 * len(gpas))(*gpas)
        result = self._code.client_send_pages(stream, column, len(gpas), int(cancel))
        assert not self.raised, self.raised
        return result
