"""Cold-start data and rejection sampling."""
