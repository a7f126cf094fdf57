"""Models. Imports nothing, so that `engine.models.registry` stays free of torch."""
