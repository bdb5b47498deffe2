"""Trainers: narrow subclasses of TRL's, and what they share."""
