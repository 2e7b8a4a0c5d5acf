"""TLS of a client: the files that the config names in, a context out that verifies the other side, always.

There is no way to a context that does not: nothing here, and nothing of the config, can switch that off.
"""

import hashlib
import ssl
from pathlib import Path

from relay.model import TlsFiles

_LARGEST_FILE = 4 << 20


class TlsFilesError(Exception):
    """A file that cannot be used: `key` of the config names it, the text says why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


def read_files(ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles | None:
    """Look at the files, so that what is wrong with them is known before a receiver is asked.

    None when there are none. Raises TlsFilesError.
    """
    digest = hashlib.sha256()
    for name, path in (("tls_ca_file", ca), ("client_cert_file", cert), ("client_key_file", key)):
        digest.update(_content(name, path) if path is not None else b"")
        digest.update(b"\0")
    if ca is cert is key is None:
        return None
    files = TlsFiles(ca=ca, cert=cert, key=key, digest=digest.digest())
    context_of(files)
    return files


def context_of(files: TlsFiles | None) -> ssl.SSLContext:
    """Return a client's context: authorities of the file, else of the system; TLS 1.2 at least.

    Raises TlsFilesError.
    """
    try:
        context = ssl.create_default_context(cafile=files.ca if files is not None else None)
    except OSError as error:
        raise TlsFilesError("tls_ca_file", _why(error, "holds no certificate in PEM form")) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files is not None and files.cert is not None:
        _show_certificate(context, files.cert, files.key)
    elif files is not None and files.key is not None:
        raise TlsFilesError("client_key_file", "stands without client_cert_file")
    return context


def _show_certificate(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except OSError as error:
        raise TlsFilesError("client_cert_file", _why(error, "holds no certificate in PEM form")) from error
    place = "client_key_file" if key is not None else "client_cert_file"
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        why = (
            "does not belong to the certificate of client_cert_file"
            if error.reason == "KEY_VALUES_MISMATCH"
            else "holds no private key in PEM form"
        )
        raise TlsFilesError(place, why) from error
    except _PasswordError as error:
        raise TlsFilesError(place, "is encrypted, and there is nobody to ask for the password") from error
    except OSError as error:
        raise TlsFilesError(place, _why(error, "cannot be used")) from error


class _PasswordError(Exception):
    """OpenSSL wants a password."""


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, and wait.
    raise _PasswordError


def _content(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise TlsFilesError(name, _why(error, "cannot be read")) from error
    if len(content) > _LARGEST_FILE:
        raise TlsFilesError(name, "is larger than any such file")
    return content


def _why(error: OSError, otherwise: str) -> str:
    if isinstance(error, ssl.SSLError):
        return otherwise
    return f"cannot be read: {error.strerror or error}"
