"""Progress bars in what a command wrote."""

import re


def bars(said: str) -> set[str]:
    """Names of the bars that know how much there is to do, and so how long it will take."""
    return set(re.findall(r"([^\r\n\x1b]+?): +\d+%\|[^\r\n]*\[\d\d:\d\d<", said))
