"""What a guest executes to build an image on top of another: a script for any POSIX shell."""

SCRIPT = r"""
# Runs as root in the guest of a build: brings files and packages into the system, executes the
# recipe's steps, and writes the result as a tar to stdout.
#   $1 "files" when stdin is their tar, $2 packages, $3… steps
set -eu
umask 022
build=/run/apppot-build # a tmpfs, and so never in the image
mkdir -p $build/parent $build/generated
# The parent once more, as it is: from the device of which the agent (PID 1) made the lowest layer.
parent=$(awk '$5 == "/run/apppot/layer0" { print $(NF - 2), $(NF - 1) }' /proc/1/mountinfo)
mount -t "${parent% *}" -o ro "${parent#* }" $build/parent
files=$1 packages=$2
shift 2
exec 3>&1 1>&2

# --- What the agent generated is noted, so that it can be told from what the steps make.
generated="passwd group shadow gshadow hostname hosts resolv.conf localtime"
for name in $generated; do
    if [ -e "/etc/$name" ]; then cp -a "/etc/$name" $build/generated/; fi
done
in_parent() { [ -e "$build/parent/$1" ] || [ -L "$build/parent/$1" ]; }
restore() {
    rm -f "/$1"
    if in_parent "$1"; then cp -a "$build/parent/$1" "/$1"; fi
}
# The sudo rule would be in the way of a sudo that is installed now.
restore etc/sudoers.d/apppot
if [ -e /etc/sudoers ] && ! in_parent etc/sudoers; then rm -f /etc/sudoers; fi
if ! in_parent etc/sudoers.d; then rmdir /etc/sudoers.d 2>/dev/null || true; fi
# What the pot lends to every guest is not the image's.
for name in usr/bin/sudo usr/bin/apppot-snap; do
    if ! in_parent $name; then rm -f /$name; fi
done

# --- Packages, files, steps.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
if [ -n "$packages" ]; then
    echo "installing $packages"
    # shellcheck disable=SC2086  # a list of words
    if command -v apt-get >/dev/null; then
        # Nothing is started in a system that is only being made.
        policy=/usr/sbin/policy-rc.d
        if [ -e $policy ]; then
            policy=
        else
            printf '#!/bin/sh\nexit 101\n' >$policy
            chmod 755 $policy
        fi
        apt-get -q update
        apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 install $packages
        apt-get clean
        if [ -n "$policy" ]; then rm -f $policy; fi
    elif command -v apk >/dev/null; then
        apk add --no-cache $packages
    elif command -v dnf >/dev/null; then
        dnf -y --setopt=install_weak_deps=False install $packages && dnf clean all
    else
        echo "the parent image has no package manager that AppPot knows (apt, apk, dnf)" >&2
        exit 1
    fi
fi
if [ "$files" = files ]; then tar -xpf - -C /; fi
cd /root
for step; do
    printf '+ %s\n' "$step"
    sh -e -c "$step" </dev/null
done
cd /

# --- What the agent generated goes: the parent's own comes back, with what the steps added.
merge() { # by the first field: changed or new lines stay, generated ones become the parent's
    own=$build/parent/etc/$1
    [ -e "$own" ] || own=/dev/null
    awk -F: '
        part == 1 { before[$1] = $0; next }
        part == 2 { now[$1] = $0; order[++count] = $1; next }
        { own[$1] = $0; lines[++total] = $1 }
        function unchanged(key) { return key in before && before[key] == now[key] }
        END {
            for (i = 1; i <= total; i++) {
                key = lines[i]; done[key] = 1
                if (!(key in now)) { if (!(key in before)) print own[key] }
                else print unchanged(key) ? own[key] : now[key]
            }
            for (i = 1; i <= count; i++)
                if (!(order[i] in done) && !unchanged(order[i])) print now[order[i]]
        }' part=1 "$build/generated/$1" part=2 "/etc/$1" part=3 "$own" >$build/merged
    cat $build/merged >"/etc/$1"
}
for name in $generated; do
    [ -e "$build/generated/$name" ] && [ -e "/etc/$name" ] || continue
    if cmp -s "$build/generated/$name" "/etc/$name"; then
        restore "etc/$name"
        continue
    fi
    case $name in passwd | group | shadow | gshadow) merge "$name" ;; esac
done
for name in passwd group shadow gshadow subuid subgid; do restore "etc/$name-"; done
for name in home/user/job home/user home etc/sudoers.d usr/bin usr; do
    if ! in_parent "$name"; then rmdir "/$name" 2>/dev/null || true; fi
done
# Logs and caches that tell only of when this was built, unless the parent has them.
for name in var/log/dpkg.log var/log/alternatives.log var/log/bootstrap.log var/log/faillog \
    var/log/lastlog var/log/apt/history.log var/log/apt/term.log var/log/apt/eipp.log.xz \
    var/cache/ldconfig/aux-cache var/cache/apt/pkgcache.bin var/cache/apt/srcpkgcache.bin; do
    restore "$name"
done
rm -rf /var/lib/apt/lists/* /root/.cache
if in_parent var/lib/apt/lists; then
    cp -a "$build/parent/var/lib/apt/lists/." /var/lib/apt/lists/
fi

# A directory that holds what it held has its old time.
for name in home etc etc/sudoers.d usr usr/bin var/log var/log/apt var/cache/apt \
    var/cache/ldconfig; do
    in_parent "$name" && [ -d "/$name" ] || continue
    if [ "$(ls -A "/$name")" = "$(ls -A "$build/parent/$name")" ]; then
        touch -r "$build/parent/$name" "/$name"
    fi
done

# --- Out.  What the kernel mounted over is the parent's, and so is /tmp: nothing is kept there.
if ! tar --version 2>/dev/null | grep -q GNU; then
    echo "the image needs GNU tar: add it to the packages" >&2
    exit 1
fi
set --
for entry in ./.[!.]* ./..?* ./*; do
    [ -e "$entry" ] || [ -L "$entry" ] || continue
    case $entry in ./dev | ./proc | ./run | ./sys | ./tmp) ;; *) set -- "$@" "$entry" ;; esac
done
set -- --no-recursion . --recursion "$@" -C $build/parent
for entry in dev proc run sys tmp; do
    if in_parent $entry; then set -- "$@" ./$entry; fi
done
exec tar --numeric-owner --xattrs '--xattrs-include=*' --sort=name --one-file-system \
    --format=pax --pax-option=delete=atime,delete=ctime -cf - -C / "$@" >&3
"""
