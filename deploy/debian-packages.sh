#!/usr/bin/env bash
# Installs the Debian packages that pip cannot bring, when they are missing and this is root on Debian or Ubuntu;
# otherwise it says what is missing and goes on, and what needs it says so itself.
#
#   deploy/debian-packages.sh run [test]
#
# Each line: group, package, how to see that it is there, reason.
set -euo pipefail

needs() {
    cat <<'TABLE'
run   g++         command:c++                           torch.compile builds vLLM's CPU sampling kernels with it
run   libnuma1    library:libnuma.so.1                  vLLM's CPU kernels are linked against it
test  postgresql  file:/usr/lib/postgresql/*/bin/initdb the storage tests run on a real server, too; without it they skip
TABLE
}

is_present() {
    case $1 in
        command:*) command -v "${1#command:}" >/dev/null ;;
        file:*) compgen -G "${1#file:}" >/dev/null ;;
        library:*) PATH=$PATH:/sbin:/usr/sbin ldconfig -p | grep -qF "${1#library:}" ;;
    esac
}

missing=()
while read -r group package probe reason; do
    [[ " $* " == *" $group "* ]] || continue
    is_present "$probe" && continue
    printf '==> %s is missing: %s\n' "$package" "$reason"
    missing+=("$package")
done < <(needs)

[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "==> going on without; install by hand: ${missing[*]}"
    exit 0
fi
echo "==> apt-get install ${missing[*]}"
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null; then
    echo "==> apt-get failed; going on without ${missing[*]}"
fi
