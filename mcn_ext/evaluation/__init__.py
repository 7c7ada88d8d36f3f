"""Embeds a store with a trained model, and measures what it finds."""
