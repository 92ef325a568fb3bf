"""What draws a page's charts: plotly's script, packed, and the few lines that start it.

The library is the file that the Python package carries, gzip-compressed, in base64: 4.8 MB become
2 MB. The browser inflates it (DecompressionStream) and runs it under the page's policy, which names
the two scripts by their sha256 and lets no other run.
"""

import base64
import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bayesian_lora.errors import InputError

LIBRARY = Path("package_data") / "plotly.min.js"
STARTER = Path(__file__).parent / "templates" / "charts.js"


@dataclass(frozen=True)
class Drawing:
    """`library` packed, `starter` as it is, and the `policy` that allows both: CSP's script-src."""

    library: str
    starter: str
    policy: str


@lru_cache(maxsize=1)
def drawing() -> Drawing:
    """The scripts of a page with charts.

    Raises:
        InputError: plotly is not installed.
    """
    library = _library()
    starter = STARTER.read_text(encoding="utf-8")
    packed = gzip.compress(library, 9, mtime=0)  # the same page from the same figures
    sums = [hashlib.sha256(script).digest() for script in (library, starter.encode())]
    return Drawing(
        base64.b64encode(packed).decode(),
        starter,
        " ".join(f"'sha256-{base64.b64encode(found).decode()}'" for found in sums),
    )


def _library() -> bytes:
    # The package itself is not imported: that takes a second, and only this file is wanted.
    spec = importlib.util.find_spec("plotly")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / LIBRARY).is_file():
            return path.read_bytes()
    raise InputError(
        "plotly is not installed, which draws a report's charts: install it with 'pip install "
        "plotly>=6'"
    )
