"""``python -m cogvlm.cli``."""

from . import main

main()
