"""What the options of `serve` come to."""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from mpillama.cli.engines import check_engine_options
from mpillama.cli.options import ServeOptions
from mpillama.cli.values import parse_bytes, refuse_unwritable
from mpillama.errors import UserError
from mpillama.redaction import keep_secret
from mpillama.server.rendezvous import default_path, is_loopback


@dataclass(frozen=True)
class Settings:
    """What the options come to."""

    key: str | None = field(repr=False)
    made_key: bool
    body_bytes: int
    rendezvous: Path


def check(options: ServeOptions) -> Settings:
    """Raise UserError for what is wrong with the options."""
    check_engine_options(options)
    for name in ("queue", "connections", "body_timeout", "write_timeout", "request_timeout"):
        if getattr(options, name) < (0 if name == "queue" else 1):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give at least 1.")
    if options.grace < 0:
        raise UserError(f"--grace is {options.grace:g}: give 0 seconds or more.")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UserError("--tls-certificate and --tls-key go together: give both.")
    key, made = _key(options)
    if key is None and not options.no_auth and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} is reached from other machines: give a key (--api-key auto makes one, "
            "--api-key-file, MPILLAMA_API_KEY), or say --no-auth."
        )
    keep_secret(key)
    path = Path(options.rendezvous) if options.rendezvous else default_path(os.environ)
    refuse_unwritable("--rendezvous", str(path))
    return Settings(key, made, parse_bytes("--body-limit", options.body_limit), path)


def _key(options: ServeOptions) -> tuple[str | None, bool]:
    """The key, and whether it was made here."""
    given = options.api_key or os.environ.get("MPILLAMA_API_KEY") or None
    if options.api_key_file:
        try:
            given = (Path(options.api_key_file).read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {options.api_key_file}: cannot be read ({error}).") from error
    if options.no_auth and given:
        raise UserError("--no-auth and a key exclude each other: leave one out.")
    if given == "auto":
        return secrets.token_urlsafe(24), True
    if given is not None and not (given and given.isascii() and given.isprintable() and " " not in given):
        raise UserError("the API key must be printable ASCII without blanks: choose another one.")
    return given, False
