"""What happened to a disk. Standard library only; imports nothing of ours."""
