"""hostagent: owns what happens to disk images on a libvirt/QEMU hypervisor host."""

__version__ = "0.1.0"
