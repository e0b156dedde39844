"""`python -m jaxflow` is the command line."""

from .cli import main

main()
