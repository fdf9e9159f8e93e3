"""Command-line programs that evaluate: run as `python -m eval.NAME`."""
