"""Text of data and models as a terminal may show it."""

import re

INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: escape sequences, bell, carriage return
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # that change the direction of the text around them
    "\u2028\u2029"  # that some terminals take for newlines
    "\ud800-\udfff]"  # that cannot be encoded
)


def visible(text: str) -> str:
    r"""A text whose control characters are written as Python escapes, so that a terminal shows them and does nothing.

    Example:
        >>> print(visible("\x1b]0;title\x07 \u202eabc"))
        \x1b]0;title\x07 \u202eabc
    """
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
