"""The embedded job: a residual network on handwritten digits, scored while it trains, pruned and compared."""
