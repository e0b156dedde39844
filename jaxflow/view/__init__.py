"""Runs in a browser: a server on this machine alone, which reads run folders and writes nothing.

    with serving([WatchedRun(Path("runs/a"), "a")], port=0) as url: ...

It answers a request if its path begins with the random token of the URL and its Host is this
server. What a run folder holds is data: no script of it runs, no text of it is HTML, and no path
leads out of it.
"""

from .runs import WatchedRun
from .server import serving

__all__ = ["WatchedRun", "serving"]
