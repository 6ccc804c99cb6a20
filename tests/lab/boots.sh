# Sixty guests, one after the other, on real Xen: each must start.  For the lab's shell:
#   LAB_OWN_PACE=1 .venv/bin/python -m tests.lab --only xen-pvh --script "$(cat tests/lab/boots.sh)"
export PYTHONPATH=/lab/tree/tests/typeroot PYTHONPYCACHEPREFIX=/tmp/compiled HOME=/tmp
export APPPOT_POT=/lab/pot APPPOT_SITE_STORE=/lab/site XDG_CACHE_HOME=/tmp/cache
export APPPOT_HELLO_TIMEOUT=10m APPPOT_HEARTBEAT_LIMIT=10m APPPOT_XEN_TYPE=pvh
# The root's overlay has no files without a name, which disks of guests are.
mkdir -p /tmp/memory
mount -t tmpfs -o size=2G,mode=1777 memory /tmp/memory
export TMPDIR=/tmp/memory
cd /tmp || exit
failed=0
for number in $(seq 60); do
    timeout 120 python3 -c 'from apppot.host.cli import main; main()' \
        run --hypervisor xen --network none debian-12 true
    status=$?
    echo "$number: $status"
    [ $status -eq 0 ] || failed=$((failed + 1))
done
echo "$failed of 60 failed"
[ $failed -eq 0 ]
