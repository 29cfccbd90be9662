#!/bin/sh
# /init of the test guest: writes blocks that describe themselves to /dev/vda, one after the other, and says on the
# console which it has flushed. tests/libvirt/pattern.py knows the format, and what must be found afterwards.
#
# Words of the kernel's command line: with `held=1` it waits until the first block of the disk is not empty (a guest that
# is saved then can be woken on any disk of that size), `rest=N` are microseconds between two blocks.
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /modules/*; do
  insmod "$module" || echo "INSMOD FAILED $module"
done
until [ -b /dev/vda ]; do usleep 20000; done
sum_of() { dd "if=$1" bs=4096 count=1 $2 2>/dev/null | md5sum; }
if [ -n "$held" ]; then
  echo HELD
  empty=$(sum_of /dev/zero)
  while [ "$(sum_of /dev/vda iflag=direct)" = "$empty" ]; do usleep 20000; done
fi
blocks=$(($(cat /sys/block/vda/size) / 8))
pad=
while [ ${#pad} -lt 128 ]; do pad=$pad.; done
echo "READY blocks=$blocks"
number=1
while :; do
  block=$((number * 7919 % blocks))
  head="BLOCK number=$number offset=$((block * 4096))"
  digest=$(echo "$head" | md5sum)
  # A record of 128 bytes, 32 times: a torn or mixed block shows.
  record="$head md5=${digest%% *} $pad"
  record=${record:0:127}_
  data=$record$record$record$record
  data=$data$data$data$data
  data=$data$data
  if printf %s "$data" | dd of=/dev/vda bs=4096 count=1 seek=$block iflag=fullblock conv=notrunc,fsync 2>/dev/null; then
    echo "FLUSHED $number"
  else
    echo "FAILED $number"
  fi
  number=$((number + 1))
  [ -z "$rest" ] || usleep "$rest"
done
