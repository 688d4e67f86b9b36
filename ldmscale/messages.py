"""Text for people, made safe: no secrets, no control characters, no endless words, no line that a name could forge.

Names of other people's files, tensors, keys and the words of libraries go into messages. A terminal obeys escape
sequences, bidirectional marks reorder what a person reads, and a newline begins a line that the program never wrote.
"""

from __future__ import annotations

import logging
import re

from ldmscale import redact

_LONGEST_WORD = 500  # characters
_LONGEST_LINE = 6000
_INDENT = "    "

# C0 and C1 but for tab and newline, separators that some viewers break lines at, bidirectional marks, surrogates
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_LONG = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def shown(text: str) -> str:
    """`text` without secrets, control characters escaped as Python writes them, long words and lines cut.

    Newlines stay: a message may have several lines. `block` keeps them from beginning a line of their own.
    """
    text = _UNSAFE.sub(_escaped, redact.text(text))
    if len(text) > _LONGEST_WORD:
        text = _LONG.sub(lambda match: _cut(match[0], _LONGEST_WORD), text)
        text = "\n".join(_cut(line, _LONGEST_LINE) for line in text.split("\n"))
    return text


def block(text: str) -> str:
    """`shown`, with every line but the first indented, so that no name can forge another message."""
    first, *rest = shown(text).split("\n")
    return "\n".join([first, *(_INDENT + line if line else line for line in rest)])


def entry(text: str) -> str:
    """`text` as an entry of a list: `block` behind a dash, so that no other line looks like an entry."""
    return f"  - {block(text)}"


def name(text: str, longest: int = _LONGEST_LINE) -> str:
    """A foreign name as a file or a table may keep it: one line, as `shown`, of about `longest` characters at most."""
    return _cut(shown(text.replace("\n", "\\n")), longest)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}...({len(text)} characters)...{text[-limit // 6 :]}"


class Formatter(logging.Formatter):
    """Formats records so that each begins a line and no other line looks like one."""

    def format(self, record: logging.LogRecord) -> str:
        return block(super().format(record))
