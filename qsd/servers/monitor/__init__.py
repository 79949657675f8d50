"""QMP monitors: JSON commands in, answers and events out, on a character device."""
