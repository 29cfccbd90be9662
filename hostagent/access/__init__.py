"""Who may open which file: the ledger, and the one converger that makes files match it."""
