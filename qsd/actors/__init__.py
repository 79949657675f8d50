"""Who lives: actors, their supervisor, the node graph, objects, events."""
