# What a shell in the lab needs for AppPot: the tree's code, and the pot and the images shown there.
# To be sourced.
export PYTHONPATH=/lab/tree/tests/typeroot PYTHONPYCACHEPREFIX=/tmp/compiled
export APPPOT_POT=/lab/pot APPPOT_SITE_STORE=/lab/site XDG_CACHE_HOME=/tmp/cache
export APPPOT_HELLO_TIMEOUT=10m APPPOT_HEARTBEAT_LIMIT=10m
# The root's overlay has no files without a name, which disks of guests are.
mkdir -p /tmp/memory
mount -t tmpfs -o size=2G,mode=1777 memory /tmp/memory
export TMPDIR=/tmp/memory
