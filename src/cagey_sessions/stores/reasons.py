"""Says why an engine cannot be reached, without quoting its address.

The texts of drivers contain the host, the user or a path: parts of a URL. If a password in the URL was not
percent-encoded, these may be parts of the password, and must not get into a log. So errors of the operating system and
of TLS are put into words here, by what they mean.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Mapping

__all__ = ["SettingsError", "certificate_fault", "reason_of", "without_names"]

_NUMBER = re.compile(r"\[Errno (\d+)\]")
_QUOTE = "[\"'`\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300c\u300d]"
_NAMED = re.compile(f"{_QUOTE}.*{_QUOTE}", re.DOTALL)


class SettingsError(Exception):
    """A connection cannot even be tried, because of a value in the URL or the environment, or a file named there."""


def reason_of(error: BaseException) -> str:
    """The reason in an error of the operating system or of TLS, without the address or the file; may be empty."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message.partition(", certificate is not valid for")[0]
        return f"the certificate of the server is refused: {reason}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'unknown error').replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    if isinstance(error, OSError):
        number = error.errno
        if number is None and (found := _NUMBER.search(str(error))):  # asyncio joins the errors of several addresses
            number = int(found[1])
        return "" if number is None else os.strerror(number)
    return ""


def without_names(text: str) -> str:
    """The answer of a server, without the names that it quotes: the user, the database, a setting."""
    return _NAMED.sub("…", text)


def certificate_fault(
    authorities: Mapping[str, str], certificate: tuple[str, str] | None, key: tuple[str, str] | None, password: str = ""
) -> str:
    """What is wrong with the files for TLS; empty if nothing is.

    Each file is given with the name of its setting, which the message names. Reads the files, and so blocks: call it
    only after a connection has failed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, path in (*authorities.items(), *filter(None, (certificate, key))):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            return f"the file of {name} cannot be read: {reason_of(error)}"
        except ValueError:
            return f"{name} is no path of a file"
    for name, path in authorities.items():
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ValueError):
            return f"the file of {name} has no certificate in it"
    if certificate is not None:
        try:
            context.load_cert_chain(certificate[1], key and key[1], password=lambda: password)
        except (OSError, ValueError):
            names = certificate[0] if key is None else f"{certificate[0]} and {key[0]}"
            return f"{names}: these files are no certificate with its key, or the key has another password"
    return ""
