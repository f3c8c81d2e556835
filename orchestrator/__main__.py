"""``python -m orchestrator`` is ``lestd``."""

from orchestrator.cli import main

main()
