"""Verification of programs in a sandbox."""
