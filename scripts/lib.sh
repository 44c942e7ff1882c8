# shellcheck shell=bash
# What the scripts share: how a failure ends a run, the cache, and where tools
# come from. Nothing is installed: what a script needs is unpacked into the cache.
# Sourced, never run.
#
# A script whose first argument is --setup-only fetches all that it needs, and
# stops where it calls `set_up`.

set -euo pipefail
set -E
# A failure in $(...) is one too.
shopt -s inherit_errexit

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$(realpath -m "${RINGBLK_CACHE:-${HOME:-/root}/.cache/ringblk}")
SETUP_ONLY=0
[ "${1:-}" != --setup-only ] || { SETUP_ONLY=1; shift; }

# The one way in which a run ends early: what failed says so in the last line,
# once. Status 99 means that it has been said; subshells and callers pass it on.
# For this, $(...) stands in assignments only: elsewhere bash ignores its status.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 99; }
# shellcheck disable=SC2317 # called by the trap
failed() {
    [ "$1" = 99 ] || say "failed with status $1, at line $2: $3"
    exit 99
}
trap 'failed $? $LINENO "$BASH_COMMAND"' ERR

set_up() { [ $SETUP_ONLY = 0 ] || { say "set up"; exit 0; }; }

# All scratch files of one run live here and go with it.
scratch_dir() { mktemp -d "${TMPDIR:-/tmp}/ringblk-${0##*/}.XXXXXX"; }

# From here on, the cache's commands come before this machine's.
with_tools() {
    local dir
    dir=$("$ROOT/scripts/tools")
    PATH=$dir:$PATH
}

# with_compiler COMMAND...: these (cc, c++) and libclang, of which the build makes
# the kernel's declarations: this machine's, or else the cache's.
with_compiler() {
    local dir command lack=''
    command -v cargo >/dev/null || die "no cargo here; ringblk needs a Rust toolchain"
    for command; do
        echo 'int main(void) { return 0; }' | "$command" -x c -o /dev/null - 2>/dev/null || lack+="$command "
    done
    has_libclang || lack+=libclang
    [ -n "$lack" ] || return 0
    dir=$("$ROOT/scripts/compiler")
    PATH=$dir/commands:$PATH
    export LIBCLANG_PATH=$dir/libclang BINDGEN_EXTRA_CLANG_ARGS="--sysroot=$dir/sysroot"
}

# Where clang-sys, which finds it for the build, looks.
has_libclang() {
    local dir
    for dir in ${LIBCLANG_PATH:+"$LIBCLANG_PATH"} /usr/lib/llvm-*/lib /usr/local/llvm*/lib* /usr/lib*/*-linux-gnu /usr/lib{,64} /usr/local/lib{,64}; do
        ! compgen -G "$dir/libclang.so*" >/dev/null || return 0
        ! compgen -G "$dir/libclang-[0-9]*so*" >/dev/null || return 0
    done
    return 1
}

debian_codename() { (. /etc/os-release && echo "${VERSION_CODENAME:-}"); }

# The address of the Debian archive that this system itself is configured with.
# It is asked for, not known: sites have their own mirrors. A system may say that it
# is of another release than it is set up for (base-files of a later one), and others'
# archives have releases of the same names: one whose path ends like Debian's comes first.
debian_mirror() {
    local codename
    codename=$(debian_codename)
    # shellcheck disable=SC2016 # apt's own format language
    apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v own="$codename" '
            $3 != "main" { next }
            $2 != own && $2 !~ /^(bookworm|trixie|forky|duke|sid|oldstable|stable|testing|unstable)$/ { next }
            $1 ~ /\/debian\/?$/ && !debian { debian = $1 }
            !other { other = $1 }
            END { if (debian) print debian; else if (other) print other }'
}

# private_apt SUITE...: writes into the array APT the options with which apt-get
# and apt-cache see these suites of Debian, and a system where nothing is
# installed. Whoever else wants the same waits until this script has ended.
private_apt() {
    local suites=$* mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite lock
    local dir=$CACHE/apt/${suites// /+}
    command -v apt-get >/dev/null || die "no apt-get here: needs a Debian system, to fetch packages of $suites"
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "apt's configuration (/etc/apt) names no Debian archive with a 'main' component," \
        "so there is nowhere to fetch $suites from; add Debian's to /etc/apt/sources.list"
    [ -r "$keyring" ] || die "$keyring is missing (package debian-archive-keyring); will not fetch unverified packages"
    mkdir -p "$dir"/{lists,archives}/partial "$dir/state"
    exec {lock}>"$dir/lock"
    flock "$lock"
    for suite; do echo "deb [signed-by=$keyring] $mirror $suite main"; done >"$dir/sources.list"
    : >"$dir/status"
    APT=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o "Dir::State=$dir/state" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
        -o "Dir::Cache=$dir" -o APT::Sandbox::User=root -o Acquire::Languages=none
        -o APT::Install-Recommends=0 -o "APT::Default-Release=${*: -1}" -qq)
    # Warnings matter here: apt calls a list that it could not fetch a warning.
    apt-get "${APT[@]}" -o APT::Update::Error-Mode=any update </dev/null >&2 ||
        die "could not read these suites from $mirror: $suites"
}
