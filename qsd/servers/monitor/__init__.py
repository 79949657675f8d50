"""QMP monitors: sessions on character devices."""
