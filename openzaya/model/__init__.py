"""The ZAYA model and its checkpoint layouts."""
