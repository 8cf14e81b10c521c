"""Reading of JSON files that this package writes, with errors that name the file, what it holds and what is expected."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


_MAX_KEYS, _MAX_CHARS = 5, 80  # of a description

_NAMES = {bool: "a truth value", str: "a text", int: "a number", float: "a number", type(None): "null"}


def read_json_object(path: str | os.PathLike, where: str, expected: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """
    Reads a file with a JSON object.

    Args:
        path (`str` or `os.PathLike`): the file.
        where (`str`): argument and file, the start of messages.
        expected (`str`): what the file must hold, for messages.
        keys (`Iterable[str]`, *optional*): keys that the object must have.

    Returns:
        `dict`

    Raises:
        ValueError: if the file has another format.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_autogaze.utils.json_files import read_json_object

    >>> _ = Path("list.json").write_text("[1, 2]")
    >>> read_json_object("list.json", "'list.json'", "settings")
    Traceback (most recent call last):
    ValueError: 'list.json' must hold settings, got a list of 2 entries

    ```
    """
    content = parse_json(Path(path).read_bytes(), where, expected)
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{where} must hold {expected}, got {describe_json(content)}")
    return content


def parse_json(text: str | bytes, where: str, expected: str) -> Any:
    """Parses JSON in UTF-8; raises a ValueError as [`read_json_object`] does."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must hold {expected}, but it is no JSON: {error}") from error


def describe_json(content: Any) -> str:
    """Describes a JSON value in a few words, for messages."""
    if isinstance(content, dict):
        names = [name if len(name) <= _MAX_CHARS else f"{name[:_MAX_CHARS]}.." for name in content]
        more = ", .." if len(names) > _MAX_KEYS else ""
        return f"an object with the keys {', '.join(names[:_MAX_KEYS])}{more}" if names else "an empty object"
    if isinstance(content, list):
        return f"a list of {len(content)} entries"
    text = json.dumps(content)
    return f"{_NAMES[type(content)]}, {text if len(text) <= _MAX_CHARS else f'{text[:_MAX_CHARS]}..'}"
