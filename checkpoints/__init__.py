"""Weights in files: folders of runs, and formats of other programs."""
