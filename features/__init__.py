"""Features of images for metrics: Inception, and reference statistics."""
