"""Measures of a text that need no model: repetition, n-grams; and its safe display."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence

_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(name: str) -> str:
    """A name from the data for display: control characters and changes of text direction are escaped."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", name)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode a text: not half a surrogate pair, as in JSON, or in a file name in Latin-1."""
    return not re.search("[\ud800-\udfff]", text)


def line(error: BaseException, secret: str = "") -> str:
    """The message of an error, on one line that is not too long; its type where it has no message.

    Args:
        secret: text that must not appear; masked before the line is cut, which might leave half of it.
    """
    message = str(error).replace(secret, "***") if secret else str(error)
    return visible(" ".join(message.split()))[:300] or type(error).__name__


def policy_digest(content: str) -> str:
    """The digest by which a Content-Security-Policy names an inline script or style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return re.findall(r"\w+", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n: the number of different n-grams of words divided by the number of all (Li et al., 1510.03055).

    For one text, a low value means that the text repeats itself (Rae et al., 2112.11446, table A1). None if the texts
    have no n-gram.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None
