"""Options, files, devices and progress: nothing about score models."""
