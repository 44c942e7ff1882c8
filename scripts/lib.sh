# shellcheck shell=bash
# What the scripts share: messages, the cache, packages, and a private apt that
# reads Debian's archive without touching the system's own apt state.
# Sourced, never run.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${RINGBLK_CACHE:-${HOME:-/root}/.cache/ringblk}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# All scratch files of one run live here and go with it.
scratch_dir() { mktemp -d "${TMPDIR:-/tmp}/ringblk-${0##*/}.XXXXXX"; }

# need PACKAGE...: installs those that are not installed. Nothing happens, and
# no root is needed, where all of them are there.
need() {
    local missing=() p
    for p; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null || :)" = 'ii ' ] || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "needs these Debian packages, and there is no apt-get here: ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "not root; please run: apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    # The lists may be old or (in a fresh container) not there at all.
    apt-get update -qq </dev/null >&2
    # --no-remove: we add to a machine, and take nothing from it.
    DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends --no-remove \
        "${missing[@]}" </dev/null >&2 || die "could not install ${missing[*]}"
}

debian_codename() { (. /etc/os-release && echo "${VERSION_CODENAME:-}"); }

# The address of the Debian archive that this system itself is configured with.
# It is asked for, not known: sites have their own mirrors.
debian_mirror() {
    # shellcheck disable=SC2016 # apt's own format language
    apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v c="$(debian_codename)" '$3 == "main" && ($2 == c || $2 ~ /^(oldstable|stable|testing|sid)$/) { print $1; exit }'
}

# private_apt DIR LINE...: prepares DIR and writes the options to give apt-get
# and apt-cache into the array APT. LINE is "deb SUITE" or "deb-src SUITE".
private_apt() {
    local dir=$1 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg line
    shift
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "apt's configuration (/etc/apt) names no Debian archive with a 'main' component," \
        "so there is nowhere to fetch $* from; add Debian's to /etc/apt/sources.list"
    [ -r "$keyring" ] || die "$keyring is missing (package debian-archive-keyring); will not fetch unverified packages"
    mkdir -p "$dir/lists/partial" "$dir/cache"
    for line; do
        echo "${line% *} [signed-by=$keyring] $mirror ${line#* } main"
    done >"$dir/sources.list"
    APT=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache"
        -o APT::Sandbox::User=root -o Acquire::Languages=none -qq)
    # Warnings matter here: apt calls a list that it could not fetch a warning.
    apt-get "${APT[@]}" -o APT::Update::Error-Mode=any update </dev/null >&2 ||
        die "could not read these suites from $mirror: $*"
}
