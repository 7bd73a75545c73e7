"""A security key for tests: FIDO2 (CTAP 2.1) and U2F."""

from typing import TYPE_CHECKING

from farplug.lazy import lazy_import

if TYPE_CHECKING:
    from farplug.virtual.fido.credentials import KeyState, KeyStore, MemoryKeyStore
    from farplug.virtual.fido.key import PendingQuestion, SecurityKey, security_key_device
    from farplug.virtual.fido.key_file import KeyFile
from farplug.virtual.fido.presence import Answer, Presence, Question, Use

__all__ = [
    "Answer",
    "KeyFile",
    "KeyState",
    "KeyStore",
    "MemoryKeyStore",
    "PendingQuestion",
    "Presence",
    "Question",
    "SecurityKey",
    "Use",
    "security_key_device",
]

lazy_import(
    globals(),
    {
        "KeyFile": ".key_file",
        "KeyState": ".credentials",
        "KeyStore": ".credentials",
        "MemoryKeyStore": ".credentials",
        "PendingQuestion": ".key",
        "SecurityKey": ".key",
        "security_key_device": ".key",
    },
)
