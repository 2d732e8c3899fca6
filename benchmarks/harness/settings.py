"""Settings of a recipe on a benchmark's command line."""

from __future__ import annotations

import json
from typing import Any


def parsed(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE as fields of a recipe; values are JSON, or else text."""
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
