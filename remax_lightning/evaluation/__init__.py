"""How good the responses are."""
