"""Models and tokenizers; nothing here knows Lightning."""
