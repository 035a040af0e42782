"""One file for each mode of main.py except training."""
