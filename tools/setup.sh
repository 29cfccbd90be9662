#!/usr/bin/env bash
# Install what is missing: distribution packages (apt), and a virtual environment in .venv. Says what it does.
set -euo pipefail
cd "$(dirname "$0")/.."

# program or module → Debian package
declare -A PROGRAMS=(
  [qemu-storage-daemon]=qemu-system-common [qemu-img]=qemu-utils [nbdinfo]=libnbd-bin [nbdkit]=nbdkit
  [setfacl]=acl [mkfs.xfs]=xfsprogs [mkfs.ext4]=e2fsprogs [curl]=curl [promtool]=prometheus
)
missing=()
PATH=$PATH:/usr/sbin:/sbin
for program in "${!PROGRAMS[@]}"; do
  command -v "$program" >/dev/null || missing+=("${PROGRAMS[$program]}")
done
/usr/bin/python3 -c 'import nbd' 2>/dev/null || missing+=(python3-libnbd)
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing ${missing[*]} with apt"
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: as root, run: apt install ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ ! -x .venv/bin/python ]; then
  echo "setup: making a virtual environment in .venv (with the distribution's libnbd binding)"
  /usr/bin/python3 -m venv --system-site-packages .venv
fi
echo "setup: installing Python packages into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
