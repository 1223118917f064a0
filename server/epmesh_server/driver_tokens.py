"""Tokens of drivers: made by a node service, verified by the rank, which shares a secret with it and is told nothing.

A token is a number, a nonce, and a MAC of both under the rank's session token. Numbers grow from driver to driver, so a
rank that has seen one refuses those of earlier drivers.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from epmesh.errors import Unauthenticated

_NUMBER_BYTES, _NONCE_BYTES, _MAC_BYTES = 8, 16, 32
_PURPOSE = b"epmesh driver"


def make_token(secret: bytes, number: int) -> bytes:
    """A token for the driver `number` of the rank whose session token is `secret`."""
    body = number.to_bytes(_NUMBER_BYTES, "big") + secrets.token_bytes(_NONCE_BYTES)
    return body + _mac(secret, body)


def verify_token(secret: bytes, token: bytes) -> int:
    """The number in a token.

    Raises:
        Unauthenticated: it was not made with `secret`.
    """
    body, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
    if len(token) != _NUMBER_BYTES + _NONCE_BYTES + _MAC_BYTES or not hmac.compare_digest(mac, _mac(secret, body)):
        raise Unauthenticated("the token is not that of a driver of this rank; attach to get one")
    return int.from_bytes(body[:_NUMBER_BYTES], "big")


def _mac(secret: bytes, body: bytes) -> bytes:
    return hmac.digest(secret, _PURPOSE + body, hashlib.sha256)
