"""Datasets made of a model's own samples: cold start and rejection sampling."""
