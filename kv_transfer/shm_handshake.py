"""How the two ends of a shared-memory transport prove to each other that they know the source's secret.

    reader                                   source
    Hello(nonce r)                -->
                                  <--        Challenge(nonce s, HMAC(secret, "source", r, s))
    Proof(HMAC(secret, "reader", r, s)) -->
                                  <--        greeting and descriptor

The secret is of the source's process and part of its endpoint, which travels in the Open of a transfer alone, under
mutual TLS where services have certificates. So a process of the same user that finds the socket gets nothing, and one
that took over the socket's name is found out before the reader maps anything. It comes on top of the check of users.

HMAC-SHA256 over fields of fixed size; the roles' labels differ, so that no answer can be sent back as its own proof.
"""

from __future__ import annotations

import hmac
import secrets

from tandem.errors import PermissionDeniedError

NONCE_BYTES = 32
MAC_BYTES = 32
_HELLO, _CHALLENGE, _PROOF = b"TNDMHEL1", b"TNDMCHA1", b"TNDMPRF1"
_SOURCE, _READER = b"tandem-shm-source", b"tandem-shm-reader"
LONGEST_MESSAGE = len(_CHALLENGE) + NONCE_BYTES + MAC_BYTES


class SourceHandshake:
    """The source's side of one connection: `answer` to each message until `proven`."""

    def __init__(self, secret: bytes) -> None:
        """`secret` of the source."""
        self._secret = secret
        self._reader_nonce = self._nonce = b""
        self.proven = False
        """The reader knows the secret."""

    def answer(self, message: bytes) -> bytes:
        """The Challenge to a Hello; nothing to a good Proof. Raises PermissionDeniedError for anything else."""
        if not self._nonce:
            self._reader_nonce = _body(message, _HELLO, NONCE_BYTES)
            self._nonce = secrets.token_bytes(NONCE_BYTES)
            return _CHALLENGE + self._nonce + _mac(self._secret, _SOURCE, self._reader_nonce, self._nonce)
        if self.proven:
            raise _failed("a reader has nothing more to say")
        proof = _body(message, _PROOF, MAC_BYTES)
        if not hmac.compare_digest(proof, _mac(self._secret, _READER, self._reader_nonce, self._nonce)):
            raise _failed("the reader doesn't know the secret")
        self.proven = True
        return b""


class ReaderHandshake:
    """The reader's side of one connection: `hello`, then `proof` in answer to the Challenge."""

    def __init__(self, secret: bytes) -> None:
        """`secret` as the endpoint told it."""
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self) -> bytes:
        """The first message."""
        return _HELLO + self._nonce

    def proof(self, challenge: bytes) -> bytes:
        """The second message. Raises PermissionDeniedError when the other end isn't the source that was meant."""
        body = _body(challenge, _CHALLENGE, NONCE_BYTES + MAC_BYTES)
        nonce, mac = body[:NONCE_BYTES], body[NONCE_BYTES:]
        if not hmac.compare_digest(mac, _mac(self._secret, _SOURCE, self._nonce, nonce)):
            raise _failed("the sender doesn't know its own secret: another process is there")
        return _PROOF + _mac(self._secret, _READER, self._nonce, nonce)


def _mac(secret: bytes, label: bytes, reader_nonce: bytes, source_nonce: bytes) -> bytes:
    return hmac.digest(secret, label + reader_nonce + source_nonce, "sha256")


def _body(message: bytes, magic: bytes, size: int) -> bytes:
    if len(message) != len(magic) + size or not message.startswith(magic):
        raise _failed("a malformed message")
    return message[len(magic) :]


def _failed(what: str) -> PermissionDeniedError:
    return PermissionDeniedError(f"the handshake for shared memory failed: {what}", reason="SHM_HANDSHAKE")
