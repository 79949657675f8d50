"""The only room that speaks raw Linux."""
