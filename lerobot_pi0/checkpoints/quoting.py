"""Quoting of text that a stranger wrote (tasks, cameras, joints, repositories) for shells, Markdown and terminals."""

import html
import re
import shlex
import unicodedata

_MARKDOWN = re.compile(r"([\\`*\[\]|~])")


def plain(text: object, keep: str = "") -> str:
    """Text without control characters, which move a terminal's cursor, or begin a new line where one is expected.

    Also without those that turn the direction of writing, as what is read would then not be what is there.

    Args:
        keep: control characters that stay.
    """
    return "".join(
        x if x in keep or unicodedata.category(x) not in ("Cc", "Cf", "Zl", "Zp") else " " for x in str(text)
    )


def shell(text: object) -> str:
    """One word of a shell's command, whatever the text holds."""
    return shlex.quote(plain(text))


def markdown(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no cell's border."""
    return _MARKDOWN.sub(r"\\\1", html.escape(plain(text), quote=False))
