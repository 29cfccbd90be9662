"""The data daemon from outside: its dialect, its clients, attacks and faults, on real images and real NBD servers."""
