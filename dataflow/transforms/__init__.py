"""What happens to samples between storage and batch: images, tokens, and any callable, the same wherever it runs."""
