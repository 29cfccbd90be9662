"""The only code that talks to a hypervisor (QMP today, libvirt next)."""
