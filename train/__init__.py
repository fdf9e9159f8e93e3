"""Command-line programs that train: run as `python -m train.NAME`."""
