"""Jobs on the disks of running guests, through libvirt."""
