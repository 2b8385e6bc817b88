"""The demo's own problem set, and the program that wrote it."""
