#!/usr/bin/env bash
# tools/setup.sh run       what the agent and `make demo` need
# tools/setup.sh develop   that, and what tests and linters need (the default)
#
# Installs what is missing and says so: Debian packages with apt (through sudo when not root), and a virtual
# environment in .venv, which sees the distribution's libnbd binding. Nothing else on the machine is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
purpose=${1:-develop}

# program → its Debian package
declare -A programs=(
  [qemu-storage-daemon]=qemu-system-common [qemu-img]=qemu-utils [qemu-io]=qemu-utils
  [nbdinfo]=libnbd-bin [nbdcopy]=libnbd-bin [getfacl]=acl [curl]=curl [ps]=procps
)
extra='[dbus]'
case $purpose in
  run) ;;
  develop)
    programs+=([mkfs.xfs]=xfsprogs [mkfs.ext4]=e2fsprogs [gcc]=gcc [openssl]=openssl)
    programs+=([virsh]=libvirt-clients)  # the figures' peer
    programs+=([systemd-analyze]=systemd [systemd-nspawn]=systemd-container [dbus-daemon]=dbus [pkaction]=polkitd)
    programs+=([nbdkit]=nbdkit [libvirtd]=libvirt-daemon [qemu-system-x86_64]=qemu-system-x86 [busybox]=busybox-static)
    programs+=([vagrant]=vagrant)
    programs+=([man]=man-db [zsh]=zsh [fish]=fish)  # manual pages and completions are tried in them
    programs+=([dh]=debhelper [debootstrap]=debootstrap [pip3]=python3-pip)  # make deb, and its test
    extra='[dbus,test]'
    ;;
  *)
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
    ;;
esac

missing=()
for program in "${!programs[@]}"; do
  command -v "$program" >/dev/null || missing+=("${programs[$program]}")
done
[ "$purpose" = run ] || [ -e /usr/include/dlfcn.h ] || missing+=(libc6-dev)  # the tests make a disk that fails
headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
[ "$purpose" = run ] || /usr/bin/python3 -c "$headers" || missing+=(python3-dev)  # ovirt-imageio is built from source
/usr/bin/python3 -c 'import nbd' 2>/dev/null || missing+=(python3-libnbd)
[ "$purpose" = run ] || /usr/bin/python3 -c 'import libvirt' 2>/dev/null || missing+=(python3-libvirt)
[ "$purpose" = run ] || [ -e /usr/share/vagrant-plugins/plugins.d/vagrant-libvirt.json ] || missing+=(vagrant-libvirt)
[ "$purpose" = run ] || /usr/bin/python3 -c 'import build, setuptools, wheel' 2>/dev/null ||
  missing+=(python3-build python3-setuptools python3-wheel)  # make dist
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  echo "setup: installing with apt: ${missing[*]}"
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: there is no sudo; as root: apt install ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  echo "setup: making a virtual environment in .venv"
  /usr/bin/python3 -m venv --clear --system-site-packages .venv
fi
echo "setup: installing into .venv: hostagent$extra and the Python packages that it needs"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extra"

# unpacked PACKAGE TO PATH…: these alone, in .venv/TO. The package would start a service on this machine, or change it.
unpacked() {
  [ "$purpose" = develop ] && [ ! -e ".venv/$2/$(basename "$3")" ] || return 0
  echo "setup: unpacking ${*:3} into .venv/$2"
  (
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$1" && dpkg-deb -x ./*.deb .)
    mkdir -p ".venv/$2"
    for path in "${@:3}"; do cp -r "$work/$path" ".venv/$2/"; done
  )
}
unpacked prometheus bin usr/bin/prometheus usr/bin/promtool
unpacked apparmor bin sbin/apparmor_parser
unpacked libvirt-daemon-system libvirt etc/libvirt lib/systemd/system  # for the container in tests/systemd

# Guests of the tests boot Debian's cloud kernel. It is only unpacked: this machine's own boot is not touched.
guest=.venv/guest
if [ "$purpose" = develop ] && [ ! -e "$guest/vmlinuz" ]; then
  kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
  if [ "$(uname -m)" = x86_64 ] && [ -n "$kernel" ]; then
    echo "setup: unpacking $kernel into $guest for the tests' guests"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$kernel" && dpkg-deb -x ./*.deb .)
    mkdir -p "$guest"
    find "$work/lib/modules" -name 'virtio*.ko' -exec cp {} "$guest" \;
    cp "$work"/boot/vmlinuz-* "$guest/vmlinuz"
  else
    echo "setup: there is no linux-image-cloud-amd64 here: tests with guests are skipped" >&2
  fi
fi
