"""README and docs, run and compared with the code."""
