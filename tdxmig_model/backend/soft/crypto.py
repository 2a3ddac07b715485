"""AES-256-GCM as the TDX module uses it for migration, with nothing of its own inside.

IV = IV_COUNTER (8 bytes, little-endian), MIGS_INDEX (2 bytes), two zero bytes; tags of 128 bits.
A page has a message of its own (AAD = the GPA list entry); a state bundle is one message over all
its metadata pages (AAD = the MBMD).  Facts of TDX module 1.5.01.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext
from cryptography.hazmat.primitives.ciphers import Cipher as _Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from tdxmig_model.wire.constants import MAC_SIZE, PAGE_SIZE

SLOT_SIZE: Final = PAGE_SIZE + MAC_SIZE

IvObserver = Callable[[bytes, bytes], None]
"""Called with (key, iv) before every encryption."""

__all__ = ["SLOT_SIZE", "InvalidTag", "IvObserver", "StreamCipher"]


class StreamCipher:
    """The key of one migration stream, and the room in which one page is worked on.

    `observer` sees each (key, iv) that encrypts; a test proves with it that no pair repeats.
    """

    __slots__ = ("_key", "_observer", "aead", "slot", "suffix")

    def __init__(self, key: bytes, migs_index: int, observer: IvObserver | None = None) -> None:
        self._key = key
        self._observer = observer
        self.aead = AESGCM(key)
        self.suffix = migs_index.to_bytes(2, "little") + b"\0\0"
        # Ciphertext and tag side by side, as the library wants them.
        self.slot = memoryview(bytearray(SLOT_SIZE))

    @property
    def key(self) -> bytes:
        """The 32-byte key."""
        return self._key

    def observe(self, counter: int) -> None:
        """Somebody else is about to encrypt under this IV."""
        if self._observer:
            self._observer(self._key, self.iv(counter))

    def iv(self, counter: int) -> bytes:
        """The 12-byte IV of this stream for one value of IV_COUNTER."""
        return counter.to_bytes(8, "little") + self.suffix

    def tag(self, counter: int, aad: bytes) -> bytes:
        """The 16-byte tag over `aad` alone."""
        iv = self.iv(counter)
        if self._observer:
            self._observer(self._key, iv)
        return self.aead.encrypt(iv, b"", aad)

    def tag_ok(self, counter: int, aad: bytes, mac: bytes) -> bool:
        """Is `mac` the tag over `aad` alone?"""
        try:
            self.aead.decrypt(self.iv(counter), mac, aad)
        except InvalidTag:
            return False
        return True

    def encrypt_page(self, counter: int, aad: bytes, page: memoryview) -> memoryview:
        """Encrypt 4096 bytes; the result, ciphertext then tag, is valid until the next call."""
        iv = counter.to_bytes(8, "little") + self.suffix
        if self._observer:
            self._observer(self._key, iv)
        self.aead.encrypt_into(iv, page, aad, self.slot)
        return self.slot

    def seal_again(self, counter: int, aad: bytes, page: memoryview) -> memoryview:
        """`encrypt_page` of a page that was observed already: the same result, not a second use."""
        self.aead.encrypt_into(self.iv(counter), page, aad, self.slot)
        return self.slot

    def decrypt_page(self, counter: int, aad: bytes, target: memoryview) -> bool:
        """Decrypt what the caller put into `slot` (ciphertext, tag) into 4096 bytes of `target`.

        False on a wrong tag; `target` is then undefined.
        """
        iv = counter.to_bytes(8, "little") + self.suffix
        try:
            self.aead.decrypt_into(iv, self.slot, aad, target)
        except InvalidTag:
            return False
        return True

    def start_encryption(self, counter: int, aad: bytes) -> AEADEncryptionContext:
        """A message that is encrypted page by page."""
        iv = self.iv(counter)
        if self._observer:
            self._observer(self._key, iv)
        context = _Cipher(AES(self._key), GCM(iv)).encryptor()
        context.authenticate_additional_data(aad)
        return context

    def start_decryption(self, counter: int, aad: bytes) -> AEADDecryptionContext:
        """A message that is decrypted page by page; its tag is known only at the end."""
        context = _Cipher(AES(self._key), GCM(self.iv(counter))).decryptor()
        context.authenticate_additional_data(aad)
        return context
