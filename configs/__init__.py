"""One file for each experiment, their presets, and all keys (`schema`)."""
