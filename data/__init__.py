"""Data sets, and what happens to images before the network gets them."""
