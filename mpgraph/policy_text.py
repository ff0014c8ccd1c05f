"""A policy as text: TOML for files, one line for logs and command lines.

Both go through the plain dictionary of ``Policy.to_dict``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mpgraph.errors import PolicyError

_PLAIN_VALUE = re.compile(r'[^\s;"=]+')
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<end>;)
      | (?P<key>\w+)=(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s;"=]+))
      | (?P<word>[^\s;"=]+)
    )""",
    re.VERBOSE,
)


def to_toml(policy: Mapping[str, Any]) -> str:
    """Return the TOML text of a policy's dictionary."""
    lines = [f"{key} = {_toml_string(policy[key])}" for key in ("preset", "on_unknown")]
    for override in policy["overrides"]:
        lines += ["", "[[overrides]]"]
        lines += [f"{key} = {_toml_string(value)}" for key, value in override.items()]
    return "\n".join(lines) + "\n"


def from_toml(text: str) -> dict[str, Any]:
    """Return the dictionary that a TOML text holds."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"the policy is not valid TOML: {error}") from error


def to_line(policy: Mapping[str, Any]) -> str:
    """Return one line: ``default on_unknown=fp32; module=decoder.* run=fp32``."""
    head = policy["preset"]
    if policy["on_unknown"] != "follow":
        head += f" on_unknown={policy['on_unknown']}"
    return "; ".join([head, *(override_line(override) for override in policy["overrides"])])


def override_line(override: Mapping[str, str]) -> str:
    """Return one override as ``module=decoder.* run=fp32``: what it does, without its reason."""
    said = ((key, value) for key, value in override.items() if key != "reason")
    return " ".join(f"{key}={_line_value(value)}" for key, value in said)


def from_line(line: str) -> dict[str, Any]:
    """Return the dictionary that one line holds; the inverse of ``to_line``."""
    statements: list[dict[str, Any]] = [{}]
    for key, value in _tokens(line):
        if key == ";":
            statements.append({})
        elif key == "preset" and (len(statements) > 1 or statements[0]):
            raise PolicyError(
                f"cannot read {value!r} in the policy {line!r}: after the preset, an override is "
                "written with its selectors' names, as in 'default; module=head run=fp32'"
            )
        elif key in statements[-1]:
            raise PolicyError(f"{key!r} is given twice in one part of the policy {line!r}")
        else:
            statements[-1][key] = value
    head, *overrides = statements
    if "preset" not in head:
        raise PolicyError(f"the policy {line!r} must start with the name of a preset")
    return {**head, "overrides": overrides}


def _tokens(line: str) -> Iterator[tuple[str, str]]:
    """Yield ``(key, value)``; a separator is ``(";", "")``, a bare word names the preset."""
    text = line.rstrip()
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PolicyError(
                f"cannot read the policy {line!r} at {text[position:]!r}: expected a preset's "
                f"name, then `; module=... run=...` for each override"
            )
        position = match.end()
        if match["end"]:
            yield ";", ""
        elif match["key"]:
            yield match["key"], _value(match)
        else:
            yield "preset", match["word"]


def _value(match: re.Match[str]) -> str:
    if match["quoted"] is None:
        return match["plain"]
    try:
        return str(json.loads(f'"{match["quoted"]}"', strict=False))
    except json.JSONDecodeError as error:
        raise PolicyError(f"cannot read the quoted text {match[0].strip()}: {error}") from error


def _line_value(value: str) -> str:
    return value if _PLAIN_VALUE.fullmatch(value) else json.dumps(value)


def _toml_string(value: str) -> str:
    # JSON escapes what TOML wants escaped, except DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
