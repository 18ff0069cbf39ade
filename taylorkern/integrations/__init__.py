"""Our scores in other projects' tools; each module imports its own, and nothing else here does."""
