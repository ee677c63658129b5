"""What must not leave this machine with a config, a command line or a message."""

import os
import re
from collections.abc import Mapping
from typing import Any

# names of environment variables whose values are secrets
SECRET_NAME = re.compile(r"key|token|secret|passw|pwd|credential|auth|cookie|dsn|webhook", re.IGNORECASE)
SHORTEST = 6  # characters of a secret: shorter values, such as 1 or true, are none
IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@host
# ?token=… and --api-key=… in addresses and command lines
ASSIGNED = re.compile(
    r"([\w-]*(?:api[_-]?key|token|secret|passw(?:or)?d|credential|signature)[\w-]*\s*[=:]\s*)[^\s&;,'\"]+",
    re.IGNORECASE,
)
HIDDEN = "***"


def without_secrets(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Plain values, nested or not, with `***` for what is secret in their texts: values of environment
    variables with a name such as X_TOKEN, passwords in addresses, and what is assigned to such a name.
    """
    known = os.environ if environment is None else environment
    secrets = [
        text for name, text in known.items() if SECRET_NAME.search(name) and len(text.strip()) >= SHORTEST
    ]
    return _hide(value, sorted(secrets, key=len, reverse=True))


def _hide(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {_hide(key, secrets): _hide(part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(part, secrets) for part in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return ASSIGNED.sub(rf"\g<1>{HIDDEN}", IN_URL.sub(HIDDEN, value))
