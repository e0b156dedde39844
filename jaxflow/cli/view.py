"""`jaxflow view RUN...`: runs in a browser, while they are written."""

import contextlib
import threading
import webbrowser

from .._folder import short_names
from ..view import WatchedRun, serving
from .boundary import Stopped
from .console import say
from .reading import Viewing


def view(s: Viewing):
    """Serves the page until Ctrl-C or SIGTERM."""
    runs = [WatchedRun(*pair) for pair in zip(s.runs, short_names(s.runs), strict=True)]
    with contextlib.suppress(KeyboardInterrupt, Stopped), serving(runs, s.port) as url:
        say(url)
        say("Ctrl-C ends it. The page is of this machine alone: who has the URL reads the runs.")
        if s.browser:
            _open(url)
        while not threading.Event().wait(3600):
            pass


def _open(url: str):
    """Opens a window, where there is a browser that has one: a text browser would take the
    terminal."""
    with contextlib.suppress(webbrowser.Error):
        browser = webbrowser.get()
        if type(browser) is not webbrowser.GenericBrowser:
            browser.open(url)
