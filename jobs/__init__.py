"""What we do to a disk. Standard library and `events` only: no libvirt, no sqlite, no subprocess."""
