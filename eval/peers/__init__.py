"""One file per peer: what other software does for the same job, for side-by-side measurements."""
