"""Disk images as files: bounded header reading, backing chains, the rules about where members may lie."""
