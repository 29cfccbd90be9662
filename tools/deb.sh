#!/usr/bin/env bash
# tools/deb.sh [VERSION]    the Debian package of this tree, in dist/; VERSION where it is not the tree's
#
# The tree is built in build/deb, from its sdist: debian/ is units/debian, with a changelog, and wheels/ has the Python
# packages that Debian lacks. Those are fetched here, and checked against units/debian/requirements.txt; the build itself
# (dpkg-buildpackage) needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
source_version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
version=${1:-$source_version}
work=build/deb
tree=$work/hostagent-$version

rm -rf "$work"
mkdir -p "$work" dist
/usr/bin/python3 -m build --no-isolation --sdist --outdir "$work" . >/dev/null
tar -C "$work" -xf "$work/hostagent-$source_version.tar.gz"
[ "$version" = "$source_version" ] || mv "$work/hostagent-$source_version" "$tree"
cp -r "$tree/units/debian" "$tree/debian"

# The time of what is built, so that the same tree makes the same package.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
who="${DEBFULLNAME:-hostagent developers} <${DEBEMAIL:-hostagent@localhost}>"
cat >"$tree/debian/changelog" <<CHANGELOG
hostagent ($version) bookworm; urgency=medium

  * What has changed is in CHANGELOG.md.

 -- $who  $(date --utc --date="@$epoch" --rfc-email)
CHANGELOG

# pip refuses what is not as requirements.txt says.
/usr/bin/python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
  --dest "$tree/wheels" -r "$tree/debian/requirements.txt"

(cd "$tree" && dpkg-buildpackage --build=binary --no-sign)
cp "$work"/hostagent_"$version"_*.deb dist/
ls dist/hostagent_"$version"_*.deb
