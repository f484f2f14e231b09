"""Finds what is wrong with a DSN of PostgreSQL before anything is connected to: parameters, and the files of TLS.

For such faults the driver raises the errors of a server that cannot be reached, or quotes the value, which may be a
part of the password. The texts here name the parameter, and quote no value.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ..reasons import certificate_fault

__all__ = ["settings_fault"]

_TLS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_VERIFYING = ("verify-ca", "verify-full")
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": _TLS,
    "ssl_max_protocol_version": _TLS,
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "gsslib": ("gssapi", "sspi"),
}
_IN_ENVIRONMENT = {
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
"""The environment variables of parameters, where they are not PG and the name in capitals."""
_OF_USER = Path("~/.postgresql")
"""Where libpq and the driver look for the files of TLS that are not named."""


def settings_fault(dsn: str, error: Exception) -> str:
    """Why the driver could not even try to connect; empty if it tried, and `error` is the outcome of that."""
    try:
        given = {name: values[-1] for name, values in parse_qs(urlsplit(dsn).query).items()}
    except ValueError:
        given = {}

    def setting(name: str) -> str | None:
        return given.get(name) or os.environ.get(_in_environment(name))

    for name, choices in _CHOICES.items():
        if (value := setting(name)) is not None and value not in choices:
            return f"{name} of the DSN, or {_in_environment(name)}, is one of {', '.join(choices)}"
    mode = setting("sslmode") or "prefer"
    if fault := _tls_fault(mode, setting):
        return fault
    if isinstance(error, OSError):
        return ""
    if setting("sslnegotiation") == "direct" and mode not in ("require", *_VERIFYING):
        return "sslnegotiation=direct needs sslmode=require, verify-ca or verify-full"
    if not isinstance(error, ValueError):
        return "the DSN has not as many ports as hosts" if "port numbers" in str(error) else ""
    return (
        "the DSN cannot be understood: a port is a number, a parameter has a value, and in a password what is not a "
        "letter or a digit is percent-encoded"
    )


def _in_environment(name: str) -> str:
    """The environment variable for a parameter of the DSN."""
    return _IN_ENVIRONMENT.get(name, f"PG{name.upper()}")


def _tls_fault(mode: str, setting: Callable[[str], str | None]) -> str:
    """What is wrong with the files of TLS that `mode` needs; empty if nothing is."""
    if mode == "disable":
        return ""
    authorities: dict[str, str] = {}
    if mode in ("require", *_VERIFYING):
        root = str(_OF_USER.expanduser() / "root.crt")
        if (path := setting("sslrootcert")) is not None:
            authorities["sslrootcert"] = path
        elif mode != "require" and not os.path.exists(root):
            return (
                f"sslmode={mode} needs the certificate of the authority that the server's is from, and there is no "
                f"file {_OF_USER / 'root.crt'}; name one by sslrootcert="
            )
        elif os.path.exists(root):
            authorities[str(_OF_USER / "root.crt")] = root
        if (path := setting("sslcrl")) is not None:
            authorities["sslcrl"] = path
    pair: list[tuple[str, str] | None] = []
    for name, default in (("sslcert", "postgresql.crt"), ("sslkey", "postgresql.key")):
        path = str(_OF_USER.expanduser() / default)
        if (given := setting(name)) is not None:
            pair.append((name, given))
        else:
            pair.append((str(_OF_USER / default), path) if os.path.exists(path) else None)
    certificate, key = pair
    return certificate_fault(authorities, certificate, key if certificate else None, setting("sslpassword") or "")
