#!/usr/bin/env bash
# vagrant/provision.sh   what a hypervisor host needs: libvirt, hostagent as its package or from this checkout, and the
#                        programs of the smoke test. Debian 12, as root; again as often as you like.
#
# HOSTAGENT_DEB        the package to install (a path from the repository's root), or `none`; default: the newest in
#                      dist/. Where there is none: `make setup`, and a link to its program
# HOSTAGENT_BIN        the folder of that link (/usr/local/bin)
# HOSTAGENT_SERVICES   `no` starts and changes none; default: whether this host has systemd
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "provision: run it as root" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin
bin=${HOSTAGENT_BIN:-/usr/local/bin}
services=${HOSTAGENT_SERVICES:-$([ -d /run/systemd/system ] && echo yes || echo no)}

install() {
  echo "provision: installing with apt: $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# program → its Debian package
declare -A programs=(
  [make]=make [qemu-img]=qemu-utils [nbdinfo]=libnbd-bin [virsh]=libvirt-clients [qemu-system-x86_64]=qemu-system-x86
)
missing=()
for program in "${!programs[@]}"; do
  command -v "$program" >/dev/null || missing+=("${programs[$program]}")
done
[ "$services" = no ] || [ -e /lib/systemd/system/libvirtd.service ] || missing+=(libvirt-daemon-system)
[ ${#missing[@]} -eq 0 ] || install "${missing[@]}"

package=${HOSTAGENT_DEB:-}
if [ -z "$package" ]; then
  for each in dist/*.deb; do
    [ -e "$each" ] || continue
    if [ -z "$package" ] || [ "$each" -nt "$package" ]; then package=$each; fi
  done
fi
if [ "${package:-none}" = none ]; then
  echo "provision: no package: make setup"
  make setup
  mkdir -p "$bin"
  ln -sfn "$PWD/.venv/bin/hostagent" "$bin/hostagent"
else
  [ -e "$package" ] || { echo "provision: there is no $package: see HOSTAGENT_DEB" >&2; exit 1; }
  install "$(realpath "$package")"
  [ "$services" = no ] || systemctl enable --now hostagent.socket hostagent.service
fi
[ "$services" = no ] || systemctl enable --now libvirtd.service
echo "provision: done"
