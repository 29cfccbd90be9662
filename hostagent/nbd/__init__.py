"""Images opened and exported by qemu-storage-daemon."""
