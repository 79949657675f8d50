"""Jobs: what takes long, is steered over QMP while it runs, and reports its end."""
