"""A stored TD: the stream, its sealed key beside it, and a note that it was loaded.

A file can be copied, and a copy loaded again: two TDs would run from then on.  Nothing in a file
can prevent that; what we do is to note here that this one was used, and to refuse it afterwards.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.errors import UsageError
from tdxmig_model.premigration import KEY_SIZE, Identity, MigrationKey, Versions
from tdxmig_model.sealed import seal, unseal
from tdxmig_model.transport import FileReader, FileWriter
from tdxmig_model.transport.file import store_directory

_LONGEST_KEYS: Final = 4096


@dataclass(slots=True)
class Claim:
    """Whether the file was used: a TD runs from it."""

    used: bool = False


class StoredFile:
    """The files of one stored TD: `path`, `path`.keys and `path`.loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = path.with_name(path.name + ".keys")
        self.note = path.with_name(path.name + ".loaded")

    def check_free(self) -> None:
        """UsageError: something of the name is there already."""
        for path in (self.path, self.keys, self.note):
            if path.exists():
                raise UsageError(
                    f"{path} exists; a stored TD is not overwritten, choose another name"
                )

    def check_whole(self) -> None:
        """UsageError: the stream or its key is missing, or it was loaded before."""
        for path in (self.path, self.keys):
            if not path.is_file():
                raise UsageError(
                    f"there is no file {path}; tdxmig send file:{self.path} makes it, and the "
                    "stream has its name only when it is complete"
                )
        if self.note.exists():
            raise self._loaded()

    def create(
        self, backend: SoftBackend, identity: Identity, destination_certificate: bytes
    ) -> tuple[FileWriter, bytes]:
        """Seal the key of the source, store it, and open the stream; with the session id.

        The module of the source gets a key that nobody has: it needs one to begin, and no abort
        token made with it can ever exist.
        """
        key = MigrationKey(backend.read_migration_encryption_key())
        sealed, session_id = seal(identity, destination_certificate, key, Versions())
        backend.write_migration_decryption_key(secrets.token_bytes(KEY_SIZE))
        writer = FileWriter(self.path)
        try:
            _store(self.keys, sealed)
        except OSError as error:
            writer.discard()
            raise UsageError(f"cannot write {self.keys}: {error.strerror}") from error
        return writer, session_id

    def remove_keys(self) -> None:
        """After a migration that stored nothing."""
        with suppress(FileNotFoundError):
            self.keys.unlink()

    def open(
        self, backend: SoftBackend, identity: Identity, source_certificate: bytes
    ) -> tuple[FileReader, bytes]:
        """Give the sealed key to the module of the destination, and open the stream.

        PeerError: the key is not for us, or not of this source.
        """
        try:
            with self.keys.open("rb") as file:
                sealed = file.read(_LONGEST_KEYS)
        except OSError as error:
            raise UsageError(f"cannot read {self.keys}: {error.strerror}") from error
        agreement = unseal(sealed, identity, source_certificate, Versions())
        backend.write_migration_decryption_key(agreement.peer_key.take())
        return FileReader(self.path), agreement.session_id

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """While the file is loaded nobody else loads it, and nobody afterwards if it was used.

        The note is stored before anything is imported: after a power failure it is there, although
        the TD may never have run.  UsageError: it was loaded before.
        """
        claim = Claim()
        try:
            _store(self.note, b"This stored TD was loaded; it must not run twice.\n")
        except FileExistsError as error:
            raise self._loaded() from error
        except OSError as error:
            raise UsageError(f"cannot write {self.note}: {error.strerror}") from error
        try:
            yield claim
        except BaseException:
            claim.used = True  # nobody knows how far it came
            raise
        finally:
            if not claim.used:
                self.note.unlink()

    def _loaded(self) -> UsageError:
        return UsageError(
            f"{self.path} was loaded before, or is being loaded ({self.note} says so): the TD "
            "would run twice; remove that note only if you know that it never ran"
        )


def _store(path: Path, data: bytes) -> None:
    """A new file that survives a power failure, for its owner alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    store_directory(path.parent)
