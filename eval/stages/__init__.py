"""One file per benchmark stage: its cases, contenders and table."""
