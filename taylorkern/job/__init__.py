"""The command `taylorkern prune`: training, pruning, fine-tuning and a report, resumable at any moment."""
